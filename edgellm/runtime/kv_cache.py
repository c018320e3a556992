"""The linear KV cache: one slot of full capacity per running request, kept contiguous from slot 0."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from edgellm.engines.base import TensorSpec

SEQUENCE_DIM = "kv_capacity"
"""Name of the sequence dimension in the engine's cache inputs; dimension 0 is the batch."""


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

    def inputs(self, first: int, count: int) -> dict[str, torch.Tensor]:
        """The cache inputs for slots `first` … `first + count − 1`."""
        return {name: t[first : first + count] for name, t in self._tensors.items()}

    def outputs(self, first: int, count: int) -> dict[str, torch.Tensor]:
        """The cache outputs for the same slots: the same memory under the outputs' names."""
        return {"present_" + n.removeprefix("past_"): t for n, t in self.inputs(first, count).items()}

    def move(self, source: int, target: int, length: int) -> None:
        """Slot `target` takes over the first `length` tokens of `source`."""
        for name, tensor in self._tensors.items():
            axis = self._axis[name] - 1
            tensor[target].narrow(axis, 0, length).copy_(tensor[source].narrow(axis, 0, length))
