"""Export with LoRA inputs: their names, shapes and place, and the ranks that export and build agree on."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from edgellm.build.builder import build, read_onnx_config
from edgellm.config import BuildConfig
from edgellm.engine_dir import read_manifest
from edgellm.errors import BuildError, ConfigError, ExportError
from edgellm.export.exporter import export


def test_every_linear_layer_of_the_decoder_takes_a_and_b(lora_engine: Path) -> None:
    directory = lora_engine.parent / "onnx"
    config = read_onnx_config(directory)
    assert config.max_lora_rank == 32
    hidden, inner, size = config.decoder.hidden_size, config.decoder.intermediate_size, config.decoder.head_dim
    wide, narrow = config.decoder.num_attention_heads * size, config.decoder.num_key_value_heads * size
    shapes = {
        "self_attn.q_proj": (hidden, wide),
        "self_attn.k_proj": (hidden, narrow),
        "self_attn.v_proj": (hidden, narrow),
        "self_attn.o_proj": (wide, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    expected = {"lora_rank_mask": ["batch", "lora_rank"]}
    for i in range(config.decoder.num_hidden_layers):
        for name, (k, m) in shapes.items():
            expected[f"model.layers.{i}.{name}.lora_A.weight"] = [k, "lora_rank"]
            expected[f"model.layers.{i}.{name}.lora_B.weight"] = ["lora_rank", m]
    graph = onnx.load(directory / "model.onnx", load_external_data=False).graph
    inputs = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    assert {name: shape for name, shape in inputs.items() if "lora" in name} == expected


def test_ranks_of_export_and_build(lora_engine: Path, tiny_onnx: Path, tiny_vlm: Path, tmp_path: Path) -> None:
    assert read_manifest(lora_engine).limits.max_lora_rank == 32
    onnx_dir = lora_engine.parent / "onnx"
    build(onnx_dir, tmp_path / "engine", "onnxruntime", BuildConfig(max_lora_rank=8))
    assert read_manifest(tmp_path / "engine").limits.max_lora_rank == 8
    with pytest.raises(BuildError, match="exported for 32; export it again with `edgellm export --max-lora-rank 64`"):
        build(onnx_dir, tmp_path / "other", "onnxruntime", BuildConfig(max_lora_rank=64))
    with pytest.raises(BuildError, match="exported for 0"):
        build(tiny_onnx, tmp_path / "other", "onnxruntime", BuildConfig(max_lora_rank=8))
    with pytest.raises(ExportError, match="max_lora_rank is -1"):
        export(tiny_vlm, tmp_path / "other", max_lora_rank=-1)
    with pytest.raises(ConfigError, match="max_lora_rank is -1"):
        BuildConfig(max_lora_rank=-1)
    assert {p.name for p in tmp_path.iterdir()} == {"engine"}
