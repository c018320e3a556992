"""ONNX Runtime on a CPU: graphs run on the caller's tensors through IO binding, without copies."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from edgellm.engines.base import TensorSpec
from edgellm.errors import EngineError

DECODER, VISUAL = "llm.onnx", "visual/visual.onnx"

# onnxruntime's exceptions have no base class of their own.
_ERRORS = tuple(
    getattr(ort_errors, name)
    for name in ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented")
    + ("RuntimeException", "EPFail")
)

_TYPES: dict[str, tuple[torch.dtype, Any]] = {
    "tensor(float)": (torch.float32, np.float32),
    "tensor(int32)": (torch.int32, np.int32),
    "tensor(int64)": (torch.int64, np.int64),
}


class _Bound(NamedTuple):
    """What a name is bound to: most of hundreds of LoRA inputs are the very tensor of the last step."""

    tensor: weakref.ref[torch.Tensor]
    address: tuple[int, torch.Size]


class OnnxRuntimeEngine:
    """One session. A tensor is bound again only when its address or shape has changed since the phase last ran."""

    def __init__(self, path: Path, num_threads: int | None) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads or len(os.sched_getaffinity(0))
        options.inter_op_num_threads = 1
        # A robot's CPU is shared: threads that spin without end between steps take the time that other nodes need, and
        # threads that do not spin at all cost a small model half its speed.
        options.add_session_config_entry("session.intra_op.spin_duration_us", "50")
        try:
            self._session: Any = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except _ERRORS as e:
            raise EngineError(f"onnxruntime cannot load {path}: {_first_line(e)}") from None
        self.inputs = {x.name: _spec(x) for x in self._session.get_inputs()}
        self.outputs = {x.name: _spec(x) for x in self._session.get_outputs()}
        self.device = torch.device("cpu")
        self._element = {x.name: _TYPES[x.type][1] for x in (*self._session.get_inputs(), *self._session.get_outputs())}
        self._bindings: dict[str, tuple[Any, dict[str, _Bound]]] = {}

    def run(self, phase: str, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """See `Engine.run`."""
        if phase not in self._bindings:
            self._bindings[phase] = (self._session.io_binding(), {})
        binding, bound = self._bindings[phase]
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, tensor in tensors.items():
                last = bound.get(name)
                if last is not None and last.tensor() is tensor:
                    continue
                address = (tensor.data_ptr(), tensor.shape)
                if last is None or last.address != address:
                    bind(name, "cpu", 0, self._element[name], tuple(tensor.shape), tensor.data_ptr())
                bound[name] = _Bound(weakref.ref(tensor), address)
        try:
            self._session.run_with_iobinding(binding)
        except _ERRORS as e:
            raise EngineError(f"onnxruntime failed in {phase}: {_first_line(e)}") from None

    def close(self) -> None:
        """See `Engine.close`."""
        self._bindings.clear()
        self._session = None


def load_decoder(directory: Path, num_threads: int | None) -> OnnxRuntimeEngine:
    """The decoder; `num_threads` None means every core this process may use."""
    return OnnxRuntimeEngine(directory / DECODER, num_threads)


def load_visual(directory: Path, num_threads: int | None) -> OnnxRuntimeEngine:
    """The visual encoder; `num_threads` as for the decoder."""
    return OnnxRuntimeEngine(directory / VISUAL, num_threads)


def _spec(argument: Any) -> TensorSpec:
    return TensorSpec(tuple(d if isinstance(d, (int, str)) else "?" for d in argument.shape), _TYPES[argument.type][0])


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
