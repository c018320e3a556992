"""A module to an ONNX graph: tracing, the custom operators' nodes, and clean-up that never copies a weight."""

from __future__ import annotations

import functools
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch
from onnxscript import optimizer
from torch import nn

from edgellm import progress
from edgellm.models.layers import ExportSpec
from edgellm_plugins import OPS, Op

OPSET_VERSION = 20
"""ONNX opset of the exported graphs: the newest that TensorRT 10.3's parser knows whole."""

_ONNX_TENSORS = [f"tensor({t})" for t in ("float", "float16", "bfloat16", "int8", "int32", "int64")]
_ATTRIBUTE_TYPES = {
    "int": onnx.defs.OpSchema.AttrType.INT,
    "float": onnx.defs.OpSchema.AttrType.FLOAT,
}


def trace(module: nn.Module, spec: ExportSpec) -> ir.Model:
    """The ONNX graph of `module`.

    Weights stay where they are (mapped from the checkpoint); linear weights become lazily transposed [K, N] views.
    """
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, (), kwargs=spec.inputs, dynamic_shapes=spec.dynamic_shapes)
            converted = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET_VERSION,
                custom_translation_table={op.functional(): _translation(op) for op in OPS.values()},
                output_names=spec.output_names,
                optimize=False,
                verbose=False,
            )
    finally:
        exporter_log.setLevel(level)
    assert converted is not None
    model = converted.model
    _name_dimensions(model, spec)
    _transpose_weights(model)
    optimizer.optimize(model)
    return model


def save(model: ir.Model, path: Path) -> None:
    """Write `model` with its weights beside it in `<name>.data`, tensor by tensor, with progress."""
    total = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    with progress.amount(total, f"writing {path.name}") as bar:
        ir.save(model, path, external_data=f"{path.name}.data", callback=lambda tensor, _: bar.update(tensor.nbytes))


def _translation(op: Op) -> Callable[..., Any]:
    """The function that the exporter calls for a node of `op`: it emits the one ONNX node."""
    emit = onnxscript.values.Op(
        onnxscript.values.Opset(op.onnx_domain, _version(op)), op.onnx_type, op_schema=_schema(op)
    )
    defaults = {a.name: a.default_value for a in op.functional()._schema.arguments if a.kwarg_only}

    def translate(*tensors: Any, **attributes: Any) -> Any:
        return emit(*tensors, **{**defaults, **attributes})

    return translate


def _version(op: Op) -> int:
    return 1 if op.onnx_domain else OPSET_VERSION


def _schema(op: Op) -> onnx.defs.OpSchema:
    """The ONNX schema that corresponds to the torch schema of `op`."""
    if not op.onnx_domain:
        return onnx.defs.get_schema(op.onnx_type, OPSET_VERSION)
    schema, option = op.functional()._schema, onnx.defs.OpSchema.FormalParameterOption
    tensors = [a for a in schema.arguments if not a.kwarg_only]
    parameter = onnx.defs.OpSchema.FormalParameter
    return onnx.defs.OpSchema(
        op.onnx_type,
        op.onnx_domain,
        _version(op),
        inputs=[
            parameter(
                a.name,
                f"T_{a.name}",
                param_option=option.Optional if "Optional" in str(a.type) else option.Single,
            )
            for a in tensors
        ],
        outputs=[parameter(r.name, f"T_{r.name}") for r in schema.returns],
        type_constraints=[(f"T_{x.name}", _ONNX_TENSORS, "any tensor") for x in (*tensors, *schema.returns)],
        attributes=[
            onnx.defs.OpSchema.Attribute(a.name, _ATTRIBUTE_TYPES[str(a.type)], required=True)
            for a in schema.arguments
            if a.kwarg_only
        ],
    )


def _name_dimensions(model: ir.Model, spec: ExportSpec) -> None:
    """Give the tracer's symbols (s0, s18, …) the names of the dimensions they stand for, in every shape.

    Inputs from a dictionary get its keys for names: the tracer makes identifiers of them.
    """
    dims = [d for name in spec.inputs for d in _flat(spec.dynamic_shapes[name])]
    keys = [k for name in spec.inputs for k in _keys(spec.dynamic_shapes[name])]
    for value, key in zip(model.graph.inputs, keys, strict=True):
        value.name = key or value.name
    names = {
        str(value.shape[axis]): dim.__name__
        for value, axes in zip(model.graph.inputs, dims, strict=True)
        for axis, dim in axes.items()
        if value.shape is not None and re.fullmatch(r"s\d+", str(value.shape[axis]))
    }
    for value in [*model.graph.inputs, *(o for node in model.graph for o in node.outputs)]:
        if value.shape is not None and not value.shape.is_static():
            value.shape = ir.Shape(
                [
                    d if isinstance(d, int) else re.sub(r"s\d+", lambda m: names.get(m[0], m[0]), str(d))
                    for d in value.shape
                ]
            )


def _flat(shapes: Any) -> list[dict[int, Any]]:
    """One entry per tensor of an input: it may be a list of tensors, or a dictionary of tensors by name."""
    if isinstance(shapes, list):
        return shapes
    return list(shapes.values()) if _is_named(shapes) else [shapes]


def _keys(shapes: Any) -> list[str | None]:
    """The names that an input's tensors bring, as `_flat` orders them; None for those that bring none."""
    return list(shapes) if _is_named(shapes) else [None] * len(_flat(shapes))


def _is_named(shapes: Any) -> bool:
    return isinstance(shapes, dict) and any(isinstance(key, str) for key in shapes)


def _transpose_weights(model: ir.Model) -> None:
    """Replace each Transpose of a weight by a lazily transposed weight: nothing is copied before it is written."""
    for node in list(model.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight.const_value is None or not weight.is_initializer():
            continue
        tensor: Any = weight.const_value
        shape = ir.Shape([tensor.shape[i] for i in node.attributes["perm"].as_ints()])
        transposed = ir.Value(name=f"{weight.name}.T", shape=shape, type=weight.type)
        transposed.const_value = ir.LazyTensor(
            functools.partial(_transposed, tensor), dtype=tensor.dtype, shape=shape, name=transposed.name
        )
        model.graph.register_initializer(transposed)
        node.outputs[0].replace_all_uses_with(transposed)
        model.graph.remove(node, safe=True)
        if not weight.uses() and weight.name is not None:
            model.graph.initializers.pop(weight.name)


def _transposed(tensor: Any) -> ir.TensorProtocol:
    return ir.tensor(tensor.raw.detach().t(), name=tensor.name)
