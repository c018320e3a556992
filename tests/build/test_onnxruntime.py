"""The onnxruntime engine against the model definition: prefill, chunks, batched decode, cache, fp16 weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch

from edgellm.build.builder import build
from edgellm.checkpoint import Checkpoint
from edgellm.config import BuildConfig
from edgellm.engine_dir import read_manifest
from edgellm.engines.base import Engine, backend
from edgellm.errors import BuildError, ConfigError
from edgellm.export.exporter import export
from edgellm.models.layers import EdgeLLMForCausalLM
from edgellm.models.registry import load_decoder, load_visual
from edgellm.runtime.kv_cache import KVCache

CAPACITY = 40
LIMIT = 1e-4


@pytest.fixture(scope="module", params=["tiny", "random"])
def pair(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_vlm: Path,
    random_vlm: tuple[Any, Path],
) -> tuple[Engine, Engine, EdgeLLMForCausalLM, torch.nn.Module]:
    """Decoder and visual engine, and the modules in fp32 that they must equal; tiny has fp16 weights, random fp32."""
    if request.param == "tiny":
        checkpoint, engine = tiny_vlm, request.getfixturevalue("tiny_engine")
    else:
        root = tmp_path_factory.mktemp("random")
        checkpoint, engine = root / "checkpoint", root / "engine"
        shutil.copytree(random_vlm[1], checkpoint)
        for name in ("tokenizer.json", "preprocessor_config.json"):
            shutil.copyfile(tiny_vlm / name, checkpoint / name)
        export(checkpoint, root / "onnx")
        build(root / "onnx", engine, "onnxruntime", BuildConfig())
    loader, source = backend("onnxruntime"), Checkpoint(checkpoint)
    visual = load_visual(source)
    assert visual is not None
    return (
        loader.load_decoder(engine, 1),
        loader.load_visual(engine, 1),
        load_decoder(source).float(),
        visual.float(),
    )


class Bench:
    """The engine and the module on the same inputs, each with its own cache."""

    def __init__(self, engine: Engine, module: EdgeLLMForCausalLM, batch: int) -> None:
        self.engine, self.module, config = engine, module, module.config
        self.table = torch.randn(batch, CAPACITY, config.rope.rotary_dim // 2)
        self.cache = KVCache(engine.inputs, batch, CAPACITY, torch.device("cpu"))
        shape = (batch, 2, config.num_key_value_heads, CAPACITY, config.head_dim)
        self.reference = [torch.zeros(shape) for _ in range(config.num_hidden_layers)]

    def step(self, first: int, starts: list[int], new: int, phase: str) -> float:
        """Run `new` tokens of rows `first`, first + 1, …; returns the largest difference of their logits."""
        rows, config = len(starts), self.module.config
        embeds = torch.randn(rows, new, config.hidden_size) * 0.1
        deepstack = [torch.randn_like(embeds) * 0.1 for _ in range(config.num_deepstack)]
        start = torch.tensor(starts, dtype=torch.int32)
        last = torch.full((rows, 1), new - 1)
        table = self.table[first : first + rows]
        logits = torch.full((rows, 1, config.vocab_size), torch.nan)
        self.engine.run(
            phase,
            {
                "inputs_embeds": embeds,
                "context_lengths": start + new,
                "kvcache_start_index": start,
                "last_token_ids": last,
                "rope_rotary_cos": table.cos(),
                "rope_rotary_sin": table.sin(),
                **{f"deepstack_embeds_{i}": d for i, d in enumerate(deepstack)},
                **self.cache.inputs(first, rows),
            },
            {"logits": logits, **self.cache.outputs(first, rows)},
        )
        expected, _ = self.module(
            embeds,
            [c[first : first + rows] for c in self.reference],
            torch.cat((table.cos(), table.sin()), -1),
            start + new,
            start,
            last,
            deepstack,
        )
        assert expected.abs().max() > 0.1
        return float((logits - expected).abs().max())


def test_prefill_chunks_and_batched_decode(pair: tuple[Engine, Engine, EdgeLLMForCausalLM, Any]) -> None:
    torch.manual_seed(0)
    bench = Bench(pair[0], pair[2], batch=3)
    lengths = [9, 5, 17]
    for row, length in enumerate(lengths):
        assert bench.step(row, [0], length, "prefill") <= LIMIT
    assert bench.step(1, [5], 6, "prefill") <= LIMIT
    lengths[1] += 6
    for _ in range(4):
        assert bench.step(0, lengths, 1, "generation") <= LIMIT
        lengths = [n + 1 for n in lengths]
    assert bench.step(0, lengths[:2], 1, "generation") <= LIMIT
    assert bench.step(2, [lengths[2]], CAPACITY - lengths[2], "prefill") <= LIMIT, "the last slot of the cache"


def test_visual_engine(pair: tuple[Engine, Engine, Any, torch.nn.Module]) -> None:
    _, engine, _, module = pair
    torch.manual_seed(0)
    for patches in (16, 60):
        spec = module.export_spec()
        inputs = {
            name: torch.randint(9, (4, patches))
            if t.dtype == torch.int64
            else torch.randn([patches if i in spec.dynamic_shapes[name] else n for i, n in enumerate(t.shape)])
            for name, t in spec.inputs.items()
        }
        expected = module(**inputs)
        outputs = {n: torch.full_like(e, torch.nan) for n, e in zip(spec.output_names, expected, strict=True)}
        engine.run("encode", inputs, outputs)
        for name, reference in zip(spec.output_names, expected, strict=True):
            assert (outputs[name] - reference).abs().max() <= LIMIT, name


def test_graph_is_fused(tiny_engine: Path, tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    ort.InferenceSession(tiny_engine / "llm.onnx", options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    counts: dict[str, int] = {}
    for node in nodes:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    layers = read_manifest(tiny_engine).decoder.num_hidden_layers
    assert counts["GroupQueryAttention"] == layers
    assert counts["SkipSimplifiedLayerNormalization"] == 2 * layers
    assert counts["SimplifiedLayerNormalization"] == 2 * layers + 1, "norms of queries and keys, and the first"
    assert not {"Cast", "Pow", "ReduceMean", "Transpose"} & {n.op_type for n in nodes if "layers" in n.name}


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"max_input_len": 64, "max_kv_cache_capacity": 64}, "must be below max_kv_cache_capacity"),
        ({"min_image_tokens": 9, "max_image_tokens": 8}, "must not exceed max_image_tokens"),
    ],
)
def test_impossible_limits(limits: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BuildConfig(**limits)


def test_unusable_onnx_directory(tiny_onnx: Path, tiny_vlm: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="unknown backend 'fast'; valid ones are null, onnxruntime, torch"):
        build(tiny_onnx, tmp_path / "engine", "fast", BuildConfig())
    with pytest.raises(BuildError, match="is no ONNX directory"):
        build(tmp_path, tmp_path / "engine", "onnxruntime", BuildConfig())
    with pytest.raises(BuildError, match="is not an ONNX directory"):
        build(tiny_vlm, tmp_path / "engine", "onnxruntime", BuildConfig())
    with pytest.raises(BuildError, match="is both ONNX_DIR and ENGINE_DIR"):
        build(tiny_onnx, tiny_onnx, "onnxruntime", BuildConfig())
    assert not list(tmp_path.iterdir())
