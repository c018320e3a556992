"""`LLM` as users import it: over an engine directory, or from a checkpoint, which is built into a cache first."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from edgellm.config import BuildConfig
from edgellm.engine_dir import MANIFEST
from edgellm.errors import ConfigError
from edgellm.runtime import llm as runtime

CACHE_VARIABLE = "EDGELLM_CACHE_DIR"
"""Environment variable that names the cache; by default it is `edgellm` in the user's cache directory."""


class LLM(runtime.LLM):
    """`LLM(engine_dir)`, or `LLM(model=CHECKPOINT, build_config=BuildConfig(...))`.

    With `model` the checkpoint is exported and built for `backend` the first time, and what was built is used again as
    long as the checkpoint's files, the limits, the backend and this package's version stay the same.
    The other options are those of `edgellm.runtime.llm.LLM`.
    """

    def __init__(
        self,
        engine_dir: str | Path | None = None,
        *,
        model: str | Path | None = None,
        build_config: BuildConfig | None = None,
        backend: str = "onnxruntime",
        cache_dir: str | Path | None = None,
        **options: Any,
    ) -> None:
        if (engine_dir is None) == (model is None):
            raise ConfigError("give either an engine directory or model=CHECKPOINT")
        if engine_dir is None:
            assert model is not None
            engine_dir = built_engine(Path(model), build_config or BuildConfig(), backend, cache_dir)
        elif build_config is not None:
            raise ConfigError("build_config goes with model=CHECKPOINT; an engine directory is built already")
        super().__init__(engine_dir, **options)


def built_engine(model: Path, limits: BuildConfig, backend: str, cache_dir: str | Path | None = None) -> Path:
    """The engine directory of a checkpoint in the cache, built if it is not there. Raises what export and build do."""
    from edgellm.build.builder import FROM_CHECKPOINT, build

    cache = Path(cache_dir or os.environ.get(CACHE_VARIABLE) or _user_cache())
    engine = cache / f"{model.resolve().name}-{_fingerprint(model, limits, backend)}"
    if not (engine / MANIFEST).is_file():
        if backend in FROM_CHECKPOINT:
            build(model, engine, backend, limits)
            return engine
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".onnx-", dir=cache) as scratch:
            from edgellm.export.exporter import export

            export(model, Path(scratch) / "onnx")
            build(Path(scratch) / "onnx", engine, backend, limits)
    return engine


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgellm"


def _fingerprint(model: Path, limits: BuildConfig, backend: str) -> str:
    """Changes when anything that the engine depends on does; files count by name, size and time of change."""
    from edgellm import __version__

    files = sorted((str(p.relative_to(model)), p.stat()) for p in model.rglob("*") if p.is_file())
    facts = [
        __version__,
        backend,
        dataclasses.asdict(limits),
        [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files],
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
