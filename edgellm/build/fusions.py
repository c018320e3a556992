"""Rewrites of a graph into ONNX Runtime's fused operators: RMSNorm, and residual addition with the RMSNorm after it."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern, rewrite

_CONTRIB = "com.microsoft"


def fuse(model: ir.Model) -> None:
    """Apply the rewrites to an fp32 `model`, in place."""
    rewrite(model, pattern_rewrite_rules=[_RMS_NORM])
    rewrite(model, pattern_rewrite_rules=[_SKIP_RMS_NORM])
    model.opset_imports.setdefault(_CONTRIB, 1)


def _rms_norm(op: Any, x: Any, weight: Any, epsilon: Any) -> Any:
    variance = op.ReduceMean(op.Pow(x, 2.0), [-1], keepdims=1)
    return op.Mul(weight, op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(variance, epsilon)))))


def _simplified_layer_norm(op: Any, x: ir.Value, weight: ir.Value, epsilon: ir.Value) -> Any:
    assert epsilon.const_value is not None
    value = float(epsilon.const_value.numpy())
    return op.SimplifiedLayerNormalization(x, weight, axis=-1, epsilon=value, stash_type=1)


def _add_then_norm(op: Any, x: Any, residual: Any, weight: Any) -> Any:
    total = op.Add(x, residual)
    return op.SimplifiedLayerNormalization(total, weight, axis=-1, _outputs=["normed"]), total


def _skip_simplified_layer_norm(op: Any, x: ir.Value, residual: ir.Value, weight: ir.Value, normed: ir.Value) -> Any:
    node = normed.producer()
    assert node is not None
    normed_and_sum = op.SkipSimplifiedLayerNormalization(
        x, residual, weight, epsilon=node.attributes["epsilon"].as_float(), _domain=_CONTRIB, _outputs=4
    )
    return normed_and_sum[0], normed_and_sum[3]


_RMS_NORM = pattern.RewriteRule(_rms_norm, _simplified_layer_norm)
_SKIP_RMS_NORM = pattern.RewriteRule(_add_then_norm, _skip_simplified_layer_norm)
