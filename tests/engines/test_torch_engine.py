"""The torch engine: the answers of the other engines, graphs that equal eager steps, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgellm import LLM, SamplingParams
from edgellm.build.builder import build
from edgellm.config import BuildConfig
from edgellm.engine_dir import read_manifest
from edgellm.engines.base import backend
from edgellm.errors import BuildError, ConfigError, EngineDirError, EngineError
from edgellm.runtime.kv_cache import KVCache
from edgellm_ros import scenes

SCENES, MAX_TOKENS = 12, 48
CAPACITY = 40


def questions() -> list[Any]:
    examples = scenes.examples("held_out", SCENES)
    return [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": scenes.render([e.scene], (320, 256))[0].numpy()},
                    {"type": "text", "text": e.question},
                ],
            }
        ]
        for e in examples
    ]


def answers(directory: Path) -> list[list[int]]:
    with LLM(directory, num_threads=2) as llm:
        outputs = llm.generate(questions(), SamplingParams(max_tokens=MAX_TOKENS))
    return [o.outputs[0].token_ids for o in outputs]


@pytest.fixture(scope="module")
def cpu_answers(tiny_engine: Path) -> list[list[int]]:
    return answers(tiny_engine)


@pytest.mark.parametrize("case", ["torch-cpu", "torch-cuda", "torch-cuda-float32"])
def test_greedy_answers_equal_onnxruntimes(
    case: str, engine_of: Callable[[str], Path], cpu_answers: list[list[int]]
) -> None:
    assert answers(engine_of(case)) == cpu_answers
    assert len({tuple(a) for a in cpu_answers}) > SCENES // 3, "the answers hardly differ"


def random_inputs(config: Any, rows: int, new: int, starts: list[int]) -> dict[str, torch.Tensor]:
    embeds = torch.randn(rows, new, config.hidden_size) * 0.1
    start = torch.tensor(starts, dtype=torch.int32)
    angles = torch.randn(rows, CAPACITY, config.rope.rotary_dim // 2)
    return {
        "inputs_embeds": embeds,
        "context_lengths": start + new,
        "kvcache_start_index": start,
        "last_token_ids": torch.full((rows, 1), new - 1),
        "rope_rotary_cos": angles.cos(),
        "rope_rotary_sin": angles.sin(),
        "rope_rotary_cos_sin": torch.cat((angles.cos(), angles.sin()), -1),
        **{f"deepstack_embeds_{i}": torch.randn_like(embeds) * 0.1 for i in range(config.num_deepstack)},
    }


@pytest.mark.parametrize(("case", "limit"), [("torch-cpu", 1e-4), ("torch-cuda-float32", 2e-4)])
def test_logits_equal_onnxruntimes(case: str, limit: float, engine_of: Callable[[str], Path]) -> None:
    torch.manual_seed(0)
    directories = [engine_of("onnxruntime"), engine_of(case)]
    engines = [backend(read_manifest(d).backend).load_decoder(d, 1) for d in directories]
    config = read_manifest(directories[0]).decoder
    caches = [KVCache(e.inputs, 3, CAPACITY, e.device) for e in engines]

    def step(phase: str, first: int, new: int, starts: list[int]) -> float:
        inputs, rows, results = random_inputs(config, len(starts), new, starts), len(starts), []
        for engine, cache in zip(engines, caches, strict=True):
            logits = torch.full((rows, 1, config.vocab_size), torch.nan, device=engine.device)
            own = {n: t.to(engine.device) for n, t in inputs.items() if n in engine.inputs}
            outputs = {"logits": logits, **cache.outputs(first, rows)}
            engine.run(phase, {**own, **cache.inputs(first, rows)}, outputs)
            results.append(logits.cpu())
        assert results[0].abs().max() > 0.1
        return float((results[0] - results[1]).abs().max())

    for row, length in enumerate([9, 5, 17]):
        assert step("prefill", row, length, [0]) <= limit
    assert step("prefill", 1, 6, [5]) <= limit
    for i in range(4):
        assert step("generation", 0, 1, [9 + i, 11 + i, 17 + i]) <= limit
    assert step("prefill", 2, CAPACITY - 21, [21]) <= limit, "the last slot of the cache"


def test_a_graph_equals_its_eager_step_at_every_address(engine_of: Callable[[str], Path]) -> None:
    directory = engine_of("torch-cuda")
    engine = backend("torch").load_decoder(directory, None)
    config = read_manifest(directory).decoder
    dtype = engine.inputs["inputs_embeds"].dtype
    torch.manual_seed(0)

    def results(graphs: bool) -> list[torch.Tensor]:
        engine.cuda_graphs = graphs  # type: ignore[attr-defined]
        torch.manual_seed(1)
        found = []
        for rows in (1, 2, 3, 2, 1):
            cache = KVCache(engine.inputs, 3, CAPACITY, engine.device)
            for _ in range(2):  # twice: other buffers, the same cache
                inputs = random_inputs(config, rows, 1, [0] * rows)
                inputs = {n: t.to(engine.device) for n, t in inputs.items() if n in engine.inputs}
                inputs = {n: t.to(dtype) if n.endswith(("_embeds", "_0", "_1", "_2")) else t for n, t in inputs.items()}
                logits = torch.empty(rows, 1, config.vocab_size, device=engine.device)
                for position in range(6):
                    inputs["kvcache_start_index"].fill_(position)
                    inputs["context_lengths"].fill_(position + 1)
                    logits.fill_(torch.nan)
                    outputs = {"logits": logits, **cache.outputs(0, rows)}
                    engine.run("generation", {**inputs, **cache.inputs(0, rows)}, outputs)
                    found.append(logits.clone())
        return found

    for eager, graph in zip(results(False), results(True), strict=True):
        torch.testing.assert_close(eager, graph, rtol=0, atol=0)
    engine.close()


def test_short_prefills_are_padded_without_a_trace(engine_of: Callable[[str], Path]) -> None:
    """Lengths around those that are padded to, up to the last slot of the cache, three times each: as captured too."""
    directory = engine_of("torch-cuda-float32")
    engine, config = backend("torch").load_decoder(directory, None), read_manifest(directory).decoder
    torch.manual_seed(0)
    for length, start in ((1, 0), (15, 3), (16, 24), (17, 0), (39, 1), (3, 37)):
        inputs = {n: t.to(engine.device) for n, t in random_inputs(config, 1, length, [start]).items()}
        inputs = {n: t for n, t in inputs.items() if n in engine.inputs}
        caches = [KVCache(engine.inputs, 2, CAPACITY, engine.device) for _ in range(2)]
        logits = [torch.empty(1, 1, config.vocab_size, device=engine.device) for _ in range(2)]
        for cache, result, graphs, times in zip(caches, logits, (False, True), (1, 3), strict=True):
            engine.cuda_graphs = graphs  # type: ignore[attr-defined]
            for _ in range(times):
                result.fill_(torch.nan)
                fresh = {n: t.clone() if n != "rope_rotary_cos_sin" else t for n, t in inputs.items()}
                engine.run("prefill", {**fresh, **cache.inputs(1, 1)}, {"logits": result, **cache.outputs(1, 1)})
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
        for name, tensor in caches[0].inputs(0, 2).items():
            torch.testing.assert_close(caches[1].inputs(0, 2)[name], tensor, rtol=1e-4, atol=1e-4)
    engine.close()


def test_weights_are_the_checkpoints_own_files(tiny_vlm: Path, tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    source.mkdir()
    for file in tiny_vlm.iterdir():
        if file.is_file():
            (source / file.name).write_bytes(file.read_bytes())
    build(source, tmp_path / "engine", "torch", BuildConfig(max_batch_size=2), {"device": "cpu"})
    assert os.path.samefile(source / "model.safetensors", tmp_path / "engine" / "checkpoint" / "model.safetensors")
    config = read_manifest(tmp_path / "engine")
    assert (config.device, config.dtype, config.limits.max_batch_size) == ("cpu", "float32", 2)
    with (source / "model.safetensors").open("r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"\x01")
    with pytest.raises(EngineDirError, match="has changed since it was built"):
        LLM(tmp_path / "engine")


def test_a_machine_without_the_gpu_is_told_what_to_do(
    engine_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = json.loads((engine_of("torch-cpu") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "device": "cuda"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineDirError, match=r"built for a CUDA GPU.*--option device=cpu"):
        backend("torch").load_decoder(tmp_path, None)


def test_a_wrong_tensor_is_named(engine_of: Callable[[str], Path]) -> None:
    directory = engine_of("torch-cpu")
    engine, config = backend("torch").load_decoder(directory, 1), read_manifest(directory).decoder
    cache = KVCache(engine.inputs, 2, CAPACITY, engine.device)
    inputs = random_inputs(config, 1, 2, [0])
    inputs["context_lengths"] = inputs["context_lengths"].long()
    with pytest.raises(EngineError, match=r"torch failed in prefill: attention_plugin: context_lengths must be \[1\]"):
        engine.run("prefill", {**inputs, **cache.inputs(0, 1)}, {"logits": torch.empty(1, 1, config.vocab_size)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu'; valid values are auto, cuda, cpu"),
        ({"dtype": "int8"}, "dtype is 'int8'; valid values are auto, float32"),
        ({"threads": 2}, "unknown key 'threads'; valid keys are device, dtype"),
    ],
)
def test_bad_options(tiny_vlm: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((BuildError, ConfigError), match=message):
        build(tiny_vlm, tmp_path / "engine", "torch", BuildConfig(), options)
    assert not list(tmp_path.iterdir())


def test_an_onnx_directory_is_no_source(tiny_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="is an ONNX directory; backend torch takes the checkpoint"):
        build(tiny_onnx, tmp_path / "engine", "torch", BuildConfig())
    with pytest.raises(BuildError, match="backend onnxruntime takes no options, but got device"):
        build(tiny_onnx, tmp_path / "engine", "onnxruntime", BuildConfig(), {"device": "cpu"})


def test_options_default_to_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgellm.build.torch_builder import TorchOptions

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert TorchOptions().resolve("bfloat16") == ("cuda", "bfloat16")
    assert TorchOptions(device="cpu").resolve("bfloat16") == ("cpu", "float32")
    assert dataclasses.replace(TorchOptions(), dtype="float16").resolve("bfloat16") == ("cuda", "float16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert TorchOptions().resolve("float16") == ("cpu", "float32")
