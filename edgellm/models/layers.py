"""Decoder blocks that all families share.

Shape letters: B batch, S new tokens per row, H hidden size, C cache capacity in tokens, N positions whose logits are
wanted, V vocabulary. Attribute names are the checkpoints', so weights load under their own names.

Attention is the custom operator `trt::attention_plugin`. While a module is being exported the functional form is
traced, which returns the updated KV cache; when it runs, the in-place form writes into the cache it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import edgellm_plugins  # noqa: F401  (registers torch.ops.trt)
from edgellm.config import DecoderConfig


class RMSNorm(nn.Module):
    """Root-mean-square normalization in fp32, then scaled (Zhang & Sennrich, 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda and not torch.compiler.is_exporting():  # one kernel instead of eight
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


@dataclass(frozen=True)
class ExportSpec:
    """How a module is traced: example keyword arguments, per input its dynamic dimensions, the outputs' names.

    Every example size is above 1: the tracer takes 0 and 1 for constants.
    """

    inputs: dict[str, Any]
    dynamic_shapes: dict[str, Any]
    output_names: list[str]


class VisualEncoder(nn.Module):
    """Base of the families' visual encoders: the module that becomes `visual/model.onnx`."""

    def export_spec(self) -> ExportSpec:
        """How this encoder is traced, in the dtype of its weights."""
        raise NotImplementedError


@dataclass(frozen=True)
class AttentionInputs:
    """What every layer's attention takes besides its own QKV and cache; semantics in `plugins/attention/op.py`.

    `context_lengths` and `kvcache_start_index` [B] int32; `rope_rotary_cos_sin` [1|B, C, R] fp32.
    """

    context_lengths: torch.Tensor
    rope_rotary_cos_sin: torch.Tensor
    kvcache_start_index: torch.Tensor


class EdgeLLMAttention(nn.Module):
    """Projections around `trt::attention_plugin`, with QK-norm where the family has it."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        hidden, size, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * size, bias=bias)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * size, bias=bias)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * size, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * size, hidden, bias=bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(size, config.rms_norm_eps)
            self.k_norm = RMSNorm(size, config.rms_norm_eps)

    def forward(
        self, x_BSH: torch.Tensor, kv_cache: torch.Tensor, inputs: AttentionInputs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`x_BSH` and the cache [B, 2, Hkv, C, D] → output [B, S, H] and the updated cache."""
        config = self.config
        qkv = torch.cat((self.q_proj(x_BSH), self.k_proj(x_BSH), self.v_proj(x_BSH)), dim=-1)
        tensors = (
            qkv,
            kv_cache,
            inputs.context_lengths,
            inputs.rope_rotary_cos_sin,
            inputs.kvcache_start_index,
            self.q_norm.weight if config.qk_norm else None,
            self.k_norm.weight if config.qk_norm else None,
        )
        attributes = {
            "num_q_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "head_size": config.head_dim,
            "qk_norm_eps": config.rms_norm_eps,
        }
        if torch.compiler.is_exporting():
            attention, kv_cache = torch.ops.trt.attention_plugin(*tensors, **attributes)
        else:
            attention = torch.ops.trt.attention_plugin_(*tensors, **attributes)
        return self.o_proj(attention.flatten(-2)), kv_cache


class GatedMLP(nn.Module):
    """SwiGLU feed-forward block (Shazeer, 2020, arXiv:2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BSH: torch.Tensor) -> torch.Tensor:
        gated: torch.Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x_BSH)) * self.up_proj(x_BSH))
        return gated


class EdgeLLMDecoderLayer(nn.Module):
    """Pre-norm transformer layer: attention and gated MLP, each with a residual connection."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = EdgeLLMAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def forward(
        self, x_BSH: torch.Tensor, kv_cache: torch.Tensor, inputs: AttentionInputs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`x_BSH` and the layer's cache → output [B, S, H] and the updated cache."""
        attention, kv_cache = self.self_attn(self.input_layernorm(x_BSH), kv_cache, inputs)
        x_BSH = x_BSH + attention
        return x_BSH + self.mlp(self.post_attention_layernorm(x_BSH)), kv_cache


class EdgeLLMModel(nn.Module):
    """The stack of decoder layers and the final norm; embeddings come from outside.

    `deepstack_embeds`, one per early layer and zero at text positions, are added to the output of layers 0, 1, …
    (Meng et al., DeepStack, 2024, arXiv:2406.04334).
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(EdgeLLMDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        inputs_embeds_BSH: torch.Tensor,
        past_key_values: Sequence[torch.Tensor],
        inputs: AttentionInputs,
        deepstack_embeds: Sequence[torch.Tensor] = (),
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Hidden states [B, S, H] after the final norm, and the updated caches, one per layer."""
        x_BSH, present = inputs_embeds_BSH, list[torch.Tensor]()
        for i, layer in enumerate(self.layers):
            x_BSH, kv_cache = layer(x_BSH, past_key_values[i], inputs)
            present.append(kv_cache)
            if i < len(deepstack_embeds):
                x_BSH = x_BSH + deepstack_embeds[i]
        return self.norm(x_BSH), present


class EdgeLLMForCausalLM(nn.Module):
    """Decoder with its output head: the module that becomes `model.onnx`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = EdgeLLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        past_key_values: Sequence[torch.Tensor],
        rope_rotary_cos_sin: torch.Tensor,
        context_lengths: torch.Tensor,
        kvcache_start_index: torch.Tensor,
        last_token_ids: torch.Tensor,
        deepstack_embeds: Sequence[torch.Tensor] = (),
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits [B, N, V] fp32 of the positions `last_token_ids` [B, N] int64, and the updated caches.

        `inputs_embeds` [B, S, H]; `past_key_values` one [B, 2, Hkv, C, D] per layer; the others as in AttentionInputs.
        """
        inputs = AttentionInputs(context_lengths, rope_rotary_cos_sin, kvcache_start_index)
        hidden_BSH, present = self.model(inputs_embeds, past_key_values, inputs, deepstack_embeds)
        picked_BNH = torch.ops.trt.gather_nd(hidden_BSH, last_token_ids[..., None], batch_dims=1)
        return self.lm_head(picked_BNH).float(), present

    def export_spec(self) -> ExportSpec:
        """How the decoder is traced, in the dtype of its weights."""
        config, dtype = self.config, self.lm_head.weight.dtype
        dim = torch.export.Dim
        batch, seq, capacity = dim("batch"), dim("seq_len"), dim("kv_capacity")
        b, s, c = 2, 3, 5
        layers, levels = range(config.num_hidden_layers), range(config.num_deepstack)
        cache = (b, 2, config.num_key_value_heads, c, config.head_dim)
        inputs = {
            "inputs_embeds": torch.zeros(b, s, config.hidden_size, dtype=dtype),
            "past_key_values": [torch.zeros(cache, dtype=dtype) for _ in layers],
            "rope_rotary_cos_sin": torch.zeros(b, c, config.rope.rotary_dim),
            "context_lengths": torch.full((b,), s, dtype=torch.int32),
            "kvcache_start_index": torch.zeros(b, dtype=torch.int32),
            "last_token_ids": torch.zeros(b, 2, dtype=torch.int64),
            "deepstack_embeds": [torch.zeros(b, s, config.hidden_size, dtype=dtype) for _ in levels],
        }
        dynamic_shapes = {
            "inputs_embeds": {0: batch, 1: seq},
            "past_key_values": [{0: batch, 3: capacity} for _ in layers],
            "rope_rotary_cos_sin": {0: dim("rope_batch"), 1: capacity},
            "context_lengths": {0: batch},
            "kvcache_start_index": {0: batch},
            "last_token_ids": {0: batch, 1: dim("num_selected")},
            "deepstack_embeds": [{0: batch, 1: seq} for _ in levels],
        }
        return ExportSpec(inputs, dynamic_shapes, ["logits", *(f"present_key_values_{i}" for i in layers)])
