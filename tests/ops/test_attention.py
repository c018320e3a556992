"""The attention reference against PyTorch's own attention in fp64, its error messages, and the CUDA kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgellm_plugins.attention import library
from edgellm_plugins.attention.op import ATTENTION, reference
from edgellm_plugins.op import Sample

SAMPLES = list(ATTENTION.samples(torch.Generator().manual_seed(torch.seed() % 2**31), torch.float32))

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")


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


def on(device: str, dtype: torch.dtype, sample: Sample) -> tuple[torch.Tensor | None, ...]:
    """The sample's tensors on a device, floating-point ones but the rotary table in `dtype`."""
    as_is = (sample.tensors[2], sample.tensors[3], sample.tensors[4])
    return tuple(
        None if t is None else t.to(device) if any(t is x for x in as_is) else t.to(device, dtype)
        for t in sample.tensors
    )


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.label)
def test_masked_library_attention_matches_reference(sample: Sample) -> None:
    """The masked way through PyTorch's attention runs on a CPU too."""
    limit = ATTENTION.tolerance.relative[torch.float32]
    expected = reference(*sample.tensors, **sample.attributes)
    for got, right in zip(library.attention(*sample.tensors, **sample.attributes), expected, strict=True):
        assert ((got - right).norm() / right.norm()).item() <= limit


def test_a_row_without_new_tokens_is_left_alone() -> None:
    sample = next(s for s in SAMPLES if s.label == "prefill_unequal")
    tensors = list(sample.tensors)
    tensors[2] = torch.tensor([9, 5, 17], dtype=torch.int32)
    tensors[4] = torch.tensor([0, 5, 17], dtype=torch.int32)
    expected = reference(*tensors, **sample.attributes)
    for got, right in zip(library.attention(*tensors, **sample.attributes), expected, strict=True):
        torch.testing.assert_close(got, right)
    assert not expected[0][1:].any()


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.label)
def test_cuda_matches_fp64(sample: Sample, dtype: torch.dtype) -> None:
    tensors = on("cuda", dtype, sample)
    wide = [None if t is None else t.cpu() if t.dtype == torch.int32 else t.cpu().double() for t in tensors]
    expected = reference(*wide, **sample.attributes)
    functional = ATTENTION.functional()(*tensors, **sample.attributes)
    cache = tensors[1].clone()
    in_place = torch.ops.trt.attention_plugin_(tensors[0], cache, *tensors[2:], **sample.attributes)
    limit = ATTENTION.tolerance.relative[dtype]
    for got in (functional, (in_place, cache)):
        for actual, right in zip(got, expected, strict=True):
            assert ((actual.double().cpu() - right).norm() / right.norm()).item() <= limit


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.label)
def test_cuda_is_capturable(sample: Sample, dtype: torch.dtype) -> None:
    """A captured graph follows lengths that change on the device, also in a view of the cache's first slots."""
    tensors = on("cuda", dtype, sample)
    operator = torch.ops.trt.attention_plugin_
    cache = tensors[1].clone()
    first = operator(tensors[0], cache, *tensors[2:], **sample.attributes)
    torch.cuda.synchronize()
    graph, lengths, starts = torch.cuda.CUDAGraph(), tensors[2].clone(), tensors[4].clone()
    cache = tensors[1].clone()
    with torch.cuda.graph(graph):
        out = operator(tensors[0], cache, lengths, tensors[3], starts, *tensors[5:], **sample.attributes)
    graph.replay()
    torch.testing.assert_close(out, first, rtol=0, atol=0)
    back = (starts > 0).int()
    lengths -= back
    starts -= back
    cache.copy_(tensors[1])
    graph.replay()
    expected = tensors[1].clone()
    right = operator(tensors[0], expected, lengths, tensors[3], starts, *tensors[5:], **sample.attributes)
    torch.testing.assert_close(out, right, rtol=0, atol=0)
    torch.testing.assert_close(cache, expected, rtol=0, atol=0)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_cuda_takes_a_view_of_the_first_slots(dtype: torch.dtype) -> None:
    sample = next(s for s in SAMPLES if s.label == "decode")
    tensors = list(on("cuda", dtype, sample))
    tensors[2], tensors[4] = tensors[2].clamp(max=20), tensors[4].clamp(max=19)
    whole, part = tensors[1].clone(), tensors[1].clone()
    operator = torch.ops.trt.attention_plugin_
    right = operator(tensors[0], whole, *tensors[2:], **sample.attributes)
    got = operator(tensors[0], part[:, :, :, :24], *tensors[2:], **sample.attributes)
    torch.testing.assert_close(got, right, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(part, whole, rtol=0, atol=0)
