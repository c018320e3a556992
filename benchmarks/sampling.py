"""What one sampling step costs, by feature: microseconds for a batch in which every row asks for it.

    python benchmarks/sampling.py [--device cuda] [--batch 8] [--tokens 1000] [--vocab 2048 151936]

On a GPU three numbers: `host` is how long the call keeps the host, `device` how long the device works (launched one by
one), `graph` how long when captured as a CUDA graph. On a CPU one number, the median of repeated calls.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from edgellm.runtime.beam import BeamState, advance
from edgellm.runtime.logits_processors import SamplerState
from edgellm.runtime.sampling import RowParams, SamplingParams, sample

CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top_k 50": {"temperature": 0.8, "top_k": 50},
    "top_p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "min_p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "repetition_penalty": {"repetition_penalty": 1.2},
    "frequency + presence": {"frequency_penalty": 0.5, "presence_penalty": 0.5},
    "logit_bias, 300 tokens": {"logit_bias": dict.fromkeys(range(300), 1.0)},
    "bad words, 100 of 3 tokens": {"bad_token_ids": [[i, i + 1, i + 2] for i in range(100)]},
    "min_tokens": {"min_tokens": 100},
    "bitmask": {},
    "logprobs 0": {"logprobs": 0},
    "logprobs 20": {"logprobs": 20},
    "a logits processor": {"logits_processors": [lambda ids, logits: logits]},
}


def on_cpu(call: Callable[[], Any]) -> str:
    """Median microseconds of a call, of processor time: what else runs there counts less."""
    call()
    times = []
    end = time.perf_counter() + 0.4
    while time.perf_counter() < end or len(times) < 5:
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return f"{statistics.median(times) * 1e6:9.0f}"


def on_gpu(call: Callable[[], Any], capturable: bool) -> str:
    """Microseconds: host, device, in a CUDA graph."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start = time.perf_counter()
    begin.record()
    for _ in range(50):
        call()
    host = (time.perf_counter() - start) / 50
    end.record()
    torch.cuda.synchronize()
    numbers = f"{host * 1e6:9.0f} {begin.elapsed_time(end) / 50 * 1e3:9.0f}"
    if not capturable:
        return numbers + "        –"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    begin.record()
    for _ in range(100):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return f"{numbers} {begin.elapsed_time(end) / 100 * 1e3:9.0f}"


def measure(device: str, vocab: int, batch: int, tokens: int) -> None:
    """Print one table."""
    logits = torch.randn(batch, vocab, device=device) * 2
    logits[:, ::997] += 18 * torch.rand(batch, -(-vocab // 997), device=device)  # peaked, as a language model's are
    steps = torch.full((batch,), 50, device=device)
    mask = torch.full((batch, -(-vocab // 32)), 0x55555555, dtype=torch.int32, device=device)
    state = SamplerState.empty(batch, tokens, device)
    for slot in range(batch):
        state.set_slot(slot, torch.randint(0, vocab, (tokens // 2,)).tolist(), [5] * (tokens - 1 - tokens // 2))

    def time_it(name: str, call: Callable[[], Any], capturable: bool = True) -> None:
        print(f"  {name:28}", on_gpu(call, capturable) if device == "cuda" else on_cpu(call), flush=True)

    print(
        f"{device}, vocabulary {vocab}, batch {batch}, {tokens} tokens seen; microseconds"
        + ("      host    device     graph" if device == "cuda" else "")
    )
    for name, fields in CASES.items():
        params = [SamplingParams(**fields)] * batch
        guided = range(batch) if name == "bitmask" else ()
        rows = RowParams.from_params(params, range(batch), device, eos_token_ids=[0, 1], guided=guided)
        time_it(name, lambda rows=rows: sample(logits, rows, steps, state, mask), not rows.waits_for_host)
    width = min(batch, 16)
    beams = BeamState.start([SamplingParams(beam_width=width)], [tokens], [0], device)
    time_it(f"beam search, {width} beams", lambda: advance(beams, logits[:width].log_softmax(-1)))
    time_it("history append", lambda: state.append(steps))
    mixed = [SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.1)] * batch
    build = lambda: RowParams.from_params(mixed, range(batch), device)  # noqa: E731
    time_it("(a row joins: RowParams)", build, False)


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--vocab", type=int, nargs="+", default=[2048, 151936])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for vocab in options.vocab:
        for batch in options.batch:
            measure(options.device, vocab, batch, options.tokens)


if __name__ == "__main__":
    main()
