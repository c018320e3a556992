"""Every backend keeps the engine protocol: shapes as described, tensors where the caller has them, rows apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edgellm.config import BuildConfig
from edgellm.engine_dir import EMBEDDING, EngineConfig, read_manifest
from edgellm.engines.base import Engine, backend
from edgellm.errors import EngineDirError, EngineError
from edgellm.runtime.kv_cache import KVCache
from edgellm.runtime.rope import RopeTable

CAPACITY, BATCH = 32, 3
CASES = ["null", "onnxruntime", "torch-cpu", "torch-cuda", "torch-cuda-float32"]
PROMPTS = [[5, 9, 300, 4, 8, 2, 77], [640, 3], [12, 13, 14, 15, 16]]


class Decoder:
    """A decoder and its tensors: tokens in, logits out."""

    def __init__(self, directory: Path) -> None:
        self.config: EngineConfig = read_manifest(directory)
        self.engine: Engine = backend(self.config.backend).load_decoder(directory, 1)
        self.embedding = load_file(directory / EMBEDDING)["weight"].to(self.engine.device)
        self.reset()

    def reset(self) -> None:
        device = self.engine.device
        self.cache = KVCache(self.engine.inputs, BATCH, CAPACITY, device)
        names = tuple(n for n in self.engine.inputs if n.startswith("rope_"))
        self.rope = RopeTable(self.config.decoder.rope, names, BATCH, CAPACITY, device)
        for row in range(BATCH):
            self.rope.set_slot(row, None, 0)
        self.buffers: dict[int, dict[str, torch.Tensor]] = {}

    def run(self, phase: str, first: int, tokens: list[list[int]], starts: list[int]) -> torch.Tensor:
        """Logits [B, V] fp32 after the last of each row's `tokens`, which are equally many."""
        device, rows, new = self.engine.device, len(tokens), len(tokens[0])
        spec = self.engine.inputs["inputs_embeds"]
        start = torch.tensor(starts, dtype=torch.int32, device=device)
        embeds = self.embedding[torch.tensor(tokens, device=device)].to(spec.dtype)
        inputs = {
            "inputs_embeds": embeds,
            "context_lengths": start + new,
            "kvcache_start_index": start,
            "last_token_ids": torch.full((rows, 1), new - 1, device=device),
            **{n: torch.zeros_like(embeds) for n in self.engine.inputs if n.startswith("deepstack_embeds_")},
        }
        if phase == "generation":  # as the runtime does it: the same tensors for every step of a batch size
            kept = self.buffers.setdefault(rows, {name: torch.empty_like(t) for name, t in inputs.items()})
            for name, tensor in inputs.items():
                kept[name].copy_(tensor)
            logits = kept.setdefault("logits", torch.empty(rows, 1, self.config.decoder.vocab_size, device=device))
            inputs = {name: kept[name] for name in inputs}
        else:
            logits = torch.empty(rows, 1, self.config.decoder.vocab_size, device=device)
        logits.fill_(torch.nan)
        inputs |= {**self.rope.inputs(first, rows), **self.cache.inputs(first, rows)}
        assert inputs.keys() == self.engine.inputs.keys()
        outputs = {"logits": logits, **self.cache.outputs(first, rows)}
        assert outputs.keys() == self.engine.outputs.keys()
        self.engine.run(phase, inputs, outputs)
        assert torch.isfinite(logits).all()
        return logits[:, 0].cpu().clone()

    def snapshot(self) -> dict[str, torch.Tensor]:
        return {name: t.clone() for name, t in self.cache.inputs(0, BATCH).items()}


@pytest.fixture(params=CASES, scope="module")
def decoder(request: pytest.FixtureRequest, engine_of: Callable[[str], Path]) -> Iterator[Decoder]:
    decoder = Decoder(engine_of(request.param))
    yield decoder
    decoder.engine.close()


def limit(decoder: Decoder) -> float:
    """Rows of one batch may take another way through the kernels than a row alone."""
    return 0.1 if decoder.config.dtype == "float16" else 1e-4


def test_specs_name_the_tensors_of_the_design(decoder: Decoder) -> None:
    config, engine = decoder.config.decoder, decoder.engine
    for name, spec in engine.inputs.items():
        assert spec.shape[0] in ("batch", "rope_batch"), name
    embeds = engine.inputs["inputs_embeds"]
    assert embeds.shape == ("batch", "seq_len", config.hidden_size)
    assert engine.outputs["logits"].dtype == torch.float32
    past = [n for n in engine.inputs if n.startswith("past_")]
    assert past
    for name in past:
        present = engine.outputs["present_" + name.removeprefix("past_")]
        assert present.shape == engine.inputs[name].shape
        assert present.dtype == engine.inputs[name].dtype
        assert "kv_capacity" in present.shape


def test_chunks_and_batched_steps_equal_rows_alone(decoder: Decoder) -> None:
    alone = []
    for row, prompt in enumerate(PROMPTS):
        decoder.reset()
        logits = [decoder.run("prefill", row, [prompt], [0])]
        for step in range(4):
            logits.append(decoder.run("generation", row, [[20 + step]], [len(prompt) + step]))
        alone.append(torch.cat(logits))
    decoder.reset()
    for row, prompt in enumerate(PROMPTS):
        for start in range(0, len(prompt), 3):
            last = decoder.run("prefill", row, [prompt[start : start + 3]], [start])
        assert (last[0] - alone[row][0]).abs().max() <= limit(decoder)
    for step in range(4):
        logits = decoder.run("generation", 0, [[20 + step]] * BATCH, [len(p) + step for p in PROMPTS])
        for row in range(BATCH):
            assert (logits[row] - alone[row][step + 1]).abs().max() <= limit(decoder)
    assert len({int(a[0].argmax()) for a in alone}) > 1, "the prompts must not all answer alike"


def test_a_step_writes_its_own_rows_and_slots_only(decoder: Decoder) -> None:
    decoder.reset()
    for row, prompt in enumerate(PROMPTS):
        decoder.run("prefill", row, [prompt], [0])
    before = decoder.snapshot()
    for _ in range(3):  # again at the same place: the third time from a captured graph, where there are any
        decoder.run("generation", 0, [[7], [8]], [len(PROMPTS[0]), len(PROMPTS[1])])
    for name, tensor in decoder.cache.inputs(0, BATCH).items():
        axis = decoder.engine.inputs[name].shape.index("kv_capacity")
        changed = (tensor != before[name]).movedim(axis, 1).flatten(2).any(-1)
        expected = torch.zeros(BATCH, CAPACITY, dtype=torch.bool)
        expected[0, len(PROMPTS[0])] = expected[1, len(PROMPTS[1])] = True
        assert torch.equal(changed.cpu(), expected), name


def test_the_same_step_gives_the_same_logits(decoder: Decoder) -> None:
    decoder.reset()
    decoder.run("prefill", 0, [PROMPTS[0]], [0])
    first, *others = [decoder.run("generation", 0, [[7]], [len(PROMPTS[0])]) for _ in range(4)]
    for other in others:
        assert (first - other).abs().max() == 0


@pytest.mark.parametrize("case", CASES)
def test_visual_encoder(case: str, engine_of: Callable[[str], Path]) -> None:
    import numpy as np

    from edgellm.vision.base import load_visual_runner

    directory = engine_of(case)
    config = read_manifest(directory)
    assert config.vision is not None
    engine = backend(config.backend).load_visual(directory, 1)
    dtype = engine.outputs["image_embeds"].dtype
    runner = load_visual_runner(config.model_type, config.vision, device=engine.device, output_dtype=dtype)
    image = runner.prepare(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    features = runner.encode(engine, image)
    assert features.image_embeds.shape == (image.num_tokens, config.decoder.hidden_size)
    assert len(features.deepstack_embeds) == config.decoder.num_deepstack
    assert torch.isfinite(features.image_embeds).all()
    assert bool(features.image_embeds.any()) == (config.backend != "null")
    engine.close()


@pytest.mark.parametrize("case", ["torch-cpu", "torch-cuda"])
def test_a_closed_engine_says_so(case: str, engine_of: Callable[[str], Path]) -> None:
    decoder = Decoder(engine_of(case))
    decoder.engine.close()
    with pytest.raises(EngineError, match="has been closed"):
        decoder.run("prefill", 0, [[1]], [0])


def test_an_unknown_backend_lists_the_known() -> None:
    with pytest.raises(EngineDirError, match="'fast'; this edgellm runs null, onnxruntime, torch"):
        backend("fast")


def test_limits_reach_the_manifest(engine_of: Callable[[str], Path]) -> None:
    assert read_manifest(engine_of("null")).limits == BuildConfig()
