"""A graph in half precision made to compute in fp32, for backends whose kernels are fp32."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def to_float32(model: ir.Model) -> None:
    """Turn every half-precision value of `model` into fp32, in place; weights are converted when they are written."""
    LiftConstantsToInitializersPass()(model)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in _HALF:
            value.const_value = _widened(tensor)
            value.dtype = ir.DataType.FLOAT
    for value in [*model.graph.inputs, *(o for node in model.graph for o in node.outputs)]:
        if value.dtype in _HALF:
            value.dtype = ir.DataType.FLOAT
    for node in list(model.graph):
        if node.op_type == "Cast" and node.attributes["to"].as_int() in (*_HALF, ir.DataType.FLOAT):
            _drop_or_widen_cast(model.graph, node)


def _widened(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    return ir.LazyTensor(
        lambda: ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name,
    )


def _drop_or_widen_cast(graph: ir.Graph, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    if source.dtype == ir.DataType.FLOAT and node.outputs[0] not in graph.outputs:
        node.outputs[0].replace_all_uses_with(source)
        graph.remove(node, safe=True)
    else:
        node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
