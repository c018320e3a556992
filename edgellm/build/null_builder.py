"""`edgellm build --backend null`: an engine directory without weights, for tests of what surrounds an engine.

From an ONNX directory or a checkpoint it takes the tokenizer, the chat template and the image preprocessing; `make`
needs neither. What such an engine answers is described in `edgellm/engines/null_engine.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from edgellm.build.source import Source
from edgellm.config import BuildConfig, DecoderConfig, NullConfig, RopeConfig, from_dict
from edgellm.engine_dir import EMBEDDING, NULL_CONFIG, SCHEMA_VERSION, EngineConfig, write_manifest
from edgellm.files import whole_directory, write_json

HIDDEN_SIZE = 1
"""A null engine's embedding of a token is its id."""


def build(source: Source, engine_dir: Path, limits: BuildConfig, options: Mapping[str, Any]) -> None:
    """Write the engine directory; `options` are fields of `NullConfig`. Raises ConfigError for a bad one."""
    null, onnx = from_dict(NullConfig, options, "options of backend null"), source.onnx
    vision = source.limited_vision(limits)
    decoder = _decoder(null.vocab_size or onnx.decoder.vocab_size, onnx.decoder.num_deepstack, vision is not None)
    if vision is not None:
        vision["out_hidden_size"] = HIDDEN_SIZE
    with whole_directory(engine_dir) as out:
        source.copy_text_files(out)
        _write(out, null, decoder, limits, onnx.model_type, vision)


def make(engine_dir: str | Path, limits: BuildConfig | None = None, null: NullConfig | None = None) -> None:
    """Write the engine directory of a text model without a tokenizer (`LLM(..., skip_tokenizer_init=True)`)."""
    null = null or NullConfig(vocab_size=1000)
    with whole_directory(Path(engine_dir)) as out:
        _write(out, null, _decoder(null.vocab_size, 0, multimodal=False), limits or BuildConfig(), "null", None)


def _write(
    out: Path,
    null: NullConfig,
    decoder: DecoderConfig,
    limits: BuildConfig,
    model_type: str,
    vision: dict[str, Any] | None,
) -> None:
    write_json(out / NULL_CONFIG, dataclasses.asdict(null))
    save_file({"weight": torch.arange(decoder.vocab_size, dtype=torch.float32)[:, None]}, out / EMBEDDING)
    write_manifest(
        out,
        EngineConfig(
            schema_version=SCHEMA_VERSION,
            model_type=model_type,
            backend="null",
            backend_version="1",
            device="cpu",
            dtype="float32",
            decoder=decoder,
            limits=limits,
            vision=vision,
            files={},
        ),
    )


def _decoder(vocab_size: int, num_deepstack: int, multimodal: bool) -> DecoderConfig:
    """One layer, one head of one number: the least that has every input of a real decoder."""
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        rms_norm_eps=1e-6,
        rope=RopeConfig(10000.0, 2, (1, 0, 0) if multimodal else None),
        tie_word_embeddings=True,
        num_deepstack=num_deepstack,
    )
