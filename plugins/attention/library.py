"""AttentionPlugin on CUDA through PyTorch's own attention kernels: the kernel of the torch engine.

Shapes are static and nothing is read back to the host, so that a decode step can be captured in a CUDA graph; what a
row holds comes from `context_lengths` and `kvcache_start_index` on the device. Two ways through:

- flash attention with the keys' lengths on the device, where PyTorch has it: fp16 and bf16, compute capability 8.0 and
  up, no padding among several rows. The cost of a step follows the contexts, and few rows are split over their lengths;
- scaled_dot_product_attention with a mask over the whole capacity: everything else. It runs on a CPU too.

Shape letters as in `op.py`; G query heads per key/value head.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from edgellm_plugins.attention.op import ATTENTION
from edgellm_plugins.op import implement


def attention(
    qkv: torch.Tensor, kv_cache: torch.Tensor, *tensors: Any, **attributes: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The functional form: `attention_in_place` on a copy of the cache."""
    present = kv_cache.clone()
    (output,) = attention_in_place(qkv, present, *tensors, **attributes)
    return output, present


def attention_in_place(
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
    """As `op.reference_in_place`; norm, rotation and softmax in fp32. The cache may be a view with any strides."""
    batch, length, _ = qkv.shape
    positions_BS = kvcache_start_index.long()[:, None] + torch.arange(length, device=qkv.device)
    valid_BS = positions_BS < context_lengths[:, None]
    heads = qkv.view(batch, length, num_q_heads + 2 * num_kv_heads, head_size)
    qk, v_BSHD = heads.split([num_q_heads + num_kv_heads, num_kv_heads], dim=2)
    qk = qk.to(torch.promote_types(qkv.dtype, torch.float32))
    if q_norm_weight is not None and k_norm_weight is not None:
        scales = (q_norm_weight.expand(num_q_heads, -1), k_norm_weight.expand(num_kv_heads, -1))
        qk = torch.nn.functional.rms_norm(qk, (head_size,), eps=qk_norm_eps) * torch.cat(scales)
    # padding reads any row of the table: what becomes of it is dropped
    table = rope_rotary_cos_sin.expand(batch, -1, -1)
    rows_B1 = torch.arange(batch, device=qkv.device)[:, None]
    last_row = rope_rotary_cos_sin.shape[1] - 1
    qk = _rotate(qk, table[rows_B1, positions_BS.clamp(max=last_row)]).to(qkv.dtype)
    q_BSHD, k_BSHD = qk.split([num_q_heads, num_kv_heads], dim=2)
    _write(kv_cache, torch.stack((k_BSHD, v_BSHD), dim=2), rows_B1, context_lengths, kvcache_start_index)
    if _has_flash(qkv, head_size) and (batch == 1 or length == 1):
        output = _flash(q_BSHD, kv_cache, context_lengths, kvcache_start_index)
    else:
        output = _masked(q_BSHD, kv_cache, positions_BS)
    return (output.masked_fill(~valid_BS[..., None, None], 0),)


def _rotate(x_BSHD: torch.Tensor, cos_sin_BSR: torch.Tensor) -> torch.Tensor:
    """`op.rotate` for a batch whose tokens have a row of the table each."""
    half = cos_sin_BSR.shape[-1] // 2
    cos, sin = cos_sin_BSR[:, :, None].to(x_BSHD.dtype).split(half, dim=-1)
    x1, x2, rest = x_BSHD.split([half, half, x_BSHD.shape[-1] - 2 * half], dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest), dim=-1)


def _write(
    kv_cache: torch.Tensor,
    kv_BS2HD: torch.Tensor,
    rows_B1: torch.Tensor,
    context_lengths: torch.Tensor,
    kvcache_start_index: torch.Tensor,
) -> None:
    """Put each row's new tokens into its cache.

    An index list of a fixed length cannot leave padding out, so padding repeats the row's last new token into the slot
    where that goes anyway; a row without new tokens rewrites what a slot of it holds.
    """
    count_B1 = (context_lengths - kvcache_start_index).long()[:, None]
    token_BS = torch.arange(kv_BS2HD.shape[1], device=kv_BS2HD.device).minimum(count_B1 - 1).clamp(min=0)
    slot_BS = (kvcache_start_index.long()[:, None] + token_BS).clamp(max=kv_cache.shape[3] - 1)
    cache_BC2HD = kv_cache.permute(0, 3, 1, 2, 4)
    new = kv_BS2HD if kv_BS2HD.shape[1] == 1 else kv_BS2HD[rows_B1, token_BS]
    written = torch.where((count_B1 > 0)[..., None, None, None], new, cache_BC2HD[rows_B1, slot_BS])
    cache_BC2HD.index_put_((rows_B1, slot_BS), written)


def _masked(q_BSHD: torch.Tensor, kv_cache: torch.Tensor, positions_BS: torch.Tensor) -> torch.Tensor:
    """Attention over the whole capacity; a query sees the slots up to its own position."""
    batch, length, heads, size = q_BSHD.shape
    kv_heads, capacity = kv_cache.shape[2:4]
    group = heads // kv_heads
    mask_BSC = torch.arange(capacity, device=q_BSHD.device) <= positions_BS[..., None]
    # The group's heads queue up as further queries of their key/value head, which no kernel then has to repeat.
    q_BKGSD = q_BSHD.view(batch, length, kv_heads, group, size).permute(0, 2, 3, 1, 4)
    q_BKQD = q_BKGSD.reshape(batch, kv_heads, group * length, size)
    mask_B1QC = mask_BSC[:, None].expand(-1, group, -1, -1).reshape(batch, 1, group * length, capacity)
    keys, values = kv_cache.unbind(1)
    out_BKQD = torch.nn.functional.scaled_dot_product_attention(q_BKQD, keys, values, attn_mask=mask_B1QC)
    out_BKGSD = out_BKQD.view(batch, kv_heads, group, length, size)
    return out_BKGSD.permute(0, 3, 1, 2, 4).reshape(batch, length, heads, size)


def _flash(
    q_BSHD: torch.Tensor, kv_cache: torch.Tensor, context_lengths: torch.Tensor, kvcache_start_index: torch.Tensor
) -> torch.Tensor:
    """Attention over `context_lengths` tokens of each row; several rows have one query each.

    Flash attention for sequences of unequal length takes keys as one long list [T, Hkv, D] and where each row begins
    in it. With a stride of D between tokens, the cache is that list: row b begins at token b · (batch stride / D).
    """
    batch, length, heads, size = q_BSHD.shape
    row, _, head, token, _ = kv_cache.stride()
    capacity = kv_cache.shape[3]
    shape, strides = ((batch - 1) * (row // token) + capacity, kv_cache.shape[2], size), (token, head, 1)
    keys, values = (x.as_strided(shape, strides) for x in kv_cache.unbind(1))
    begins = torch.arange(0, (batch + 1) * (row // token), row // token, dtype=torch.int32, device=q_BSHD.device)
    if batch == 1:
        count = (context_lengths - kvcache_start_index)[:1]
        queries = torch.cat((torch.zeros_like(count), count))
    else:
        queries = torch.arange(batch + 1, dtype=torch.int32, device=q_BSHD.device)
    output: torch.Tensor = torch.ops.aten._flash_attention_forward(
        q_BSHD.reshape(batch * length, heads, size),
        keys,
        values,
        queries,
        begins,
        length,
        capacity,
        0.0,
        length > 1,
        False,
        seqused_k=context_lengths,
    )[0]
    return output.view(batch, length, heads, size)


def _has_flash(qkv: torch.Tensor, head_size: int) -> bool:
    half = qkv.dtype in (torch.float16, torch.bfloat16)
    return qkv.is_cuda and half and head_size % 8 == 0 and head_size <= 256 and _device_has_flash(qkv.device)


@functools.cache
def _device_has_flash(device: torch.device) -> bool:
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


implement(ATTENTION, "CUDA", attention, attention_in_place)
