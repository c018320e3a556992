"""Prompt cache entries on disk: system prompts and earlier turns that survive a restart of the process.

One safetensors file. Its metadata names the engine, so that KV of another engine is refused, and holds a checksum, so
that a damaged file is found.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from edgellm.engine_dir import EngineConfig
from edgellm.errors import EngineDirError
from edgellm.runtime.kv_cache import SavedSlot
from edgellm.runtime.prompt_cache import Entry

FORMAT_VERSION = 1


def save(path: Path, entries: list[Entry], config: EngineConfig) -> None:
    """Write `entries`; the file appears whole. Raises EngineDirError when it cannot be written."""
    tensors: dict[str, torch.Tensor] = {}
    described = []
    for number, entry in enumerate(entries):
        tensors[f"{number}.key"] = torch.from_numpy(entry.key.copy())
        tensors |= {f"{number}.{name}": t.cpu().contiguous() for name, t in entry.slot.tensors.items()}
        described.append({"adapter": entry.adapter, "name": entry.name, "length": entry.slot.length})
    metadata = {
        "format_version": str(FORMAT_VERSION),
        "engine": fingerprint(config),
        "entries": json.dumps(described),
        "sha256": _checksum(tensors),
    }
    beside = path.with_name(f".{path.name}.part")
    try:
        save_file(tensors, beside, metadata)
        os.replace(beside, path)
    except (OSError, SafetensorError) as e:
        beside.unlink(missing_ok=True)
        raise EngineDirError(f"cannot write the prompt cache {path}: {e}; name another file") from None


def load(path: Path, config: EngineConfig, device: torch.device) -> list[Entry]:
    """The entries in a file; raises EngineDirError when it is missing, damaged or of another engine."""
    try:
        with safe_open(path, framework="pt") as f:
            metadata: dict[str, str] = f.metadata() or {}
            tensors = {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118  (not a dict)
    except FileNotFoundError:
        raise EngineDirError(f"prompt cache {path} does not exist; save one first") from None
    except (OSError, SafetensorError) as e:
        raise EngineDirError(f"prompt cache {path} is damaged ({e}); delete it") from None
    if metadata.get("format_version") != str(FORMAT_VERSION) or metadata.get("engine") != fingerprint(config):
        raise EngineDirError(f"prompt cache {path} was made by another engine or version; delete it and save it again")
    if metadata.get("sha256") != _checksum(tensors):
        raise EngineDirError(f"prompt cache {path} has changed since it was saved; delete it")
    entries = []
    described: list[dict[str, Any]] = json.loads(metadata["entries"])
    for number, facts in enumerate(described):
        prefix = f"{number}."
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        key = own.pop("key").numpy()
        slot = SavedSlot(facts["length"], {name: t.to(device) for name, t in own.items()})
        entries.append(Entry(key, facts["adapter"], slot, facts["name"]))
    return entries


def fingerprint(config: EngineConfig) -> str:
    """Identifies an engine: what it is built from, by checksum."""
    facts = [config.backend, config.dtype, config.model_type, sorted(config.files.items())]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
