"""The contenders of `cpu_decode.py`: each answers a token-id prompt greedily and says when every token was ready.

Run as a program this is one contender's process. It is told its name and settings on the command line, then reads one
round per line of standard input (JSON: prompt token ids, number of tokens) and answers each with a line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Answer = tuple[list[int], list[float]]
"""The tokens, and the seconds from the call until each was known to the caller."""

Contender = Callable[[list[int], int], Answer]


def edgellm(directory: Path, threads: int) -> Contender:
    """The public runtime: tokens of `LLM.generate_async`, timed as the caller receives them."""
    from edgellm import LLM, SamplingParams

    llm = LLM(directory, num_threads=threads, skip_tokenizer_init=True)

    def answer(prompt: list[int], count: int) -> Answer:
        start = time.perf_counter()
        handle = llm.generate_async(prompt, SamplingParams(max_tokens=count, ignore_eos=True))
        times = [time.perf_counter() - start for _ in handle]
        return handle.result().outputs[0].token_ids, times

    return answer


def edgellm_step(directory: Path, threads: int) -> Contender:
    """The engine without the runtime around it: one prefill step, then decode steps on fixed buffers, and an argmax."""
    import torch
    from safetensors import safe_open

    from edgellm.engine_dir import EMBEDDING, read_manifest
    from edgellm.engines.base import backend
    from edgellm.runtime.kv_cache import KVCache
    from edgellm.runtime.rope import RopeTable

    config = read_manifest(directory)
    engine = backend(config.backend).load_decoder(directory, threads)
    capacity = config.limits.max_kv_cache_capacity
    cache = KVCache(engine.inputs, 1, capacity, engine.device)
    rope_names = tuple(n for n in engine.inputs if n.startswith("rope_rotary_"))
    rope = RopeTable(config.decoder.rope, rope_names, 1, capacity, engine.device)
    with safe_open(directory / EMBEDDING, framework="pt") as file:
        embedding_VH = file.get_tensor("weight")
    logits_11V = torch.empty(1, 1, config.decoder.vocab_size)
    outputs = {"logits": logits_11V, **cache.outputs(0, 1)}

    def buffers(length: int) -> dict[str, torch.Tensor]:
        return {
            "inputs_embeds": torch.empty(1, length, config.decoder.hidden_size),
            "context_lengths": torch.empty(1, dtype=torch.int32),
            "kvcache_start_index": torch.empty(1, dtype=torch.int32),
            "last_token_ids": torch.tensor([[length - 1]]),
            **rope.inputs(0, 1),
            **cache.inputs(0, 1),
        }

    decode_inputs = buffers(1)

    def step(phase: str, inputs: dict[str, torch.Tensor], ids: list[int], start: int) -> int:
        inputs["inputs_embeds"][0] = embedding_VH[ids]
        inputs["kvcache_start_index"][0] = start
        inputs["context_lengths"][0] = start + len(ids)
        engine.run(phase, inputs, outputs)
        return int(logits_11V.argmax())

    def answer(prompt: list[int], count: int) -> Answer:
        start = time.perf_counter()
        tokens = [step("prefill", buffers(len(prompt)), prompt, 0)]
        times = [time.perf_counter() - start]
        while len(tokens) < count:
            tokens.append(step("generation", decode_inputs, tokens[-1:], len(prompt) + len(tokens) - 1))
            times.append(time.perf_counter() - start)
        return tokens, times

    return answer


def _transformers_model(directory: Path, threads: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def transformers(directory: Path, threads: int) -> Contender:
    """transformers at its quickest here: forward calls with a growing cache, logits of the last token only."""
    import torch
    from transformers import DynamicCache

    model = _transformers_model(directory, threads)

    @torch.inference_mode()
    def answer(prompt: list[int], count: int) -> Answer:
        start = time.perf_counter()
        cache, ids = DynamicCache(config=model.config), torch.tensor([prompt])
        tokens: list[int] = []
        times: list[float] = []
        while len(tokens) < count:
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(int(ids))
            times.append(time.perf_counter() - start)
        return tokens, times

    return answer


def transformers_generate(directory: Path, threads: int) -> Contender:
    """transformers as most people call it: `model.generate`."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    model = _transformers_model(directory, threads)

    class Clock(BaseStreamer):
        """Notes when each token arrives; the first call brings the prompt."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: object) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def answer(prompt: list[int], count: int) -> Answer:
        clock, ids = Clock(), torch.tensor([prompt])
        start = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            streamer=clock,
        )
        return output[0, len(prompt) :].tolist(), [t - start for t in clock.times[1:]]

    return answer


def onnxruntime_genai(directory: Path, threads: int) -> Contender:
    """onnxruntime-genai on its own builder's model."""
    import numpy as np
    import onnxruntime_genai as og

    config = og.Config(str(directory))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)

    def answer(prompt: list[int], count: int) -> Answer:
        params = og.GeneratorParams(model)
        length = len(prompt) + count
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, params)
        ids = np.array(prompt, dtype=np.int32)
        tokens: list[int] = []
        times: list[float] = []
        start = time.perf_counter()
        generator.append_tokens(ids)
        while len(tokens) < count:
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
            times.append(time.perf_counter() - start)
        return tokens, times

    return answer


CONTENDERS: dict[str, Callable[[Path, int], Contender]] = {
    "edgellm": edgellm,
    "edgellm-step": edgellm_step,
    "transformers": transformers,
    "transformers-generate": transformers_generate,
    "onnxruntime-genai": onnxruntime_genai,
}


def _memory_mb(key: str) -> float:
    """A figure of /proc/self/status, "VmRSS" or "VmHWM" (its peak); 0 where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":")), 0.0)


def main(name: str, directory: str, threads: str) -> None:
    """Serve rounds until standard input ends. Whatever a library prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    start = time.perf_counter()
    contender = CONTENDERS[name](Path(directory), int(threads))
    print(json.dumps({"load_s": time.perf_counter() - start}), file=answers)
    for line in sys.stdin:
        task = json.loads(line)
        tokens, times = contender(task["prompt"], task["count"])
        memory = {"rss_mb": _memory_mb("VmRSS"), "peak_mb": _memory_mb("VmHWM")}
        print(json.dumps({"tokens": tokens, "times": times, **memory}), file=answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
