"""What LoRA costs in decode: an engine with LoRA inputs, idle and with adapters of some ranks, against one without.

    python benchmarks/lora_decode.py                       # a Qwen3-0.6B shape, fp32, 2 threads
    python benchmarks/lora_decode.py --shape qwen3-tiny    # a quick look
    python benchmarks/lora_decode.py --batch 1,4 --ranks 8,16

Weights and adapters are random (speed does not depend on them). Both engines are loaded in one process through the
public `LLM`; what is measured takes turns, in another order every round, so that a change of the machine's speed meets
all of it. A round's figure is the mean time per token after the first, over all requests of a batch; shown are medians
over rounds, and the median over rounds of the ratio to the engine without LoRA within a round.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import random_checkpoint
import torch
from random_checkpoint import FIRST_TOKEN, SHAPES

from edgellm import LLM, SamplingParams
from edgellm.build.builder import build
from edgellm.config import BuildConfig
from edgellm.engines.base import TensorSpec
from edgellm.export.exporter import export
from edgellm.lora import AdapterWeights, write_adapter

PLAIN = "no LoRA inputs"


def engines(directory: Path, shape: str, max_rank: int, limits: BuildConfig) -> tuple[Path, Path]:
    """Engine directories of the same checkpoint, without and with LoRA inputs."""
    checkpoint = directory / "checkpoint"
    checkpoint.mkdir(parents=True)
    random_checkpoint.write(checkpoint, SHAPES[shape], limits.max_kv_cache_capacity)
    for name, rank in (("plain", 0), ("lora", max_rank)):
        export(checkpoint, directory / f"{name}_onnx", max_lora_rank=rank)
        build(directory / f"{name}_onnx", directory / name, "onnxruntime", limits)
    return directory / "plain", directory / "lora"


def random_adapter(inputs: dict[str, TensorSpec], rank: int, path: Path) -> Path:
    """A converted adapter of random weights for every linear layer that the engine's `inputs` name."""
    matrices = {}
    for name, spec in inputs.items():
        module, found, _ = name.partition(".lora_A.weight")
        if found:
            k, m = spec.shape[0], inputs[f"{module}.lora_B.weight"].shape[1]
            assert isinstance(k, int)
            assert isinstance(m, int)
            matrices[module] = torch.randn(k, rank) * 0.01, torch.randn(rank, m) * 0.01
    write_adapter(AdapterWeights(matrices, f"random {rank}", None), path)
    return path


def seconds_per_token(llm: LLM, batch: int, prompt: list[int], tokens: int, lora: str) -> float:
    """Mean time between tokens of `batch` requests that decode together."""
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    handles = [llm.generate_async(prompt, params, lora=lora) for _ in range(batch)]
    seconds = []
    for handle in handles:
        times = [increment.sampled_at for increment in handle]
        # the first tokens fall into the prefill of the batch's other requests
        seconds.append((times[-1] - times[batch]) / (len(times) - 1 - batch))
    return statistics.mean(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--ranks", default="8,16", help="ranks of the adapters that are measured")
    parser.add_argument("--batch", default="1", help="batch sizes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    ranks, batches = ([int(x) for x in text.split(",")] for text in (args.ranks, args.batch))
    torch.set_num_threads(1)
    limits = BuildConfig(max_batch_size=max(batches), max_input_len=args.prompt, max_kv_cache_capacity=512)
    prompt = [FIRST_TOKEN + i % 200 for i in range(args.prompt)]
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        plain_dir, lora_dir = engines(directory / "model", args.shape, max(ranks), limits)
        with (
            LLM(plain_dir, num_threads=args.threads, skip_tokenizer_init=True) as plain,
            LLM(lora_dir, num_threads=args.threads, skip_tokenizer_init=True) as lora,
        ):
            for rank in ranks:
                file = random_adapter(lora._runner._engine.inputs, rank, directory / f"{rank}.safetensors")
                lora.load_lora(f"rank {rank}", file)
            contenders = {PLAIN: (plain, ""), "no adapter": (lora, "")}
            contenders |= {a.name: (lora, a.name) for a in lora.list_loras()}
            for batch in batches:
                measure(contenders, batch, prompt, args.tokens, args.rounds)


def measure(contenders: dict[str, tuple[LLM, str]], batch: int, prompt: list[int], tokens: int, rounds: int) -> None:
    """Run the rounds for one batch size and print the table."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()
    for i in range(rounds + 1):
        for name in random.Random(i).sample(list(contenders), len(contenders)):
            llm, lora = contenders[name]
            value = seconds_per_token(llm, batch, prompt, tokens, lora)
            if i:  # the first round warms up
                seconds[name].append(value)
    print(f"batch {batch}, {rounds} rounds of {tokens} tokens in {time.perf_counter() - start:.0f} s")
    for name, values in seconds.items():
        ratio = statistics.median(v / p for v, p in zip(values, seconds[PLAIN], strict=True))
        print(f"  {name:16} {1000 * statistics.median(values):8.3f} ms/token  {100 * (ratio - 1):+6.1f} %")


if __name__ == "__main__":
    main()
