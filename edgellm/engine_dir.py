"""The engine directory: the one place where offline tools and the runtime meet. Its manifest is `config.json`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellm.config import BuildConfig, DecoderConfig, from_dict
from edgellm.errors import ConfigError, EngineDirError
from edgellm.files import sha256, write_json

SCHEMA_VERSION = 1
"""Version of the manifest; a change that an older runtime could misread raises it."""

MANIFEST = "config.json"
EMBEDDING = "embedding.safetensors"

CHECKPOINT = "checkpoint"
"""Folder of a torch engine: the checkpoint's own `config.json` and weights."""

NULL_CONFIG = "null.json"
"""File of a null engine: a `NullConfig`."""


@dataclass(frozen=True)
class EngineConfig:
    """The manifest of an engine directory.

    `dtype` is what the engine computes in. `vision` holds the image preprocessing of the family's visual runner, None
    for a text model. `files` maps every other file, relative to the directory, to its SHA-256.
    """

    schema_version: int
    model_type: str
    backend: str
    backend_version: str
    device: str
    dtype: str
    decoder: DecoderConfig
    limits: BuildConfig
    vision: dict[str, Any] | None
    files: dict[str, str]


def write_manifest(directory: Path, config: EngineConfig) -> None:
    """Write `config` with the checksums of every file in `directory` (`config.files` is replaced)."""
    names = sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)
    complete = dataclasses.replace(config, files=sha256(directory, names))
    write_json(directory / MANIFEST, dataclasses.asdict(complete))


def read_manifest(directory: Path) -> EngineConfig:
    """The manifest, checked; raises EngineDirError for a missing, damaged or foreign one."""
    path = directory / MANIFEST
    rebuild = "rebuild it with `edgellm build`"
    if not directory.is_dir():
        raise EngineDirError(f"engine directory {directory} does not exist; make it with `edgellm build`")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EngineDirError(f"{directory} has no {MANIFEST}, so it is no engine directory; {rebuild}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise EngineDirError(f"{path} cannot be read ({e}); {rebuild}") from None
    if not isinstance(values, dict) or "backend" not in values:
        raise EngineDirError(f"{path} is not an engine's manifest; pass the output of `edgellm build`")
    version = values.get("schema_version")
    if version != SCHEMA_VERSION:
        raise EngineDirError(f"{path} has schema version {version}, this edgellm reads {SCHEMA_VERSION}; {rebuild}")
    try:
        return from_dict(EngineConfig, values, str(path))
    except (ConfigError, TypeError) as e:
        raise EngineDirError(f"{e}; {rebuild}") from None


def verify(directory: Path, config: EngineConfig) -> None:
    """Check that every file is there and unchanged; raises EngineDirError naming the first that is not."""
    rebuild = "rebuild the engine with `edgellm build`"
    for name in config.files:
        if not (directory / name).is_file():
            raise EngineDirError(f"{directory / name} is missing; {rebuild}")
    actual = sha256(directory, list(config.files))
    for name, digest in config.files.items():
        if actual[name] != digest:
            raise EngineDirError(f"{directory / name} has changed since it was built; {rebuild}")
