"""The attention reference against PyTorch's own attention in fp64, and its error messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgellm_plugins.attention.op import ATTENTION, reference
from edgellm_plugins.op import Sample

SAMPLES = list(ATTENTION.samples(torch.Generator().manual_seed(torch.seed() % 2**31), torch.float32))


def oracle(sample: Sample) -> list[torch.Tensor]:
    """Attention of every row through scaled_dot_product_attention in fp64, complex-number rotation."""
    qkv, cache, ends, rope, starts, q_weight, k_weight = [
        t if t is None or t.dtype == torch.int32 else t.double() for t in sample.tensors
    ]
    heads_q, heads_kv, size = (sample.attributes[k] for k in ("num_q_heads", "num_kv_heads", "head_size"))

    def norm(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        return x if weight is None else x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def turn(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        half = table.shape[-1] // 2
        phase = torch.complex(table[:, :half], table[:, half:])[:, None]
        z = torch.complex(x[..., :half].contiguous(), x[..., half : 2 * half].contiguous()) * phase
        return torch.cat((z.real, z.imag, x[..., 2 * half :]), -1)

    rows = []
    for b, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        new = qkv[b, : end - start].view(end - start, -1, size)
        table = rope[b % rope.shape[0], start:end]
        q = turn(norm(new[:, :heads_q], q_weight), table)
        k = turn(norm(new[:, heads_q : heads_q + heads_kv], k_weight), table)
        keys = torch.cat((cache[b, 0, :, :start], k.transpose(0, 1)), 1)
        values = torch.cat((cache[b, 1, :, :start], new[:, heads_q + heads_kv :].transpose(0, 1)), 1)
        mask = torch.arange(end)[None] <= torch.arange(start, end)[:, None]
        out = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None], keys[None], values[None], attn_mask=mask, enable_gqa=True
        )
        rows.append(out[0].transpose(0, 1))
    return rows


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.label)
def test_reference_matches_fp64_oracle(sample: Sample) -> None:
    attention, present = reference(*sample.tensors, **sample.attributes)
    limit = ATTENTION.tolerance.relative[torch.float32]
    cache, ends, starts = sample.tensors[1], sample.tensors[2], sample.tensors[4]
    for b, expected in enumerate(oracle(sample)):
        got = attention[b, : expected.shape[0]].double()
        assert ((got - expected).norm() / expected.norm()).item() <= limit
        assert not attention[b, expected.shape[0] :].any(), "padding must be zero"
        start, end = int(starts[b]), int(ends[b])
        torch.testing.assert_close(present[b, :, :, :start], cache[b, :, :, :start], rtol=0, atol=0)
        torch.testing.assert_close(present[b, :, :, end:], cache[b, :, :, end:], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda t: t[..., 1:], "qkv must be"),
        (1, lambda t: t[:, :1], "kv_cache must be"),
        (1, lambda t: t.half(), "kv_cache must be of qkv's dtype float32"),
        (2, lambda t: t.long(), "context_lengths must be"),
        (3, lambda t: t[:, 1:], "rope_rotary_cos_sin must be"),
        (4, lambda t: t[None], "kvcache_start_index must be"),
    ],
)
def test_wrong_input_is_named(index: int, change: Any, message: str) -> None:
    tensors = list(SAMPLES[1].tensors)
    tensors[index] = change(tensors[index])
    with pytest.raises(ValueError, match=f"attention_plugin: {message}"):
        ATTENTION.functional()(*tensors, **SAMPLES[1].attributes)
