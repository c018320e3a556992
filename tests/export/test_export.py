"""The ONNX directory: what it holds, what its graphs look like, and that a failure leaves nothing behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors import safe_open

from edgellm.build.source import read_source
from edgellm.checkpoint import Checkpoint
from edgellm.errors import ConfigError, EdgeLLMError
from edgellm.export.exporter import export


def shapes(values: Any) -> dict[str, list[Any]]:
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def test_decoder_graph(tiny_onnx: Path) -> None:
    model = onnx.load(tiny_onnx / "model.onnx", load_external_data=False)
    config = read_source(tiny_onnx).onnx.decoder
    layers, hidden = config.num_hidden_layers, config.hidden_size
    inputs, outputs = shapes(model.graph.input), shapes(model.graph.output)
    cache = ["batch", 2, config.num_key_value_heads, "kv_capacity", config.head_dim]
    assert inputs == {
        "inputs_embeds": ["batch", "seq_len", hidden],
        **{f"past_key_values_{i}": cache for i in range(layers)},
        "rope_rotary_cos_sin": ["rope_batch", "kv_capacity", config.rope.rotary_dim],
        "context_lengths": ["batch"],
        "kvcache_start_index": ["batch"],
        "last_token_ids": ["batch", "num_selected"],
        **{f"deepstack_embeds_{i}": ["batch", "seq_len", hidden] for i in range(config.num_deepstack)},
    }
    assert outputs == {
        "logits": ["batch", "num_selected", config.vocab_size],
        **{f"present_key_values_{i}": cache for i in range(layers)},
    }
    nodes = [n for n in model.graph.node if n.domain == "trt_edgellm"]
    assert [n.op_type for n in nodes] == ["AttentionPlugin"] * layers
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in nodes[0].attribute}
    assert attributes == pytest.approx(
        {
            "num_q_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "head_size": config.head_dim,
            "qk_norm_eps": config.rms_norm_eps,
        }
    )
    assert not [n for n in model.graph.node if n.op_type == "Transpose"], "weights are stored as the product needs them"
    large = [t for t in model.graph.initializer if t.ByteSize() > 4096]
    assert not large, "weights belong into the external data file"


def test_embedding_and_text_files(tiny_onnx: Path, tiny_vlm: Path) -> None:
    checkpoint = Checkpoint(tiny_vlm)
    with safe_open(tiny_onnx / "embedding.safetensors", framework="pt") as f:
        assert torch.equal(f.get_tensor("weight"), checkpoint.tensor("model.language_model.embed_tokens.weight"))
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tiny_onnx / name).read_bytes() == (tiny_vlm / name).read_bytes()
    assert (tiny_onnx / "visual" / "model.onnx").is_file()


def test_bad_checkpoint_leaves_nothing(tiny_vlm: Path, tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    shutil.copytree(tiny_vlm, source, ignore=shutil.ignore_patterns("lora"))
    (source / "preprocessor_config.json").unlink()
    before = set(tmp_path.iterdir())
    with pytest.raises(EdgeLLMError, match=r"preprocessor_config\.json"):
        export(source, tmp_path / "onnx")
    assert set(tmp_path.iterdir()) == before


def test_never_replaces_what_is_not_ours(tiny_vlm: Path, tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    shutil.copytree(tiny_vlm, target)
    with pytest.raises(ConfigError, match="was not written by edgellm"):
        export(tiny_vlm, target)
    assert (target / "model.safetensors").read_bytes() == (tiny_vlm / "model.safetensors").read_bytes()
