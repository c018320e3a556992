"""`edgellm build`: the backend-independent part, which reads the source and picks the backend."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellm.build.source import read_source
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
    module = importlib.import_module(BACKENDS[backend])
    module.build(read_source(directory), target, limits, options or {})
