"""The engine directory's manifest: what was changed after the build is found before anything runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgellm import LLM
from edgellm.engine_dir import read_manifest, verify
from edgellm.errors import EngineDirError


@pytest.fixture
def engine(tiny_engine: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_engine, tmp_path / "engine")
    return tmp_path / "engine"


def _edit(key: str, value: Any) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        values = json.loads((directory / "config.json").read_text())
        values[key] = value
        (directory / "config.json").write_text(json.dumps(values))

    return edit


def _flip_a_bit(directory: Path) -> None:
    path = directory / "llm.onnx.data"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "does not exist"),
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "cannot be read"),
        (_edit("schema_version", 99), "has schema version 99, this edgellm reads 1"),
        (_edit("wheels", 4), "unknown key 'wheels'; valid keys are"),
        (_edit("backend", "abacus"), "engine is for backend 'abacus'; this edgellm runs onnxruntime"),
        (lambda d: (d / "visual" / "visual.onnx").unlink(), r"visual/visual\.onnx is missing"),
        (_flip_a_bit, r"llm\.onnx\.data has changed since it was built"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), r"tokenizer\.json has changed since it was built"),
    ],
)
def test_damaged_engine(engine: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(engine)
    with pytest.raises(EngineDirError, match=message) as caught:
        LLM(engine)
    assert "\n" not in str(caught.value)


def test_manifest_names_every_file(engine: Path) -> None:
    config = read_manifest(engine)
    files = {str(p.relative_to(engine)) for p in engine.rglob("*") if p.is_file()} - {"config.json"}
    assert set(config.files) == files
    verify(engine, config)
