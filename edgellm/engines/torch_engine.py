"""The PyTorch flow: the model definitions of `edgellm/models` on a GPU, or slowly on a CPU, without an ONNX step.

On a GPU a generation step is one CUDA graph, captured when a batch size comes up for the second time and replayed from
then on. A graph reads and writes the caller's tensors where they were when it was captured, so a caller who keeps its
tensors gets one graph per batch size; other addresses get a graph of their own. Prefill runs kernel by kernel, but a
short one (a question after a cached prefix), whose time would be the host's, is padded to a fixed length and is a graph
per slot of the KV cache.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from edgellm.checkpoint import Checkpoint
from edgellm.engine_dir import CHECKPOINT, EngineConfig, read_manifest
from edgellm.engines import static_lora
from edgellm.engines.base import TensorSpec
from edgellm.engines.static_lora import StaticLora
from edgellm.errors import EngineDirError, EngineError
from edgellm.models import registry
from edgellm.models.layers import EdgeLLMForCausalLM, ExportSpec, VisualEncoder

MAX_GRAPHS = 256
"""Captured steps that are kept; the least recently used one goes first."""

SHORT_PREFILL = (16, 64)
"""Prefills of up to so many tokens of one row are padded to this length and captured."""

_PAST, _PRESENT = "past_key_values_", "present_key_values_"

Tensors: TypeAlias = Mapping[str, torch.Tensor]


class TorchEngine:
    """A module and how it is called. With `cuda_graphs` False every step runs kernel by kernel."""

    def __init__(
        self,
        device: torch.device,
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
        forward: Callable[[Tensors, Tensors], None],
        lora: StaticLora | None = None,
    ) -> None:
        self.device = device
        self.inputs = inputs
        self.outputs = outputs
        self.cuda_graphs = device.type == "cuda"
        self._forward = forward
        self._lora = lora
        self._graphs = _Graphs(forward)
        self._buffers: dict[Any, dict[str, torch.Tensor]] = {}

    @torch.inference_mode()
    def run(self, phase: str, inputs: Tensors, outputs: Tensors) -> None:
        """See `Engine.run`."""
        inputs, lora = static_lora.split(inputs)
        with _reported(phase):
            if lora and self._lora is not None and self.cuda_graphs:
                lora = self._lora.place(lora)
            if not self.cuda_graphs or phase == "encode":
                self._forward({**inputs, **lora}, outputs)
            elif phase == "generation":
                self._graphs.run(inputs, outputs, lora)
            else:
                self._prefill(inputs, outputs, lora)

    def _prefill(self, inputs: Tensors, outputs: Tensors, lora: Tensors) -> None:
        rows, length, _ = inputs["inputs_embeds"].shape
        if rows > 1 or length > SHORT_PREFILL[-1]:
            self._forward({**inputs, **lora}, outputs)
            return
        padded = next(n for n in SHORT_PREFILL if length <= n)
        copied = [name for name in inputs if self._is_of_one_step(name)]
        logits = outputs["logits"]
        key = (padded, logits.shape, *(inputs[name].shape[2:] for name in copied))
        if key not in self._buffers:
            buffers = {name: self._padded(name, inputs[name], padded) for name in copied}
            self._buffers[key] = {**buffers, "logits": torch.empty_like(logits)}
        buffers = self._buffers[key]
        for name in copied:
            target = buffers[name][:, :length] if "seq_len" in self.inputs[name].shape else buffers[name]
            target.copy_(inputs[name])
        self._graphs.run(
            {**inputs, **{name: buffers[name] for name in copied}}, {**outputs, "logits": buffers["logits"]}, lora
        )
        logits.copy_(buffers["logits"])

    def _is_of_one_step(self, name: str) -> bool:
        """Whether a caller makes the tensor anew for every prefill, unlike caches and tables."""
        shape = self.inputs[name].shape
        return shape[0] == "batch" and "kv_capacity" not in shape

    def _padded(self, name: str, tensor: torch.Tensor, length: int) -> torch.Tensor:
        if "seq_len" not in self.inputs[name].shape:
            return torch.empty_like(tensor)
        return tensor.new_zeros(tensor.shape[0], length, *tensor.shape[2:])

    def close(self) -> None:
        """See `Engine.close`."""
        self._graphs.clear()
        self._buffers.clear()
        self._forward = _closed


def load_decoder(directory: Path, num_threads: int | None) -> TorchEngine:
    """The decoder; on a CPU `num_threads` sets the threads of the whole process's PyTorch (None: as they are)."""
    config, device, dtype = _placement(directory, num_threads)
    with _reported("loading"):
        module = registry.load_decoder(Checkpoint(directory / CHECKPOINT)).to(device, dtype)
    limits = config.limits
    max_rank = limits.max_lora_rank or 0
    spec = module.export_spec(lora=max_rank > 0)
    inputs = _input_specs(spec)
    outputs = {
        "logits": TensorSpec(("batch", "num_selected", config.decoder.vocab_size), torch.float32),
        **{_present(name): spec for name, spec in inputs.items() if name.startswith(_PAST)},
    }
    lora = StaticLora(inputs, max_rank, limits.max_batch_size, device) if max_rank and device.type == "cuda" else None
    return TorchEngine(device, inputs, outputs, _decoder_forward(module, spec), lora)


def load_visual(directory: Path, num_threads: int | None) -> TorchEngine:
    """The visual encoder; `num_threads` as for the decoder."""
    config, device, dtype = _placement(directory, num_threads)
    with _reported("loading"):
        loaded = registry.load_visual(Checkpoint(directory / CHECKPOINT))
        if loaded is None:
            raise EngineDirError(f"{directory}: a {config.model_type} model has no visual encoder; rebuild the engine")
        module = loaded.to(device, dtype)
    spec = module.export_spec()
    embeds = TensorSpec(("num_image_tokens", config.decoder.hidden_size), dtype)
    outputs = dict.fromkeys(spec.output_names, embeds)
    return TorchEngine(device, _input_specs(spec), outputs, _visual_forward(module, spec))


def _placement(directory: Path, num_threads: int | None) -> tuple[EngineConfig, torch.device, torch.dtype]:
    """Where and in what an engine runs; raises EngineDirError when this machine lacks the device."""
    config = read_manifest(directory)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise EngineDirError(
            f"{directory} was built for a CUDA GPU, and PyTorch {torch.__version__} finds none here; rebuild it with "
            "`edgellm build --backend torch --option device=cpu`"
        )
    if config.device == "cpu" and num_threads is not None:
        torch.set_num_threads(num_threads)
    dtype: torch.dtype = getattr(torch, config.dtype)
    return config, torch.device(config.device), dtype


def _present(past: str) -> str:
    return _PRESENT + past.removeprefix(_PAST)


def _decoder_forward(module: EdgeLLMForCausalLM, spec: ExportSpec) -> Callable[[Tensors, Tensors], None]:
    def forward(inputs: Tensors, outputs: Tensors) -> None:
        arguments = _arguments(inputs, spec)
        caches = [_cache(inputs, outputs, f"{_PAST}{i}") for i in range(len(spec.inputs["past_key_values"]))]
        logits, _ = module(**{**arguments, "past_key_values": caches})
        outputs["logits"].copy_(logits)

    return forward


def _visual_forward(module: VisualEncoder, spec: ExportSpec) -> Callable[[Tensors, Tensors], None]:
    def forward(inputs: Tensors, outputs: Tensors) -> None:
        for name, result in zip(spec.output_names, module(**_arguments(inputs, spec)), strict=True):
            outputs[name].copy_(result)

    return forward


def _cache(inputs: Tensors, outputs: Tensors, past: str) -> torch.Tensor:
    """The tensor that the module updates: the output, which holds what the input held."""
    cache = outputs.get(_present(past), inputs[past])
    if cache.data_ptr() != inputs[past].data_ptr():
        cache.copy_(inputs[past])
    return cache


def _arguments(inputs: Tensors, spec: ExportSpec) -> dict[str, Any]:
    """The module's keyword arguments; those of LoRA only when they are among the inputs."""
    arguments: dict[str, Any] = {}
    for name, example in spec.inputs.items():
        if isinstance(example, list):
            arguments[name] = [inputs[f"{name}_{i}"] for i in range(len(example))]
        elif isinstance(example, dict):
            arguments[name] = {key: inputs[key] for key in example if key in inputs}
        elif name in inputs or name != static_lora.RANK_MASK:
            arguments[name] = inputs[name]
    return arguments


def _input_specs(spec: ExportSpec) -> dict[str, TensorSpec]:
    """The engine's inputs from how the module is traced: a list x is the inputs x_0, x_1, …, a dictionary its keys."""
    specs = {}
    for name, example in spec.inputs.items():
        dynamic = spec.dynamic_shapes[name]
        items = [(name, example, dynamic)]
        if isinstance(example, list):
            items = [(f"{name}_{i}", x, d) for i, (x, d) in enumerate(zip(example, dynamic, strict=True))]
        elif isinstance(example, dict):
            items = [(key, x, dynamic[key]) for key, x in example.items()]
        for key, tensor, dims in items:
            shape = tuple(dims[axis].__name__ if axis in dims else size for axis, size in enumerate(tensor.shape))
            specs[key] = TensorSpec(shape, tensor.dtype)
    return specs


@dataclass(frozen=True)
class _Captured:
    """A graph, and the tensors whose addresses it holds."""

    graph: torch.cuda.CUDAGraph
    tensors: tuple[torch.Tensor, ...]


class _Graphs:
    """Steps captured as CUDA graphs, by the addresses and shapes of their tensors."""

    def __init__(self, forward: Callable[[Tensors, Tensors], None]) -> None:
        self._forward = forward
        self._captured: OrderedDict[Any, _Captured | None] = OrderedDict()
        self._pool: Any = None

    def run(self, inputs: Tensors, outputs: Tensors, lora: Tensors) -> None:
        """Replay the step; the first time it runs as it is, which also loads what its kernels need.

        The tensors of `lora`, if any, are always the same.
        """
        tensors = (*inputs.values(), *outputs.values())
        key = bool(lora), *[(t.data_ptr(), t.shape) for t in tensors]
        if key not in self._captured:
            self._forward({**inputs, **lora}, outputs)
            self._captured[key] = None
            if len(self._captured) > MAX_GRAPHS:
                self._captured.popitem(last=False)
            return
        captured = self._captured[key]
        if captured is None:
            captured = self._captured[key] = _Captured(self._capture({**inputs, **lora}, outputs), tensors)
        self._captured.move_to_end(key)
        captured.graph.replay()

    def _capture(self, inputs: Tensors, outputs: Tensors) -> torch.cuda.CUDAGraph:
        """Record the step without running it. All graphs share one pool of memory: only one runs at a time."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._forward(inputs, outputs)
        return graph

    def clear(self) -> None:
        """Forget every graph."""
        self._captured.clear()
        self._forward = _closed


@contextlib.contextmanager
def _reported(phase: str) -> Iterator[None]:
    """PyTorch's failures (out of memory, a kernel's error, a wrong shape) as one line."""
    try:
        yield
    except (RuntimeError, ValueError) as e:
        first_line = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise EngineError(f"torch failed in {phase}: {first_line}") from e


def _closed(inputs: Tensors, outputs: Tensors) -> None:
    raise EngineError("the engine has been closed; load it again")
