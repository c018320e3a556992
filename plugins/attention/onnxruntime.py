"""Lowering of `AttentionPlugin` to ONNX Runtime's `GroupQueryAttention` (CPU).

What differs from the node's own inputs and outputs:

- the KV cache [B, 2, Hkv, C, D] becomes `past_key_i`, `past_value_i` → `present_key_i`, `present_value_i`
  [B, Hkv, C, D]; bound to one address, the operator writes in place;
- `rope_rotary_cos_sin` [1|B, C, R] becomes `rope_rotary_cos` and `rope_rotary_sin` [1|B, C, R/2], which the operator
  reads as one table of rows that position ids pick (row b's own rows when the table has one per batch row);
- QK-norm runs before it: the CPU operator refuses norm weights.

GroupQueryAttention takes more than one new token per row only for a single row (B = 1) without padding, so prefill runs
row by row; decode takes any B. These limits were measured on ONNX Runtime 1.31.
"""

from __future__ import annotations

import onnx_ir as ir

from edgellm_plugins.attention.op import ATTENTION

_CONTRIB = "com.microsoft"


def lower(model: ir.Model) -> int:
    """Replace every AttentionPlugin node of `model`, which computes in fp32; returns how many there were."""
    graph = model.graph
    nodes = [n for n in graph if n.op_type == ATTENTION.onnx_type and n.domain == ATTENTION.onnx_domain]
    if not nodes:
        return 0
    shared = _shared_inputs(graph, nodes[0])
    for index, node in enumerate(nodes):
        _lower_node(graph, node, index, *shared)
    graph.inputs.remove(next(v for v in graph.inputs if v.name == "rope_rotary_cos_sin"))
    model.opset_imports[_CONTRIB] = 1
    model.opset_imports.pop(ATTENTION.onnx_domain, None)
    return len(nodes)


class _Writer:
    """Appends nodes in front of `anchor`."""

    def __init__(self, graph: ir.Graph, anchor: ir.Node) -> None:
        self.graph, self.anchor = graph, anchor

    def __call__(
        self, op_type: str, *inputs: ir.Value | None, domain: str = "", num_outputs: int = 1, **attributes: object
    ) -> ir.Value:
        return self.many(op_type, *inputs, domain=domain, num_outputs=num_outputs, **attributes)[0]

    def many(
        self, op_type: str, *inputs: ir.Value | None, domain: str = "", num_outputs: int = 1, **attributes: object
    ) -> list[ir.Value]:
        node = ir.node(op_type, inputs, attributes or None, domain=domain, num_outputs=num_outputs)  # type: ignore[arg-type]
        self.graph.insert_before(self.anchor, node)
        return list(node.outputs)

    def ints(self, *values: int) -> ir.Value:
        return self("Constant", value_ints=list(values))


def _shared_inputs(graph: ir.Graph, first: ir.Node) -> tuple[ir.Value, ...]:
    """What all layers share: seqlens_k, total_sequence_length, cosines, sines, position ids."""
    _, _, lengths, rope, start = first.inputs[:5]
    if lengths is None or rope is None or rope.shape is None or start is None:
        raise ValueError(f"{first.name}: AttentionPlugin lacks an input")
    batch, capacity, rotary = rope.shape
    assert isinstance(rotary, int), "the number of rotary dimensions is fixed by the model"
    half = rotary // 2
    tables = []
    for name in ("rope_rotary_cos", "rope_rotary_sin"):
        table = ir.Value(name=name, shape=ir.Shape([batch, capacity, half]), type=ir.TensorType(ir.DataType.FLOAT))
        graph.inputs.append(table)
        tables.append(table)
    write = _Writer(graph, graph.node(0))
    one = write("Constant", value=ir.tensor([1], ir.DataType.INT32))
    seqlens_k = write("Sub", lengths, one)
    total = write("ReduceMax", lengths, keepdims=0)
    zero, step = write("Constant", value_int=0), write("Constant", value_int=1)
    embeds = next(v for v in graph.inputs if v.name == "inputs_embeds")
    new_tokens = write("Squeeze", write("Shape", embeds, start=1, end=2))
    rows = write("Range", zero, write("Squeeze", write("Shape", lengths)), step)
    table_rows = write("Mod", rows, write("Shape", tables[0], start=0, end=1))
    offset = write("Mul", table_rows, write("Shape", tables[0], start=1, end=2))
    first_position = write("Add", write("Cast", start, to=ir.DataType.INT64), offset)
    positions = write("Add", write("Unsqueeze", first_position, write.ints(1)), write("Range", zero, new_tokens, step))
    flat = [write("Reshape", t, write.ints(-1, half)) for t in tables]
    return seqlens_k, total, *flat, positions


def _lower_node(
    graph: ir.Graph,
    node: ir.Node,
    index: int,
    seqlens_k: ir.Value,
    total: ir.Value,
    cos: ir.Value,
    sin: ir.Value,
    positions: ir.Value,
) -> None:
    qkv, cache, _, _, _, q_weight, k_weight = (*node.inputs, None, None)[:7]
    heads_q, heads_kv, size = (node.attributes[k].as_int() for k in ("num_q_heads", "num_kv_heads", "head_size"))
    if qkv is None or cache is None or cache.shape is None:
        raise ValueError(f"{node.name}: AttentionPlugin lacks an input")
    write = _Writer(graph, node)
    packed = qkv.producer()
    if packed is not None and packed.op_type == "Concat":
        query, key, value = packed.inputs
    else:
        widths = write.ints(heads_q * size, heads_kv * size, heads_kv * size)
        query, key, value = write.many("Split", qkv, widths, num_outputs=3, axis=-1)
    if q_weight is not None and k_weight is not None:
        epsilon = node.attributes["qk_norm_eps"].as_float()
        query = _head_norm(write, query, q_weight, heads_q, size, epsilon)
        key = _head_norm(write, key, k_weight, heads_kv, size, epsilon)
    shape = ir.Shape([cache.shape[0], heads_kv, cache.shape[3], size])
    fp32 = ir.TensorType(ir.DataType.FLOAT)
    past = [ir.Value(name=f"past_{kind}_{index}", shape=shape, type=fp32) for kind in ("key", "value")]
    output, *present = write.many(
        "GroupQueryAttention",
        query,
        key,
        value,
        *past,
        seqlens_k,
        total,
        cos,
        sin,
        positions,
        domain=_CONTRIB,
        num_outputs=3,
        num_heads=heads_q,
        kv_num_heads=heads_kv,
        do_rotary=1,
    )
    for kind, result in zip(("key", "value"), present, strict=True):
        result.name, result.shape, result.type = f"present_{kind}_{index}", shape, fp32
    _replace_output(graph, node, output, write, heads_q, size)
    graph.inputs.extend(past)
    graph.outputs[graph.outputs.index(node.outputs[1])] = present[0]
    graph.outputs.insert(graph.outputs.index(present[0]) + 1, present[1])
    graph.remove(node, safe=True)
    if packed is not None and packed.op_type == "Concat" and not packed.outputs[0].uses():
        graph.remove(packed, safe=True)
    graph.inputs.remove(cache)


def _head_norm(write: _Writer, x: ir.Value | None, weight: ir.Value, heads: int, size: int, epsilon: float) -> ir.Value:
    """RMSNorm of each head of [B, S, heads·D]."""
    split = write("Reshape", x, write.ints(0, 0, heads, size))
    normed = write("SimplifiedLayerNormalization", split, weight, axis=-1, epsilon=epsilon, stash_type=1)
    return write("Reshape", normed, write.ints(0, 0, heads * size))


def _replace_output(graph: ir.Graph, node: ir.Node, output: ir.Value, write: _Writer, heads: int, size: int) -> None:
    """GroupQueryAttention gives [B, S, Hq·D]: what the model's own Reshape would make of [B, S, Hq, D]."""
    users = list(node.outputs[0].uses())
    flatten = users[0].node if len(users) == 1 and users[0].node.op_type == "Reshape" else None
    if flatten is not None and flatten.outputs[0].shape is not None and len(flatten.outputs[0].shape) == 3:
        output.shape, output.type = flatten.outputs[0].shape, ir.TensorType(ir.DataType.FLOAT)
        flatten.outputs[0].replace_all_uses_with(output)
        graph.remove(flatten, safe=True)
    else:
        node.outputs[0].replace_all_uses_with(write("Reshape", output, write.ints(0, 0, heads, size)))
