"""`trt::gather_nd`: ONNX GatherND with one batch dimension, for last-token selection.

A standard ONNX node on every backend; it is an operator here so that export writes that one node instead of the index
arithmetic that PyTorch's own gathers become.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from edgellm_plugins.op import Op, Sample, Tolerance, implement, register


def reference(data: torch.Tensor, indices: torch.Tensor, *, batch_dims: int) -> tuple[torch.Tensor, ...]:
    """`data` [B, S, …], `indices` [B, N, 1] int64 → [B, N, …], the positions of each row that its indices name."""
    rows = torch.arange(data.shape[0], device=data.device)[:, None]
    return (data[rows, indices[..., 0]],)


def _fake(data: torch.Tensor, indices: torch.Tensor, *, batch_dims: int) -> tuple[torch.Tensor, ...]:
    return (data.new_empty(*indices.shape[:2], *data.shape[2:]),)


def validate(data: torch.Tensor, indices: torch.Tensor, *, batch_dims: int) -> None:
    """Check shapes and dtypes; raises ValueError naming what was expected and what came."""
    if batch_dims != 1:
        raise ValueError(f"gather_nd: batch_dims must be 1, but is {batch_dims}")
    if indices.dim() != 3 or indices.shape[::2] != (data.shape[0], 1) or indices.dtype != torch.int64:
        raise ValueError(
            f"gather_nd: indices must be [{data.shape[0]}, N, 1] int64, but is {list(indices.shape)} "
            f"{str(indices.dtype)[6:]}"
        )


def samples(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Sample]:
    """One position per row, and several."""
    for label, batch, length, picked in (("last", 3, 7, 1), ("several", 2, 5, 4)):
        device = generator.device
        data = torch.randn(batch, length, 16, generator=generator, device=device).to(dtype)
        indices = torch.randint(length, (batch, picked, 1), generator=generator, device=device)
        yield Sample(label, (data, indices), {"batch_dims": 1})


GATHER_ND = register(
    Op(
        name="gather_nd",
        onnx_type="GatherND",
        onnx_domain="",
        schema="(Tensor data, Tensor indices, *, int batch_dims) -> (Tensor gathered)",
        reference=reference,
        fake=_fake,
        validate=validate,
        samples=samples,
        tolerance=Tolerance({torch.float32: 0.0, torch.float16: 0.0, torch.bfloat16: 0.0}),
    )
)
implement(GATHER_ND, "CUDA", reference)
