"""`edgellm build`: the backend-independent part, which reads the source and picks the backend."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellm.build.source import Source, read_source
from edgellm.config import BuildConfig
from edgellm.errors import BuildError

BACKENDS = {
    "null": "edgellm.build.null_builder",
    "onnxruntime": "edgellm.build.onnxruntime_builder",
    "torch": "edgellm.build.torch_builder",
}
"""Backend → the module whose `build` writes its engine directory, imported when chosen."""


def build(
    source: str | Path,
    engine_dir: str | Path,
    backend: str,
    limits: BuildConfig,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Build an engine directory from an ONNX directory (null, onnxruntime) or a checkpoint (null, torch).

    `options` are the backend's own: the fields of `NullConfig`, or of `TorchOptions` in `torch_builder`.
    Raises BuildError, ConfigError or CheckpointError, each one line.
    """
    if backend not in BACKENDS:
        raise BuildError(f"unknown backend {backend!r}; valid ones are {', '.join(sorted(BACKENDS))}")
    directory, target = Path(source), Path(engine_dir)
    if directory.resolve() == target.resolve():
        raise BuildError(f"{directory} is both ONNX_DIR and ENGINE_DIR; name another engine directory")
    module, read = importlib.import_module(BACKENDS[backend]), read_source(directory)
    module.build(read, target, _with_lora_rank(limits, read), options or {})


def _with_lora_rank(limits: BuildConfig, source: Source) -> BuildConfig:
    """The limits with a LoRA rank: of an ONNX directory at most what it was exported for, which is also the default."""
    exported = source.onnx.max_lora_rank
    rank = exported if limits.max_lora_rank is None else limits.max_lora_rank
    if source.checkpoint is None and rank > exported:
        raise BuildError(
            f"max_lora_rank is {rank}, but the checkpoint was exported for {exported}; export it again with "
            f"`edgellm export --max-lora-rank {rank}`"
        )
    return dataclasses.replace(limits, max_lora_rank=rank)
