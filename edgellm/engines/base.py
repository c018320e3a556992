"""The protocol that every backend implements, and the backends by name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from edgellm.errors import EngineDirError


@dataclass(frozen=True)
class TensorSpec:
    """An engine's input or output: a dimension is a size, or a name where it varies."""

    shape: tuple[int | str, ...]
    dtype: torch.dtype

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every named dimension replaced from `sizes`."""
        return tuple(d if isinstance(d, int) else sizes[d] for d in self.shape)


class Engine(Protocol):
    """A compiled network. Tensors belong to the caller; the engine reads and writes them where they are.

    A decoder takes one row per prefill step, and up to the build's batch size per generation step.

    An output that is the updated form of an input (the KV cache) may be given the input's own tensor.
    """

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    device: torch.device

    def run(self, phase: str, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """Run once; returns when the outputs are ready. Raises EngineError with the backend's reason.

        `phase` names the shape profile: "prefill", "generation" or "encode". Tensors are contiguous and on `device`.
        On a GPU the outputs are ready for what follows in the current stream: the host does not wait.
        """

    def close(self) -> None:
        """Free the network's memory."""


class EngineLoader(Protocol):
    """What a backend's module provides."""

    def load_decoder(self, directory: Path, num_threads: int | None) -> Engine:
        """The decoder of an engine directory."""

    def load_visual(self, directory: Path, num_threads: int | None) -> Engine:
        """The visual encoder of an engine directory."""


_BACKENDS = {
    "null": "edgellm.engines.null_engine",
    "onnxruntime": "edgellm.engines.onnxruntime_engine",
    "torch": "edgellm.engines.torch_engine",
}


def backend(name: str) -> EngineLoader:
    """The loader of a backend; raises EngineDirError that lists the known ones, or says what to install."""
    if name not in _BACKENDS:
        raise EngineDirError(f"engine is for backend {name!r}; this edgellm runs {', '.join(sorted(_BACKENDS))}")
    try:
        loader: EngineLoader = importlib.import_module(_BACKENDS[name])
    except ModuleNotFoundError as e:
        raise EngineDirError(f"backend {name!r} needs the package {e.name!r}; install it with pip") from None
    return loader
