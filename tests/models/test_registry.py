"""Checkpoints that cannot be used end in one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgellm.checkpoint import Checkpoint
from edgellm.errors import CheckpointError
from edgellm.models.registry import load_decoder, load_visual


def _edit(key: str, value: Any) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        config[key] = value
        (directory / "config.json").write_text(json.dumps(config))

    return edit


def _truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "is not a directory"),
        (lambda d: (d / "config.json").unlink(), "config.json does not exist"),
        (lambda d: (d / "config.json").write_text("{"), "config.json cannot be read as JSON"),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors does not exist"),
        (_truncate, "model.safetensors is truncated or damaged"),
        (_edit("model_type", "nobody"), "unknown model_type 'nobody'; known are qwen3, qwen3_vl"),
        (_edit("text_config", {}), "text configuration lacks or misuses"),
        (_edit("vision_config", {"deepstack_visual_indexes": []}), "vision_config lacks or misuses"),
    ],
)
def test_unusable_checkpoint(
    random_vlm: tuple[Any, Path], tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    directory = tmp_path / "checkpoint"
    shutil.copytree(random_vlm[1], directory)
    damage(directory)

    def load() -> None:
        checkpoint = Checkpoint(directory)
        load_visual(checkpoint)
        load_decoder(checkpoint)

    with pytest.raises(CheckpointError, match=message) as caught:
        load()
    assert "\n" not in str(caught.value)
