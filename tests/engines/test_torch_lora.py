"""LoRA on the torch engine: the logits of the onnxruntime engine, adapters mixed, and the fixed tensors of graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edgellm.build.builder import build
from edgellm.config import BuildConfig
from edgellm.engine_dir import read_manifest
from edgellm.engines.base import Engine, backend
from edgellm.engines.static_lora import RANK_MASK, StaticLora, split
from edgellm.errors import EngineError
from edgellm.lora import AdapterWeights, write_adapter
from edgellm.runtime.kv_cache import KVCache
from edgellm.runtime.lora import LoraAdapter, LoraManager

CAPACITY, MAX_RANK = 24, 32
CASES = {"torch-cpu": {"device": "cpu"}, "torch-cuda-float32": {"device": "cuda", "dtype": "float32"}}


@pytest.fixture(scope="module", params=CASES)
def torch_lora_engine(
    request: pytest.FixtureRequest, tiny_vlm: Path, tmp_path_factory: pytest.TempPathFactory
) -> Engine:
    options = CASES[request.param]
    if options["device"] == "cuda" and not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA GPU")
    directory = tmp_path_factory.mktemp("torch_lora") / "engine"
    build(tiny_vlm, directory, "torch", BuildConfig(max_lora_rank=MAX_RANK), options)
    return backend("torch").load_decoder(directory, 1)


@pytest.fixture(scope="module")
def adapters(torch_lora_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random adapters by name."""
    root, paths = tmp_path_factory.mktemp("adapters"), {}
    for rank in (3, 16):
        torch.manual_seed(rank)
        matrices = {}
        for name, spec in torch_lora_engine.inputs.items():
            module, is_a, _ = name.partition(".lora_A.weight")
            if is_a:
                out = torch_lora_engine.inputs[f"{module}.lora_B.weight"].shape[1]
                matrices[module] = torch.randn(int(spec.shape[0]), rank) * 0.05, torch.randn(rank, int(out)) * 0.05
        paths[f"r{rank}"] = root / f"{rank}.safetensors"
        write_adapter(AdapterWeights(matrices, str(rank), None), paths[f"r{rank}"])
    return paths


class Bench:
    """An engine with its cache and adapters; every step draws the same numbers from its seed."""

    def __init__(self, engine: Engine, directory: Path, adapters: dict[str, Path]) -> None:
        self.engine, self.config = engine, read_manifest(directory).decoder
        self.cache = KVCache(engine.inputs, 3, CAPACITY, engine.device)
        self.manager = LoraManager(engine.inputs, MAX_RANK, engine.device)
        self.loaded: dict[str | None, LoraAdapter | None] = {None: None}
        self.loaded |= {name: self.manager.load(name, path) for name, path in adapters.items()}
        self.fixed: dict[int, dict[str, torch.Tensor]] = {}

    def step(self, first: int, start: int, new: int, adapters: list[str | None], seed: int) -> torch.Tensor:
        """Logits [B, V] of rows `first`, first + 1, …, one for each of `adapters`."""
        rows, generator = len(adapters), torch.Generator().manual_seed(seed)
        embeds = torch.randn(rows, new, self.config.hidden_size, generator=generator) * 0.1
        angles = torch.randn(rows, CAPACITY, self.config.rope.rotary_dim // 2, generator=generator)
        starts = torch.full((rows,), start, dtype=torch.int32)
        made = {
            "inputs_embeds": embeds,
            "context_lengths": starts + new,
            "kvcache_start_index": starts,
            "last_token_ids": torch.full((rows, 1), new - 1),
            "rope_rotary_cos": angles.cos(),
            "rope_rotary_sin": angles.sin(),
            "rope_rotary_cos_sin": torch.cat((angles.cos(), angles.sin()), -1),
            **{f"deepstack_embeds_{i}": torch.zeros_like(embeds) for i in range(self.config.num_deepstack)},
            "logits": torch.zeros(rows, 1, self.config.vocab_size),
        }
        made = {n: t.to(self.engine.device) for n, t in made.items() if n in self.engine.inputs or n == "logits"}
        # as the runtime does it: the same tensors for every step of a batch size
        kept = self.fixed.setdefault(rows, made) if new == 1 else made
        for name, tensor in made.items():
            kept[name].copy_(tensor)
        inputs: dict[str, Any] = {name: t for name, t in kept.items() if name != "logits"}
        inputs |= self.cache.inputs(first, rows) | self.manager.inputs([self.loaded[a] for a in adapters])
        outputs = {"logits": kept["logits"], **self.cache.outputs(first, rows)}
        self.engine.run("prefill" if new > 1 else "generation", inputs, outputs)
        return kept["logits"][:, 0].clone().cpu()


BATCHES: list[list[str | None]] = [
    ["r3", None, "r16"],
    ["r3", None, "r16"],
    ["r3", None, "r16"],
    [None, None, None],
    ["r16", "r16", "r16"],
    ["r16", "r3", "r3"],
    [None, None, None],
]


def test_logits_equal_onnxruntimes(torch_lora_engine: Engine, lora_engine: Path, adapters: dict[str, Path]) -> None:
    ours = Bench(torch_lora_engine, lora_engine, adapters)
    peer = Bench(backend("onnxruntime").load_decoder(lora_engine, 1), lora_engine, adapters)
    for row, adapter in enumerate(("r3", None, "r16")):
        logits = [bench.step(row, 0, 5, [adapter], row) for bench in (ours, peer)]
        assert (logits[0] - logits[1]).abs().max() <= 2e-4
    for i, batch in enumerate(BATCHES):
        logits = [bench.step(0, 5 + i, 1, batch, 10 + i) for bench in (ours, peer)]
        assert logits[1].abs().max() > 0.1
        assert (logits[0] - logits[1]).abs().max() <= 2e-4


def test_fixed_tensors(torch_lora_engine: Engine, lora_engine: Path, adapters: dict[str, Path]) -> None:
    engine = torch_lora_engine
    manager = LoraManager(engine.inputs, MAX_RANK, engine.device)
    r3, r16 = (manager.load(name, path) for name, path in adapters.items())
    static = StaticLora(engine.inputs, MAX_RANK, 3, engine.device)
    assert split({"x": torch.ones(1), **manager.inputs([None, None])}) == ({"x": torch.ones(1)}, {})
    name = "model.layers.2.mlp.up_proj.lora_A.weight"
    first = static.place(split(manager.inputs([r16, None, r3]))[1])
    assert first[name].shape[1] == MAX_RANK
    assert torch.equal(first[name][:, :19], torch.cat((r3.tensors[name], r16.tensors[name]), 1))
    assert first[RANK_MASK].sum(1).tolist() == [16, 0, 3]
    second = static.place(split(manager.inputs([r16]))[1])
    assert second[name].data_ptr() == first[name].data_ptr()
    assert torch.equal(second[name][:, :16], r16.tensors[name])
    assert second[RANK_MASK].tolist() == [[1.0] * 16 + [0.0] * 16]
    small = StaticLora(engine.inputs, 8, 3, engine.device)
    with pytest.raises(EngineError, match="have rank 16 together, this engine takes 8"):
        small.place(split(manager.inputs([r16]))[1])
