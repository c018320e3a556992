"""Directories that appear whole or not at all, JSON, and checksums."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgellm import progress
from edgellm.errors import ConfigError


@contextlib.contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A fresh directory beside `target`, renamed to it when the block ends without an error, else removed.

    An existing `target` is replaced only if it is empty or its `config.json` is one of ours.
    Raises ConfigError when it is something else or cannot be written.
    """
    if target.exists() and not (target.is_dir() and (_is_ours(target) or not any(target.iterdir()))):
        raise ConfigError(f"{target} exists and was not written by edgellm; name another output directory")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as e:
        raise ConfigError(f"cannot write to {target.parent}: {e.strerror}; name another output directory") from None
    try:
        yield beside
        beside.chmod(0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            os.replace(target, old)
            os.replace(beside, target)
            shutil.rmtree(old)
        else:
            os.replace(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _is_ours(directory: Path) -> bool:
    """Whether the directory has a manifest of ours: a checkpoint has a `config.json` too, without a schema version."""
    try:
        manifest = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and "schema_version" in manifest


def read_text(path: Path) -> str:
    """The content of a text file that the user names. Raises ConfigError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}; name another file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text; name another file") from None


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; the file appears whole. Raises ConfigError when it cannot be written."""
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(beside, path)
    except OSError as e:
        raise ConfigError(f"cannot write {path}: {e.strerror}; name another file") from None


def sha256(directory: Path, names: list[str]) -> dict[str, str]:
    """SHA-256 of each file `names` in `directory`, with progress."""
    digests = {}
    with progress.amount(sum((directory / n).stat().st_size for n in names), f"checking {directory.name}") as bar:
        for name in names:
            digest = hashlib.sha256()
            with (directory / name).open("rb") as f:
                while block := f.read(1 << 22):
                    digest.update(block)
                    bar.update(len(block))
            digests[name] = digest.hexdigest()
    return digests
