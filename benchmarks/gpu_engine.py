"""The torch engine on a GPU: decode with and without CUDA graphs, and many requests together against one by one.

    python benchmarks/gpu_engine.py                     # a Qwen3-0.6B shape, fp16: two minutes
    python benchmarks/gpu_engine.py --shape qwen3-tiny  # a quick look
    python benchmarks/gpu_engine.py --device cpu --shape qwen3-tiny --concurrent-only

Decode: random weights (speed does not depend on them), the engine alone: the mean time of a step whose cache holds the
given number of tokens, by CUDA events; and of prefills, whole and after a cached prefix. Concurrency: the whole runtime on the tiny reference model, greedy,
answers of equal length; throughput of all requests at once over that of the same requests one by one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import random_checkpoint
import torch
from random_checkpoint import FIRST_TOKEN, SHAPES

from edgellm import LLM, SamplingParams
from edgellm.build.builder import build
from edgellm.config import BuildConfig
from edgellm.engine_dir import read_manifest
from edgellm.engines.base import backend
from edgellm.runtime.kv_cache import KVCache
from edgellm.runtime.rope import RopeTable

TINY_VLM = Path(__file__).resolve().parents[1] / "assets" / "tiny_vlm"
LEAST_RATIO = {"cuda": 3.0, "cpu": 1.3}
"""Throughput together over one by one that counts as a pass."""


class Decode:
    """A decoder engine and the tensors of its steps, all rows at the same length."""

    def __init__(self, directory: Path, rows: int) -> None:
        config = read_manifest(directory)
        self.engine: Any = backend(config.backend).load_decoder(directory, None)
        device, decoder = self.engine.device, config.decoder
        capacity = config.limits.max_kv_cache_capacity
        cache = KVCache(self.engine.inputs, rows, capacity, device)
        rope = RopeTable(decoder.rope, ("rope_rotary_cos_sin",), rows, capacity, device)
        dtype = self.engine.inputs["inputs_embeds"].dtype
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        self.starts = torch.zeros(rows, dtype=torch.int32, device=device)
        self.last = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.inputs = {
            "inputs_embeds": torch.randn(rows, 1, decoder.hidden_size, device=device).to(dtype),
            "context_lengths": self.lengths,
            "kvcache_start_index": self.starts,
            "last_token_ids": self.last,
            **rope.inputs(0, rows),
            **cache.inputs(0, rows),
        }
        logits = torch.empty(rows, 1, decoder.vocab_size, device=device)
        self.outputs = {"logits": logits, **cache.outputs(0, rows)}

    def milliseconds(self, new: int, past: int, graphs: bool, steps: int) -> tuple[float, float]:
        """Mean time on the GPU of a step of `new` tokens per row, and the host's share of it (from call to return)."""
        self.engine.cuda_graphs = graphs
        self.lengths.fill_(past + new)
        self.starts.fill_(past)
        self.last.fill_(new - 1)
        phase = "generation" if new == 1 else "prefill"
        inputs = {**self.inputs, "inputs_embeds": self.inputs["inputs_embeds"].repeat(1, new, 1)}
        for _ in range(5):
            self.engine.run(phase, inputs, self.outputs)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start = time.perf_counter()
        begin.record()
        for _ in range(steps):
            self.engine.run(phase, inputs, self.outputs)
        host = time.perf_counter() - start
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / steps, 1000 * host / steps


def decode(work: Path, shape_name: str, pasts: Sequence[int], batches: Sequence[int], steps: int) -> list[Any]:
    """Rows of the decode table, and one of the whole runtime's."""
    shape = SHAPES[shape_name]
    checkpoint, engine = work / "checkpoint", work / "engine"
    checkpoint.mkdir()
    capacity = max(pasts) + 256
    random_checkpoint.write(checkpoint, shape, capacity, dtype="float16")
    limits = BuildConfig(max_batch_size=max(batches), max_input_len=max(pasts), max_kv_cache_capacity=capacity)
    build(checkpoint, engine, "torch", limits, {"device": "cuda"})
    table = []
    for rows in batches:
        bench = Decode(engine, rows)
        cases = [(1, past, graphs) for past in pasts for graphs in (False, True)]
        if rows == 1:
            cases += [(1000, 0, False), (16, 1000, False), (16, 1000, True)]
        for new, past, graphs in cases:
            device_ms, host_ms = bench.milliseconds(new, past, graphs, steps)
            row = {"batch": rows, "new": new, "past": past, "graphs": graphs, "ms": device_ms, "host_ms": host_ms}
            table.append(row)
            print(
                f"batch {rows:2}  new {new:4}  past {past:4}  {'graph' if graphs else 'eager'}  {device_ms:7.3f} ms  "
                f"{1000 * rows * new / device_ms:9.1f} tok/s  (host {host_ms:.3f} ms)",
                flush=True,
            )
        bench.engine.close()
        del bench
    start = time.perf_counter()
    with LLM(engine, skip_tokenizer_init=True) as llm:
        loaded = time.perf_counter() - start
        prompt, params = [FIRST_TOKEN] * 128, SamplingParams(max_tokens=128, ignore_eos=True)
        llm.generate(prompt, params)
        timing = llm.generate(prompt, params).timing
    tokens_per_s = 127 / timing.decode_s
    print(f"runtime batch   1  prompt 128: {tokens_per_s:.1f} tok/s, prefill {1000 * timing.prefill_s:.1f} ms", end="")
    print(f", loaded in {loaded:.1f} s", flush=True)
    return [*table, {"runtime_tokens_per_s": tokens_per_s, "prefill_s": timing.prefill_s, "load_s": loaded}]


def concurrency(work: Path, device: str, requests: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Throughput of the tiny model, `requests` one by one and together; the best of some rounds each."""
    engine = work / f"tiny-{device}"
    build(TINY_VLM, engine, "torch", BuildConfig(max_batch_size=requests), {"device": device})
    questions = [[{"role": "user", "content": f"What is there? Scene {i}."}] for i in range(requests)]
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    with LLM(engine) as llm:
        llm.generate(questions, params)
        llm.generate(questions, params)
        alone, together, equal = [], [], 0
        for _ in range(rounds):
            start = time.perf_counter()
            one_by_one = [llm.generate(q, params).outputs[0].token_ids for q in questions]
            middle = time.perf_counter()
            batch = [o.outputs[0].token_ids for o in llm.generate(questions, params)]
            end = time.perf_counter()
            alone.append(requests * tokens / (middle - start))
            together.append(requests * tokens / (end - middle))
            equal = sum(a == b for a, b in zip(one_by_one, batch, strict=True))
    ratio = max(together) / max(alone)
    word = "pass" if ratio >= LEAST_RATIO[device] else "FAIL"
    print(
        f"{word}  {requests} requests on {device}: {max(together):.0f} tok/s together, {max(alone):.0f} one by one: "
        f"{ratio:.2f} x (required {LEAST_RATIO[device]}); {equal} of {requests} answers equal",
        flush=True,
    )
    return {"device": device, "together": together, "alone": alone, "ratio": ratio, "equal": equal}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 1 if the required ratio is missed."""
    parser = argparse.ArgumentParser(description="The torch engine on a GPU.", allow_abbrev=False)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b", help="default: %(default)s")
    parser.add_argument("--past", nargs="+", type=int, default=[128, 2048], metavar="N", help="tokens in the cache")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], metavar="N")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="per figure (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=32, metavar="N", help="together (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="of each answer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--device", choices=LEAST_RATIO, default="cuda", help="of the concurrency test")
    parser.add_argument("--concurrent-only", action="store_true", help="leave decode out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args(arguments)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{gpu}, torch {torch.__version__}", flush=True)
    figures: dict[str, Any] = {"gpu": gpu, "torch": torch.__version__}
    with tempfile.TemporaryDirectory(prefix="gpu_engine_") as directory:
        work = Path(directory)
        figures["concurrency"] = concurrency(work, options.device, options.requests, options.tokens, options.rounds)
        if not options.concurrent_only:
            figures["decode"] = decode(work, options.shape, options.past, options.batch, options.steps)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if figures["concurrency"]["ratio"] >= LEAST_RATIO[options.device] else 1


if __name__ == "__main__":
    sys.exit(main())
