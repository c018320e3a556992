"""Rotary position tables: row p of a slot holds the cosines and sines of the token at cache index p.

Which position the token at an index has (one number for text, three for images) is decided here, so the engine needs
only the index.
"""

from __future__ import annotations

import torch

from edgellm.config import RopeConfig


def cos_sin(positions: torch.Tensor, config: RopeConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [S, R/2] fp32 of `positions`: [S] for text, [3, S] (time, height, width) for multimodal RoPE.

    Multimodal frequencies are interleaved as in Qwen3-VL: of three neighbours the second turns with the height and the
    third with the width, as far as `mrope_section` reaches; the rest turn with time.
    """
    frequencies = 1.0 / config.theta ** (
        torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=positions.device) / config.rotary_dim
    )
    angles = positions.float()[..., None] * frequencies
    if config.mrope_section is not None:
        time, height, width = angles
        angles = time.clone()
        for axis, other in ((1, height), (2, width)):
            picked = slice(axis, 3 * config.mrope_section[axis], 3)
            angles[:, picked] = other[:, picked]
    return angles.cos(), angles.sin()


class RopeTable:
    """The engine's table inputs: one table for all slots (text) or one per slot (multimodal).

    `names` are the engine's input names, ("rope_rotary_cos_sin",) or ("rope_rotary_cos", "rope_rotary_sin").
    """

    def __init__(
        self, config: RopeConfig, names: tuple[str, ...], max_batch_size: int, capacity: int, device: torch.device
    ) -> None:
        self._config = config
        self._capacity = capacity
        self._shared = config.mrope_section is None
        rows = 1 if self._shared else max_batch_size
        width = config.rotary_dim // (1 if len(names) == 1 else 2)
        self._tensors = {name: torch.zeros(rows, capacity, width, device=device) for name in names}
        if self._shared:
            self._write(0, torch.arange(capacity, device=device))

    def set_slot(self, slot: int, positions_3S: torch.Tensor | None, next_position: int) -> None:
        """Fill a slot: the prompt's positions (None for text), then `next_position` and its successors."""
        if self._shared:
            return
        prompt = positions_3S if positions_3S is not None else torch.arange(next_position).expand(3, -1)
        rest = torch.arange(next_position, next_position + self._capacity - prompt.shape[1]).expand(3, -1)
        self._write(slot, torch.cat((prompt, rest), dim=1))

    def move(self, source: int, target: int) -> None:
        """Slot `target` takes over what `source` holds."""
        if not self._shared:
            for tensor in self._tensors.values():
                tensor[target] = tensor[source]

    def inputs(self, first: int, count: int) -> dict[str, torch.Tensor]:
        """The table inputs for slots `first` … `first + count − 1`."""
        return self._tensors if self._shared else {k: t[first : first + count] for k, t in self._tensors.items()}

    def _write(self, slot: int, positions: torch.Tensor) -> None:
        targets = list(self._tensors.values())
        tables = cos_sin(positions.to(targets[0].device), self._config)
        for target, values in zip(targets, tables if len(targets) == 2 else (torch.cat(tables, -1),), strict=True):
            target[slot] = values
