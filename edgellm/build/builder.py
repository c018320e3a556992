"""`edgellm build`: the backend-independent part, which reads the ONNX directory and picks the backend."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

from edgellm.config import ONNX_SCHEMA_VERSION, BuildConfig, OnnxConfig, from_dict
from edgellm.errors import BuildError

BACKENDS = {"onnxruntime": "edgellm.build.onnxruntime_builder"}
"""Backend → the module whose `build` writes its engine directory, imported when chosen."""


def build(onnx_dir: str | Path, engine_dir: str | Path, backend: str, limits: BuildConfig) -> None:
    """Build the ONNX directory into an engine directory; raises BuildError or ConfigError, each one line."""
    if backend not in BACKENDS:
        raise BuildError(f"unknown backend {backend!r}; valid ones are {', '.join(sorted(BACKENDS))}")
    source, target = Path(onnx_dir), Path(engine_dir)
    if source.resolve() == target.resolve():
        raise BuildError(f"{source} is both ONNX_DIR and ENGINE_DIR; name another engine directory")
    onnx = read_onnx_config(source)
    importlib.import_module(BACKENDS[backend]).build(source, onnx, target, _with_lora_rank(limits, onnx))


def _with_lora_rank(limits: BuildConfig, onnx: OnnxConfig) -> BuildConfig:
    """The limits with the LoRA rank that the graph was exported for where none was asked for."""
    rank = onnx.max_lora_rank if limits.max_lora_rank is None else limits.max_lora_rank
    if rank > onnx.max_lora_rank:
        raise BuildError(
            f"max_lora_rank is {rank}, but the checkpoint was exported for {onnx.max_lora_rank}; export it again with "
            f"`edgellm export --max-lora-rank {rank}`"
        )
    return dataclasses.replace(limits, max_lora_rank=rank)


def read_onnx_config(directory: Path) -> OnnxConfig:
    """The manifest of an ONNX directory, checked; raises BuildError or ConfigError."""
    path = directory / "config.json"
    export = "make it with `edgellm export`"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BuildError(f"{path} does not exist, so {directory} is no ONNX directory; {export}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise BuildError(f"{path} cannot be read ({e}); {export}") from None
    if not isinstance(values, dict) or values.get("schema_version") != ONNX_SCHEMA_VERSION or "backend" in values:
        raise BuildError(f"{path} is not an ONNX directory of this edgellm; {export}")
    return from_dict(OnnxConfig, values, str(path))
