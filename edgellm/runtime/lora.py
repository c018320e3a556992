"""The LoRA adapters of a loaded engine: which are there, and what a batch whose rows use different ones needs.

Shape letters: B rows of a step, K and M a linear layer's inputs and outputs, R the ranks of a step's different adapters
together. The adapters of a step are concatenated along R, and a mask [B, R] keeps each row to its own columns.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from edgellm.engines.base import TensorSpec
from edgellm.errors import LoraError, RequestError
from edgellm.lora import AdapterWeights, read_adapter

RANK_MASK = "lora_rank_mask"
"""The engine's input that says which columns are a row's own."""

_A, _B = ".lora_A.weight", ".lora_B.weight"

_CACHED_SETS = 8
"""Concatenations of several adapters that are kept for when the same adapters meet again."""


class LoraAdapter:
    """A loaded adapter. A request holds the object, so it ends with the weights that it began with.

    `digest` tells different weights apart, whatever their names (a prompt cache's key); `tensors` are the engine's
    inputs for this adapter alone, of the rank `rank` in every layer.
    """

    def __init__(self, name: str, order: int, weights: AdapterWeights, tensors: dict[str, torch.Tensor]) -> None:
        self.name = name
        self.order = order
        self.rank = weights.rank
        self.digest = weights.digest
        self.base_model = weights.base_model
        self.tensors = tensors
        self.loaded = True

    @property
    def nbytes(self) -> int:
        """Memory of the weights."""
        return sum(t.nbytes for t in self.tensors.values())


class LoraManager:
    """The adapters of one engine. `inputs` is for the engine's thread, the rest for any.

    Unloading takes an adapter's name away at once; requests that run or wait with it keep it, and its memory is free
    once the last of them and the step after it have ended.
    """

    def __init__(self, inputs: Mapping[str, TensorSpec], max_rank: int, device: torch.device) -> None:
        self.max_rank = max_rank
        self._device = device
        self._specs = {name: spec for name, spec in inputs.items() if name.endswith((_A, _B))}
        self._mask_dtype = inputs[RANK_MASK].dtype if RANK_MASK in inputs else torch.float32
        self._adapters: dict[str, LoraAdapter] = {}
        self._default: str | None = None
        self._lock = threading.Lock()
        self._orders = itertools.count()
        self._none = {name: self._zeros(spec, 0) for name, spec in self._specs.items()}
        self._sets: OrderedDict[tuple[LoraAdapter, ...], dict[str, torch.Tensor]] = OrderedDict()
        self._last: tuple[tuple[LoraAdapter | None, ...], dict[str, torch.Tensor]] | None = None

    def load(self, name: str, path: str | Path) -> LoraAdapter:
        """Read an adapter (a PEFT directory or a converted file) and make it available as `name`.

        Raises LoraError for files or features that cannot be used, or an adapter that does not fit this engine.
        """
        if not self._specs or not self.max_rank:
            raise LoraError(
                "this engine takes no LoRA adapters; export the checkpoint with `edgellm export --max-lora-rank R` and "
                "build it again"
            )
        if not name:
            raise LoraError("an adapter's name must not be empty")
        self._refuse_if_loaded(name)
        weights = read_adapter(Path(path))
        tensors = self._checked(name, weights)
        with self._lock:
            order = next(self._orders)
        adapter = LoraAdapter(name, order, weights, tensors)
        with self._lock:
            self._refuse_if_loaded(name)
            self._adapters[name] = adapter
        return adapter

    def unload(self, name: str) -> None:
        """Take the adapter away from new requests; raises LoraError for an unknown name or the default adapter."""
        with self._lock:
            if name not in self._adapters:
                raise LoraError(f"there is no adapter {name!r} to unload; {self._known()}")
            if name == self._default:
                raise LoraError(f"adapter {name!r} is the default; set another default, or none, before unloading it")
            self._adapters.pop(name).loaded = False

    def list(self) -> list[LoraAdapter]:
        """The adapters that requests can name, in the order of their loading."""
        with self._lock:
            return [*self._adapters.values()]

    @property
    def default(self) -> str | None:
        """Name of the adapter for requests that name none; None if that is the base model."""
        return self._default

    def set_default(self, name: str | None) -> None:
        """The adapter for requests that name none; None is the base model. Raises LoraError for an unknown name."""
        with self._lock:
            if name is not None and name not in self._adapters:
                raise LoraError(f"there is no adapter {name!r}; {self._known()}")
            self._default = name

    def get(self, name: str | None) -> LoraAdapter | None:
        """The adapter that a request asks for: None is the default, "" the base model.

        Raises RequestError for an unknown name.
        """
        with self._lock:
            wanted = self._default if name is None else name
            if not wanted:
                return None
            if wanted not in self._adapters:
                raise RequestError(f"there is no LoRA adapter {wanted!r}; {self._known()}")
            return self._adapters[wanted]

    def fits(self, running: Iterable[LoraAdapter | None], new: LoraAdapter | None) -> bool:
        """Whether a request with `new` may join rows with the adapters `running`: their ranks have a common limit."""
        return sum(a.rank for a in {*running, new} if a is not None) <= self.max_rank

    def inputs(self, rows: Sequence[LoraAdapter | None]) -> dict[str, torch.Tensor]:
        """The engine's LoRA inputs for a step whose row i uses `rows[i]`; empty for an engine without LoRA.

        The same tensors come back while the rows stay the same.
        """
        if not self._specs:
            return {}
        key = tuple(rows)
        if self._last is None or self._last[0] != key:
            chosen = tuple(sorted({a for a in key if a is not None}, key=lambda a: a.order))
            self._last = key, {**self._weights(chosen), RANK_MASK: self._mask(chosen, key)}
        return self._last[1]

    def _weights(self, chosen: tuple[LoraAdapter, ...]) -> dict[str, torch.Tensor]:
        for adapters in [s for s in self._sets if not all(a.loaded for a in s)]:
            del self._sets[adapters]
        if len(chosen) < 2:
            return chosen[0].tensors if chosen else self._none
        if chosen in self._sets:
            self._sets.move_to_end(chosen)
            return self._sets[chosen]
        weights = {
            name: torch.cat([a.tensors[name] for a in chosen], dim=1 if name.endswith(_A) else 0)
            for name in self._specs
        }
        if all(a.loaded for a in chosen):
            self._sets[chosen] = weights
        if len(self._sets) > _CACHED_SETS:
            self._sets.popitem(last=False)
        return weights

    def _mask(self, chosen: Sequence[LoraAdapter], rows: Sequence[LoraAdapter | None]) -> torch.Tensor:
        """Ones in the columns of each row's own adapter."""
        columns = [a for a in chosen for _ in range(a.rank)]
        own = [[float(column is row) for column in columns] for row in rows]
        return torch.tensor(own, dtype=self._mask_dtype, device=self._device).view(len(rows), len(columns))

    def _checked(self, name: str, weights: AdapterWeights) -> dict[str, torch.Tensor]:
        """The engine's inputs for this adapter alone; layers that it leaves out, or gives a lower rank, get zeros."""
        made_for = f" (it says it was made for {weights.base_model})" if weights.base_model else ""
        if weights.rank > self.max_rank:
            raise LoraError(
                f"adapter {name!r} has rank {weights.rank}, this engine takes up to {self.max_rank}; export the "
                f"checkpoint with --max-lora-rank {weights.rank} and build it again"
            )
        for module, (a_KR, b_RM) in weights.matrices.items():
            if module + _A not in self._specs:
                raise LoraError(
                    f"adapter {name!r} has weights for {module}, which this model does not have; was it made for "
                    f"another base model{made_for}?"
                )
            expected = self._specs[module + _A].shape[0], self._specs[module + _B].shape[1]
            if (a_KR.shape[0], b_RM.shape[1]) != expected:
                raise LoraError(
                    f"adapter {name!r}: {module} is {a_KR.shape[0]} -> {b_RM.shape[1]}, this model's is "
                    f"{expected[0]} -> {expected[1]}; was it made for another base model{made_for}?"
                )
        tensors = {}
        for input_name, spec in self._specs.items():
            tensors[input_name] = self._zeros(spec, weights.rank)
            pair = weights.matrices.get(input_name.removesuffix(_A).removesuffix(_B))
            if pair is not None:
                matrix = pair[0] if input_name.endswith(_A) else pair[1]
                tensors[input_name][: matrix.shape[0], : matrix.shape[1]] = matrix
        return tensors

    def _zeros(self, spec: TensorSpec, rank: int) -> torch.Tensor:
        shape = [d if isinstance(d, int) else rank for d in spec.shape]
        return torch.zeros(shape, dtype=spec.dtype, device=self._device)

    def _refuse_if_loaded(self, name: str) -> None:
        if name in self._adapters:
            raise LoraError(f"adapter {name!r} is already loaded; unload it first, or choose another name")

    def _known(self) -> str:
        return f"loaded are {', '.join(sorted(self._adapters))}" if self._adapters else "none is loaded"
