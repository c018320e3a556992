"""The linear KV cache: one slot of full capacity per running request, kept contiguous from slot 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from edgellm.engines.base import TensorSpec

SEQUENCE_DIM = "kv_capacity"
"""Name of the sequence dimension in the engine's cache inputs; dimension 0 is the batch."""


@dataclass(frozen=True, eq=False)
class SavedSlot:
    """A copy of the first `length` tokens of a slot, outside the cache."""

    length: int
    tensors: dict[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return sum(t.nbytes for t in self.tensors.values())


class KVCache:
    """Owns the tensors behind the engine's inputs `past_*`; the outputs `present_*` are the same memory."""

    def __init__(
        self, inputs: Mapping[str, TensorSpec], max_batch_size: int, capacity: int, device: torch.device
    ) -> None:
        specs = {name: spec for name, spec in inputs.items() if name.startswith("past_")}
        sizes = {"batch": max_batch_size, SEQUENCE_DIM: capacity}
        self._tensors = {n: torch.zeros(s.resolve(sizes), dtype=s.dtype, device=device) for n, s in specs.items()}
        self._axis = {name: spec.shape.index(SEQUENCE_DIM) for name, spec in specs.items()}

    @property
    def nbytes(self) -> int:
        """Memory of the whole cache in bytes."""
        return sum(t.nbytes for t in self._tensors.values())

    @property
    def bytes_per_token(self) -> int:
        """Memory of one token in one slot."""
        return sum(t[0].nbytes // t.shape[self._axis[n]] for n, t in self._tensors.items())

    def inputs(self, first: int, count: int) -> dict[str, torch.Tensor]:
        """The cache inputs for slots `first` … `first + count − 1`."""
        return {name: t[first : first + count] for name, t in self._tensors.items()}

    def outputs(self, first: int, count: int) -> dict[str, torch.Tensor]:
        """The cache outputs for the same slots: the same memory under the outputs' names."""
        return {"present_" + n.removeprefix("past_"): t for n, t in self.inputs(first, count).items()}

    def move(self, source: int, target: int, length: int) -> None:
        """Slot `target` takes over the first `length` tokens of `source`."""
        for name, tensor in self._tensors.items():
            self._tokens(name, tensor, target, length).copy_(self._tokens(name, tensor, source, length))

    def save(self, slot: int, length: int) -> SavedSlot:
        """A copy of the slot's first `length` tokens."""
        return SavedSlot(length, {n: self._tokens(n, t, slot, length).clone() for n, t in self._tensors.items()})

    def restore(self, slot: int, saved: SavedSlot, length: int) -> None:
        """Put the first `length` tokens of `saved` into the slot."""
        for name, tensor in self._tensors.items():
            part = saved.tensors[name].narrow(self._axis[name] - 1, 0, length)
            self._tokens(name, tensor, slot, length).copy_(part)

    def _tokens(self, name: str, tensor: torch.Tensor, slot: int, length: int) -> torch.Tensor:
        return tensor[slot].narrow(self._axis[name] - 1, 0, length)
