"""LoRA inputs where a captured step can read them: fixed tensors of the engine's largest rank.

A step's adapters are other tensors of another rank whenever another set of adapters is in the batch, but a captured
graph reads fixed addresses. So the weights of the set in use are copied into tensors of the engine's own, once for each
change of the set. Columns beyond the set's rank hold leftovers, which the rank mask multiplies by zero.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch

from edgellm.engines.base import TensorSpec
from edgellm.errors import EngineError

RANK_MASK, RANK = "lora_rank_mask", "lora_rank"


def split(inputs: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The inputs without LoRA, and those of LoRA: none when no row of the step uses an adapter."""
    if RANK_MASK not in inputs:
        return dict(inputs), {}
    base = {name: tensor for name, tensor in inputs.items() if ".lora_" not in name and name != RANK_MASK}
    if inputs[RANK_MASK].shape[1] == 0:
        return base, {}
    return base, {name: tensor for name, tensor in inputs.items() if name not in base}


class StaticLora:
    """The fixed tensors of one engine, for up to `max_batch_size` rows and adapters of `max_rank` together."""

    def __init__(
        self, specs: Mapping[str, TensorSpec], max_rank: int, max_batch_size: int, device: torch.device
    ) -> None:
        sizes = {RANK: max_rank, "batch": max_batch_size}
        lora = {name: spec for name, spec in specs.items() if RANK in spec.shape}
        self._rank_axis = {name: spec.shape.index(RANK) for name, spec in lora.items() if name != RANK_MASK}
        self._max_rank = max_rank
        self._tensors = {n: torch.zeros(s.resolve(sizes), dtype=s.dtype, device=device) for n, s in lora.items()}
        self._placed: weakref.ref[torch.Tensor] | None = None

    def place(self, lora: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The step's LoRA inputs as the fixed tensors, after copying into them what has changed.

        A set of adapters comes as a whole: the same tensors for the same set. Raises EngineError for too high a rank.
        """
        rows, rank = lora[RANK_MASK].shape
        if rank > self._max_rank:
            raise EngineError(f"the batch's adapters have rank {rank} together, this engine takes {self._max_rank}")
        some_weight = lora[next(iter(self._rank_axis))]
        if self._placed is None or self._placed() is not some_weight:
            targets = [self._tensors[name].narrow(axis, 0, rank) for name, axis in self._rank_axis.items()]
            torch._foreach_copy_(targets, [lora[name] for name in self._rank_axis])
            self._placed = weakref.ref(some_weight)
        mask = self._tensors[RANK_MASK][:rows]
        mask[:, :rank].copy_(lora[RANK_MASK])
        mask[:, rank:].zero_()
        return {**self._tensors, RANK_MASK: mask}
