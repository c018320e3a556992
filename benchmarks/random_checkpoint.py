"""A Hugging Face checkpoint of random weights, written tensor by tensor, for measuring speed without a download.

The architecture is transformers' `Qwen3ForCausalLM` with tied embeddings. The same seed gives the same file.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

BOS, EOS = 0, 1
FIRST_TOKEN = 2
"""The lowest token id that is no special token."""


@dataclass(frozen=True)
class Shape:
    """Dimensions of a Qwen3 decoder."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int

    @property
    def num_parameters(self) -> int:
        """Parameters, the tied embedding counted once: what one decode step reads."""
        return sum(math.prod(shape) for _, shape in tensors(self))


SHAPES = {
    "qwen3-0.6b": Shape(1024, 28, 16, 8, 128, 3072, 151936),
    "qwen3-tiny": Shape(256, 6, 4, 2, 64, 768, 2048),
}


def write(directory: Path, shape: Shape, max_positions: int, seed: int = 0, dtype: str = "float32") -> None:
    """Write config.json, model.safetensors in `dtype`, tokenizer and generation config into an existing directory."""
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": max_positions,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": BOS})
    _write_tokenizer(directory)
    _write_weights(directory / "model.safetensors", shape, seed, np.dtype(dtype))


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the checkpoint's tensors."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    query, key = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab_size, hidden)
    for i in range(shape.num_hidden_layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.self_attn.q_proj.weight", (query, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (key, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (key, hidden)
        yield f"{layer}.self_attn.q_norm.weight", (shape.head_dim,)
        yield f"{layer}.self_attn.k_norm.weight", (shape.head_dim,)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, query)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)


def _write_weights(path: Path, shape: Shape, seed: int, dtype: np.dtype[np.floating[Any]]) -> None:
    """Safetensors: an 8-byte header length, a JSON header, then the tensors. Only one tensor is in memory at a time."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dims in tensors(shape):
        start, end = end, end + dtype.itemsize * math.prod(dims)
        header[name] = {"dtype": f"F{8 * dtype.itemsize}", "shape": dims, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, dims in tensors(shape):
            noise = random.standard_normal(dims, dtype=np.float32)
            noise *= np.float32(0.1 if name.endswith("norm.weight") else 0.02)
            if name.endswith("norm.weight"):
                noise += np.float32(1)
            noise.astype(dtype).tofile(file)


def _write_tokenizer(directory: Path) -> None:
    """One token per byte; the tools that read a checkpoint want a tokenizer, the benchmark does not use it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = {"<bos>": BOS, "<eos>": EOS}
    vocabulary = specials | {c: i for i, c in enumerate(alphabet, FIRST_TOKEN)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(list(specials))
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"},
    )


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
