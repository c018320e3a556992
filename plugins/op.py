"""What an operator is: one declaration from which the torch custom op, its ONNX node and its tests are made.

A room `plugins/<op>/op.py` builds one `Op`. `register` gives torch two operators of it in the namespace `trt`:
`<name>`, functional (the form that `torch.export` and ONNX need), and, when an output stands for an argument updated in
place, `<name>_`, which writes into that argument (the form that an engine runs, without a copy).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

NAMESPACE = "trt"
"""Namespace of the operators in `torch.ops`."""

ONNX_DOMAIN = "trt_edgellm"
"""Domain of the operators' ONNX nodes. TensorRT's parser finds a plugin by node type and ignores the domain."""

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


Kernel: TypeAlias = "Callable[..., tuple[torch.Tensor, ...]]"
"""An implementation: tensors (or None) by position and attributes by keyword, to the outputs."""


@dataclass(frozen=True)
class Tolerance:
    """Largest relative error ‖out − reference‖ / ‖reference‖ that an implementation may show, per dtype."""

    relative: Mapping[torch.dtype, float]


@dataclass(frozen=True)
class Sample:
    """One set of inputs: positional tensors (or None) and the operator's attributes."""

    label: str
    tensors: tuple[torch.Tensor | None, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Op:
    """An operator's declaration.

    `schema` is the torch schema without the name; tensor arguments come first, attributes are keyword-only.
    `reference` is a readable functional implementation in plain PyTorch, which is also the CPU implementation;
    `reference_in_place`, where given, is the same computation as the in-place twin, without its copies.
    `fake` gives the outputs' shapes and dtypes without computing them.
    `onnx_type` and `onnx_domain` ("" for a standard operator) name the node that export writes, with the attributes.
    `updates` maps an output's index to the argument which that output is the updated form of.
    `validate` checks shapes and dtypes, once, and raises ValueError naming the tensor, what was expected and what came.
    """

    name: str
    onnx_type: str
    schema: str
    reference: Kernel
    fake: Kernel
    validate: Callable[..., None]
    samples: Callable[[torch.Generator, torch.dtype], Iterator[Sample]]
    tolerance: Tolerance
    updates: Mapping[int, str] = field(default_factory=dict)
    reference_in_place: Kernel | None = None
    onnx_domain: str = ONNX_DOMAIN

    def functional(self) -> Any:
        """The functional torch operator (`torch.ops.trt.<name>.default`)."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default

    def tensor_names(self) -> list[str]:
        """Names of the tensor inputs, in order."""
        return [a.name for a in self.functional()._schema.arguments if not a.kwarg_only]

    def attribute_names(self) -> list[str]:
        """Names of the attributes, in order."""
        return [a.name for a in self.functional()._schema.arguments if a.kwarg_only]


def register(op: Op) -> Op:
    """Define `op` in `torch.ops.trt`, with its fake function and its reference as the CPU kernel; returns `op`."""
    _LIBRARY.define(f"{op.name}{op.schema}")

    def fake(*tensors: Any, **attributes: Any) -> Any:
        return _one_or_all(op.fake(*tensors, **attributes))

    def fake_in_place(*tensors: Any, **attributes: Any) -> Any:
        return _one_or_all(tuple(o for i, o in enumerate(op.fake(*tensors, **attributes)) if i not in op.updates))

    torch.library.register_fake(f"{NAMESPACE}::{op.name}", fake, lib=_LIBRARY)
    if op.updates:
        _define_in_place(op)
        torch.library.register_fake(f"{NAMESPACE}::{op.name}_", fake_in_place, lib=_LIBRARY)
    implement(op, "CPU", op.reference, op.reference_in_place)
    return op


def implement(op: Op, device: str, functional: Kernel, in_place: Kernel | None = None) -> None:
    """Make these the kernels of `op` on a device ("CPU", "CUDA"), behind the check of shapes and dtypes.

    `in_place` writes into the arguments that `op.updates` names and returns the other outputs; without it the in-place
    twin copies the results of `functional` there.
    """

    def checked(kernel: Kernel) -> Callable[..., Any]:
        def run(*tensors: Any, **attributes: Any) -> Any:
            op.validate(*tensors, **attributes)
            return _one_or_all(kernel(*tensors, **attributes))

        return run

    _LIBRARY.impl(op.name, checked(functional), device)
    if op.updates:
        _LIBRARY.impl(f"{op.name}_", checked(in_place or _copying(op, functional)), device)


def _copying(op: Op, functional: Kernel) -> Kernel:
    """The in-place twin made of a functional kernel."""
    names = op.tensor_names()
    updated = {index: names.index(name) for index, name in op.updates.items()}

    def in_place(*tensors: Any, **attributes: Any) -> tuple[torch.Tensor, ...]:
        outputs = functional(*tensors, **attributes)
        for output, argument in updated.items():
            tensors[argument].copy_(outputs[output])
        return tuple(o for i, o in enumerate(outputs) if i not in updated)

    return in_place


def _define_in_place(op: Op) -> None:
    """Define `<name>_`: updated arguments are marked as written to; the outputs that they stand for are left out."""
    arguments, results = op.schema.split("->")
    for letter, name in zip("abcdef", op.updates.values(), strict=False):
        arguments = arguments.replace(f"Tensor {name}", f"Tensor({letter}!) {name}", 1)
    kept = [r.strip() for i, r in enumerate(results.strip(" ()").split(",")) if i not in op.updates]
    _LIBRARY.define(f"{op.name}_{arguments}-> ({', '.join(kept)})")


def _one_or_all(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """As the dispatcher wants it: a schema with one result returns the tensor itself."""
    return outputs[0] if len(outputs) == 1 else outputs
