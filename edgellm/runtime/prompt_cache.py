"""KV of earlier prompts and turns, reused on the longest exact common prefix.

A prompt's key is one int64 per position: the token id, or for an image's positions numbers made from its content hash,
so that two prompts share a prefix only where they show the same pictures. Keys are compared position by position, never
by a hash alone. The adapter is part of an entry's identity: its KV is of no use to another.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgellm.runtime.kv_cache import SavedSlot
from edgellm.vision.base import PreparedImage

Key = npt.NDArray[np.int64]

_IMAGE_BASE = np.int64(1) << np.int64(62)
"""Numbers of image positions start here, far above any token id."""


def prompt_key(token_ids: Sequence[int], images: Sequence[PreparedImage], image_token_id: int | None) -> Key:
    """The key of an expanded prompt: [S] int64."""
    key = np.asarray(token_ids, dtype=np.int64)
    if not images:
        return key
    numbers = [_image_numbers(image) for image in images]
    key = key.copy()
    key[key == image_token_id] = np.concatenate(numbers)
    return key


def _image_numbers(image: PreparedImage) -> Key:
    digest = hashlib.sha256(image.key.encode()).digest()
    start = np.int64(int.from_bytes(digest[:7], "little"))
    return _IMAGE_BASE + start + np.arange(image.num_tokens, dtype=np.int64)


def common_prefix(a: Key, b: Key) -> int:
    """How many leading positions are equal."""
    shorter = min(len(a), len(b))
    different = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(different[0]) if len(different) else shorter


@dataclass(eq=False)
class Entry:
    """KV of the positions in `key`. A pinned entry, which has a name, is not evicted."""

    key: Key
    adapter: str | None
    slot: SavedSlot
    name: str | None = None


class PromptCache:
    """Entries within a byte budget; the least recently used unpinned ones leave first. Used by one thread."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[int, Entry] = OrderedDict()
        self._counter = 0

    @property
    def nbytes(self) -> int:
        """Memory of all entries."""
        return sum(entry.slot.nbytes for entry in self._entries.values())

    @property
    def entries(self) -> list[Entry]:
        """All entries, least recently used first."""
        return list(self._entries.values())

    def lookup(self, key: Key, adapter: str | None) -> tuple[Entry | None, int]:
        """The entry that shares the longest prefix with `key`, and its length; marks it as used."""
        best, length = None, 0
        for number, entry in self._entries.items():
            if entry.adapter == adapter:
                shared = common_prefix(entry.key, key)
                if shared > length:
                    best, length = number, shared
        if best is None:
            return None, 0
        self._entries.move_to_end(best)
        return self._entries[best], length

    def covers(self, key: Key, adapter: str | None) -> bool:
        """Whether an entry holds all of `key` already."""
        return any(e.adapter == adapter and common_prefix(e.key, key) == len(key) for e in self._entries.values())

    def insert(self, entry: Entry) -> bool:
        """Add an entry and drop unpinned ones that are prefixes of it; False if there is no room for it."""
        for number, other in list(self._entries.items()):
            same = other.adapter == entry.adapter and other.name is None
            if same and common_prefix(other.key, entry.key) == len(other.key):
                del self._entries[number]
        if not self._make_room(entry.slot.nbytes):
            return False
        self._counter += 1
        self._entries[self._counter] = entry
        return True

    def drop(self, name: str) -> bool:
        """Remove the pinned entry `name`; False if there is none."""
        for number, entry in list(self._entries.items()):
            if entry.name == name:
                del self._entries[number]
                return True
        return False

    def clear(self, *, pinned: bool = False) -> None:
        """Remove every unpinned entry, and with `pinned` the others too."""
        for number, entry in list(self._entries.items()):
            if pinned or entry.name is None:
                del self._entries[number]

    def _make_room(self, nbytes: int) -> bool:
        if sum(e.slot.nbytes for e in self._entries.values() if e.name is not None) + nbytes > self.max_bytes:
            return False
        for number, entry in list(self._entries.items()):
            if self.nbytes + nbytes <= self.max_bytes:
                break
            if entry.name is None:
                del self._entries[number]
        return True
