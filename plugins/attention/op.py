"""`trt::attention_plugin`: optional QK-norm, rotary embedding, KV-cache write, causal grouped-query attention.

Shape letters: B batch, S new tokens per row (padded), Hq query heads, Hkv key/value heads, D head size, C cache
capacity in tokens, R rotary dimensions (R ≤ D).

Row b holds `kvcache_start_index[b]` tokens in its cache before the call and `context_lengths[b]` after it; the new
tokens are the first `context_lengths[b] − kvcache_start_index[b]` of its S, the rest is padding whose output is zero
and whose keys and values are not written. New token s sits at cache slot p = start + s, is rotated by row p of the
cosine and sine cache, and attends to slots 0…p. Prefill, chunked prefill and decode are this one rule at different S
and start.

The semantics follow the AttentionPlugin that TensorRT Edge-LLM documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from edgellm_plugins.op import Op, Sample, Tolerance, register

_SCHEMA = (
    "(Tensor qkv, Tensor kv_cache, Tensor context_lengths, Tensor rope_rotary_cos_sin, Tensor kvcache_start_index, "
    "Tensor? q_norm_weight=None, Tensor? k_norm_weight=None, "
    "*, int num_q_heads, int num_kv_heads, int head_size, float qk_norm_eps=1e-6) -> (Tensor attention, Tensor present)"
)


def reference(
    qkv: torch.Tensor,
    kv_cache: torch.Tensor,
    *tensors: Any,
    **attributes: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference_in_place` on a copy of the cache: returns the attention [B, S, Hq, D] and the updated cache."""
    present = kv_cache.clone()
    (attention,) = reference_in_place(qkv, present, *tensors, **attributes)
    return attention, present


def reference_in_place(
    qkv: torch.Tensor,
    kv_cache: torch.Tensor,
    context_lengths: torch.Tensor,
    rope_rotary_cos_sin: torch.Tensor,
    kvcache_start_index: torch.Tensor,
    q_norm_weight: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_size: int,
    qk_norm_eps: float = 1e-6,
) -> tuple[torch.Tensor]:
    """Plain PyTorch, row by row; computes in the inputs' dtype, rotation and softmax in at least fp32.

    `qkv` [B, S, (Hq+2·Hkv)·D], `kv_cache` [B, 2, Hkv, C, D], `context_lengths` and `kvcache_start_index` [B] int32,
    `rope_rotary_cos_sin` [1|B, C, R] fp32 (cosines, then sines), norm weights [D].
    Writes the new keys and values into the cache and returns the attention [B, S, Hq, D].
    """
    batch, length, _ = qkv.shape
    q, k, v = qkv.split([num_q_heads * head_size, num_kv_heads * head_size, num_kv_heads * head_size], dim=-1)
    q_BSHD = q.reshape(batch, length, num_q_heads, head_size)
    k_BSHD = k.reshape(batch, length, num_kv_heads, head_size)
    v_BSHD = v.reshape(batch, length, num_kv_heads, head_size)
    if q_norm_weight is not None and k_norm_weight is not None:
        q_BSHD = torch.nn.functional.rms_norm(q_BSHD, (head_size,), q_norm_weight, qk_norm_eps)
        k_BSHD = torch.nn.functional.rms_norm(k_BSHD, (head_size,), k_norm_weight, qk_norm_eps)
    attention = qkv.new_zeros(batch, length, num_q_heads, head_size)
    for row, (start, end) in enumerate(zip(kvcache_start_index.tolist(), context_lengths.tolist(), strict=True)):
        new = end - start
        cos_sin = rope_rotary_cos_sin[row if rope_rotary_cos_sin.shape[0] > 1 else 0, start:end]
        kv_cache[row, 0, :, start:end] = rotate(k_BSHD[row, :new], cos_sin).transpose(0, 1)
        kv_cache[row, 1, :, start:end] = v_BSHD[row, :new].transpose(0, 1)
        q_HSD = rotate(q_BSHD[row, :new], cos_sin).transpose(0, 1)
        attention[row, :new] = _causal_attention(q_HSD, kv_cache[row, 0, :, :end], kv_cache[row, 1, :, :end])
    return (attention,)


def rotate(x_SHD: torch.Tensor, cos_sin_SR: torch.Tensor) -> torch.Tensor:
    """Rotate the first R dimensions of each head, pairing dimension i with i + R/2 (the GPT-NeoX form).

    Su et al., RoFormer, 2021 (arXiv:2104.09864).
    """
    half = cos_sin_SR.shape[-1] // 2
    compute = torch.promote_types(x_SHD.dtype, torch.float32)
    cos, sin = cos_sin_SR.to(compute)[:, None, :].split(half, dim=-1)
    x1, x2, rest = x_SHD.to(compute).split([half, half, x_SHD.shape[-1] - 2 * half], dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest), dim=-1).to(x_SHD.dtype)


def _causal_attention(q_HSD: torch.Tensor, k_HTD: torch.Tensor, v_HTD: torch.Tensor) -> torch.Tensor:
    """The last S of T positions attend to themselves and everything before; returns [S, Hq, D]."""
    new, total = q_HSD.shape[1], k_HTD.shape[1]
    group = q_HSD.shape[0] // k_HTD.shape[0]
    k_HTD, v_HTD = k_HTD.repeat_interleave(group, 0), v_HTD.repeat_interleave(group, 0)
    compute = torch.promote_types(q_HSD.dtype, torch.float32)
    scores = (q_HSD @ k_HTD.transpose(-1, -2)).to(compute) * q_HSD.shape[-1] ** -0.5
    future = torch.ones(new, total, dtype=torch.bool, device=q_HSD.device).triu(total - new + 1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1).to(v_HTD.dtype)
    return (weights @ v_HTD).transpose(0, 1)


def _fake(
    qkv: torch.Tensor, kv_cache: torch.Tensor, *rest: Any, num_q_heads: int, head_size: int, **attributes: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], num_q_heads, head_size), torch.empty_like(kv_cache)


def _expect(name: str, condition: bool, expected: str, tensor: torch.Tensor) -> None:
    if not condition:
        raise ValueError(
            f"attention_plugin: {name} must be {expected}, but is {list(tensor.shape)} {str(tensor.dtype)[6:]}"
        )


def validate(
    qkv: torch.Tensor,
    kv_cache: torch.Tensor,
    context_lengths: torch.Tensor,
    rope_rotary_cos_sin: torch.Tensor,
    kvcache_start_index: torch.Tensor,
    q_norm_weight: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_size: int,
    qk_norm_eps: float = 1e-6,
) -> None:
    """Check shapes and dtypes; raises ValueError naming the tensor, what was expected and what came."""
    width = (num_q_heads + 2 * num_kv_heads) * head_size
    _expect("qkv", qkv.dim() == 3 and qkv.shape[-1] == width, f"[B, S, {width}]", qkv)
    batch = qkv.shape[0]
    shape = (batch, 2, num_kv_heads, head_size)
    cache_ok = kv_cache.dim() == 5 and (*kv_cache.shape[:3], kv_cache.shape[4]) == shape
    _expect("kv_cache", cache_ok, f"[{batch}, 2, {num_kv_heads}, C, {head_size}]", kv_cache)
    _expect("kv_cache", kv_cache.dtype == qkv.dtype, f"of qkv's dtype {str(qkv.dtype)[6:]}", kv_cache)
    capacity = kv_cache.shape[3]
    for name, lengths in (("context_lengths", context_lengths), ("kvcache_start_index", kvcache_start_index)):
        _expect(name, lengths.shape == (batch,) and lengths.dtype == torch.int32, f"[{batch}] int32", lengths)
    rope = rope_rotary_cos_sin
    rope_ok = rope.dim() == 3 and rope.shape[0] in (1, batch) and rope.shape[1] >= capacity
    rope_ok = rope_ok and rope.shape[2] % 2 == 0 and rope.shape[2] <= head_size
    _expect("rope_rotary_cos_sin", rope_ok, f"[1 or {batch}, {capacity}, even and ≤ {head_size}]", rope)
    if num_q_heads % num_kv_heads:
        raise ValueError(
            f"attention_plugin: num_q_heads ({num_q_heads}) must be a multiple of num_kv_heads ({num_kv_heads})"
        )
    for name, weight in (("q_norm_weight", q_norm_weight), ("k_norm_weight", k_norm_weight)):
        if weight is not None:
            _expect(name, weight.shape == (head_size,), f"[{head_size}]", weight)


def samples(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Sample]:
    """Random inputs at odd sizes: prefill, chunked prefill, decode, unequal rows, partial rotary, full capacity."""
    cases = [  # label, heads (q, kv), head size, rotary dims, S, capacity, start indices, lengths, shared rope, norm
        ("prefill", (4, 2), 64, 64, 7, 33, [0], [7], True, False),
        ("prefill_unequal", (6, 2), 64, 64, 9, 17, [0, 0, 0], [9, 1, 4], False, True),
        ("chunked_prefill", (8, 8), 128, 128, 5, 31, [11, 3], [16, 8], True, True),
        ("decode", (16, 2), 80, 80, 1, 65, [64, 0, 17], [65, 1, 18], False, False),
        ("partial_rotary", (3, 1), 96, 32, 3, 12, [2, 9], [5, 12], True, False),
        ("full_capacity", (4, 4), 256, 256, 13, 13, [0], [13], True, True),
    ]

    def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=generator.device).to(dtype)

    for label, (q_heads, kv_heads), size, rotary, length, capacity, start, end, shared, norm in cases:
        batch = len(start)
        angles = normal(1 if shared else batch, capacity, rotary // 2, dtype=torch.float32)
        lengths = [torch.tensor(x, dtype=torch.int32, device=generator.device) for x in (end, start)]
        yield Sample(
            label,
            (
                normal(batch, length, (q_heads + 2 * kv_heads) * size),
                normal(batch, 2, kv_heads, capacity, size),
                lengths[0],
                torch.cat((angles.cos(), angles.sin()), -1),
                lengths[1],
                *((1 + 0.1 * normal(size), 1 + 0.1 * normal(size)) if norm else (None, None)),
            ),
            {"num_q_heads": q_heads, "num_kv_heads": kv_heads, "head_size": size, "qk_norm_eps": 1e-6},
        )


ATTENTION = register(
    Op(
        name="attention_plugin",
        onnx_type="AttentionPlugin",
        schema=_SCHEMA,
        reference=reference,
        fake=_fake,
        validate=validate,
        samples=samples,
        tolerance=Tolerance({torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}),
        updates={1: "kv_cache"},
        reference_in_place=reference_in_place,
    )
)
