"""A Hugging Face checkpoint directory: its `config.json` and its tensors, memory-mapped and opened when asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from edgellm.errors import CheckpointError
from edgellm.files import write_json

INDEX = "model.safetensors.index.json"

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
"""Text-side files of a checkpoint that travel to the engine directory; only the first is required."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises CheckpointError when it is missing, broken or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; point to a complete Hugging Face checkpoint directory") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise CheckpointError(f"{path} cannot be read as JSON ({e}); download or copy the checkpoint again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, but holds a {type(value).__name__}")
    return value


class Checkpoint:
    """Weights by name, mapped from disk: a tensor costs no memory of its own until it is copied or converted.

    `hf_config` is the parsed `config.json`. Raises CheckpointError for a missing directory or damaged file.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"checkpoint {self.directory} is not a directory; pass a Hugging Face checkpoint")
        self.hf_config = read_json(self.directory / "config.json")
        if "model_type" not in self.hf_config:
            raise CheckpointError(f"{self.directory / 'config.json'} has no model_type; is this a model checkpoint?")
        self._files = {name: self.directory / file for name, file in self._weight_map().items()}
        self._handles: dict[Path, Any] = {}

    @property
    def model_type(self) -> str:
        """The family, as the checkpoint names it."""
        return str(self.hf_config["model_type"])

    def _weight_map(self) -> dict[str, str]:
        if (self.directory / INDEX).exists():
            index = read_json(self.directory / INDEX).get("weight_map")
            if not isinstance(index, dict):
                raise CheckpointError(f"{self.directory / INDEX} has no weight_map; copy the checkpoint again")
            return index
        return dict.fromkeys(_tensor_names(self.directory / "model.safetensors"), "model.safetensors")

    def names(self) -> Iterator[str]:
        """Names of all tensors."""
        return iter(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def files(self) -> list[Path]:
        """The files that hold the tensors, and the index where there is one."""
        index = [self.directory / INDEX] if (self.directory / INDEX).exists() else []
        return [*index, *sorted(set(self._files.values()))]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name`, mapped from its file; raises CheckpointError when it is not there."""
        if name not in self._files:
            raise CheckpointError(f"checkpoint {self.directory} has no tensor {name!r}; the files are incomplete")
        path = self._files[name]
        if path not in self._handles:
            _tensor_names(path)
            self._handles[path] = safe_open(path, framework="pt")
        tensor: torch.Tensor = self._handles[path].get_tensor(name)
        return tensor


def copy_text_files(checkpoint: Checkpoint, target: Path) -> None:
    """Tokenizer and chat template; end tokens that only `config.json` names are kept in `generation_config.json`."""
    for name in TEXT_FILES:
        if (checkpoint.directory / name).exists():
            shutil.copyfile(checkpoint.directory / name, target / name)
    text_config = checkpoint.hf_config.get("text_config") or {}
    eos = checkpoint.hf_config.get("eos_token_id", text_config.get("eos_token_id"))
    if eos is not None and not (target / "generation_config.json").exists():
        write_json(target / "generation_config.json", {"eos_token_id": eos})


def _tensor_names(path: Path) -> list[str]:
    """Names in a safetensors file, after checking that the file is whole."""
    try:
        with safe_open(path, framework="pt") as f:
            return list(f.keys())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; the checkpoint is incomplete, copy it again") from None
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path} is truncated or damaged ({e}); copy the checkpoint again") from None
