"""Decoder blocks that all families share.

Shape letters: B batch, S new tokens per row, H hidden size, C cache capacity in tokens, N positions whose logits are
wanted, V vocabulary, K and M a linear layer's inputs and outputs, R the total LoRA rank of a step. Attribute names are
the checkpoints', so weights load under their own names.

Attention is the custom operator `trt::attention_plugin`. While a module is being exported the functional form is
traced, which returns the updated KV cache; when it runs, the in-place form writes into the cache it was given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


@dataclass(frozen=True)
class ExportSpec:
    """How a module is traced: example keyword arguments, per input its dynamic dimensions, the outputs' names.

    Every example size is above 1: the tracer takes 0 and 1 for constants. An input that is a dictionary of tensors
    becomes graph inputs under its keys.
    """

    inputs: dict[str, Any]
    dynamic_shapes: dict[str, Any]
    output_names: list[str]


class VisualEncoder(nn.Module):
    """Base of the families' visual encoders: the module that becomes `visual/model.onnx`."""

    def export_spec(self) -> ExportSpec:
        """How this encoder is traced, in the dtype of its weights."""
        raise NotImplementedError


def lora_input_names(module: str) -> tuple[str, str]:
    """Names of the inputs that hold A [K, R] and B [R, M] of the linear layer `module`."""
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


@dataclass(frozen=True)
class LoraInputs:
    """The low-rank updates of a step's linear layers (Hu et al., LoRA, 2021, arXiv:2106.09685); none when empty.

    `weights` holds A and B of every layer by input name, alpha / r folded into B. The adapters of the batch's rows are
    concatenated along the rank, and `rank_mask` [B, R] has ones in each row's own columns. `prefix` is the place in
    the model that names are relative to.
    """

    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    rank_mask: torch.Tensor | None = None
    prefix: str = ""

    def of(self, child: str) -> LoraInputs:
        """The same, seen from the submodule `child`."""
        return LoraInputs(self.weights, self.rank_mask, f"{self.prefix}{child}.")

    def add(self, linear: str, x_BSK: torch.Tensor, y_BSM: torch.Tensor) -> torch.Tensor:
        """`y_BSM`, the output of the layer `linear` for `x_BSK`, with its update added."""
        if self.rank_mask is None:
            return y_BSM
        a_KR, b_RM = (self.weights[name] for name in lora_input_names(self.prefix + linear))
        h_BSR = (x_BSK @ a_KR) * self.rank_mask[:, None]
        if torch.compiler.is_exporting():
            return y_BSM + h_BSR @ b_RM
        # product and sum in one kernel, which an exported graph would need reshapes for
        return torch.addmm(y_BSM.flatten(0, 1), h_BSR.flatten(0, 1), b_RM).view_as(y_BSM)


NO_LORA = LoraInputs()


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
        self, x_BSH: torch.Tensor, kv_cache: torch.Tensor, inputs: AttentionInputs, lora: LoraInputs = NO_LORA
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`x_BSH` and the cache [B, 2, Hkv, C, D] → output [B, S, H] and the updated cache."""
        config = self.config
        projections = {"q_proj": self.q_proj, "k_proj": self.k_proj, "v_proj": self.v_proj}
        qkv = torch.cat([lora.add(name, x_BSH, linear(x_BSH)) for name, linear in projections.items()], dim=-1)
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
        flat = attention.flatten(-2)
        return lora.add("o_proj", flat, self.o_proj(flat)), kv_cache


class GatedMLP(nn.Module):
    """SwiGLU feed-forward block (Shazeer, 2020, arXiv:2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BSH: torch.Tensor, lora: LoraInputs = NO_LORA) -> torch.Tensor:
        gate = lora.add("gate_proj", x_BSH, self.gate_proj(x_BSH))
        gated = nn.functional.silu(gate) * lora.add("up_proj", x_BSH, self.up_proj(x_BSH))
        return lora.add("down_proj", gated, self.down_proj(gated))


class EdgeLLMDecoderLayer(nn.Module):
    """Pre-norm transformer layer: attention and gated MLP, each with a residual connection."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = EdgeLLMAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def forward(
        self, x_BSH: torch.Tensor, kv_cache: torch.Tensor, inputs: AttentionInputs, lora: LoraInputs = NO_LORA
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`x_BSH` and the layer's cache → output [B, S, H] and the updated cache."""
        attention, kv_cache = self.self_attn(self.input_layernorm(x_BSH), kv_cache, inputs, lora.of("self_attn"))
        x_BSH = x_BSH + attention
        return x_BSH + self.mlp(self.post_attention_layernorm(x_BSH), lora.of("mlp")), kv_cache


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
        lora: LoraInputs = NO_LORA,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Hidden states [B, S, H] after the final norm, and the updated caches, one per layer."""
        x_BSH, present = inputs_embeds_BSH, list[torch.Tensor]()
        for i, layer in enumerate(self.layers):
            x_BSH, kv_cache = layer(x_BSH, past_key_values[i], inputs, lora.of(f"layers.{i}"))
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
        lora_weights: Mapping[str, torch.Tensor] | None = None,
        lora_rank_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits [B, N, V] fp32 of the positions `last_token_ids` [B, N] int64, and the updated caches.

        `inputs_embeds` [B, S, H]; `past_key_values` one [B, 2, Hkv, C, D] per layer; the others as in AttentionInputs.
        `lora_weights` and `lora_rank_mask`, as in LoraInputs, come together or not at all.
        """
        inputs = AttentionInputs(context_lengths, rope_rotary_cos_sin, kvcache_start_index)
        lora = LoraInputs(lora_weights or {}, lora_rank_mask).of("model")
        hidden_BSH, present = self.model(inputs_embeds, past_key_values, inputs, deepstack_embeds, lora)
        picked_BNH = torch.ops.trt.gather_nd(hidden_BSH, last_token_ids[..., None], batch_dims=1)
        return self.lm_head(picked_BNH).float(), present

    def lora_shapes(self) -> dict[str, tuple[int, int]]:
        """The linear layers that take LoRA weights: those of the layers, not the head. Name → (inputs, outputs)."""
        return {
            f"model.{name}": (module.in_features, module.out_features)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
        }

    def export_spec(self, *, lora: bool = False) -> ExportSpec:
        """How the decoder is traced, in the dtype of its weights; with `lora`, it takes LoRA inputs of any rank."""
        config, dtype = self.config, self.lm_head.weight.dtype
        dim = torch.export.Dim
        batch, seq, capacity = dim("batch"), dim("seq_len"), dim("kv_capacity")
        b, s, c = 2, 3, 5
        layers, levels = range(config.num_hidden_layers), range(config.num_deepstack)
        cache = (b, 2, config.num_key_value_heads, c, config.head_dim)
        inputs: dict[str, Any] = {
            "inputs_embeds": torch.zeros(b, s, config.hidden_size, dtype=dtype),
            "past_key_values": [torch.zeros(cache, dtype=dtype) for _ in layers],
            "rope_rotary_cos_sin": torch.zeros(b, c, config.rope.rotary_dim),
            "context_lengths": torch.full((b,), s, dtype=torch.int32),
            "kvcache_start_index": torch.zeros(b, dtype=torch.int32),
            "last_token_ids": torch.zeros(b, 2, dtype=torch.int64),
            "deepstack_embeds": [torch.zeros(b, s, config.hidden_size, dtype=dtype) for _ in levels],
        }
        dynamic_shapes: dict[str, Any] = {
            "inputs_embeds": {0: batch, 1: seq},
            "past_key_values": [{0: batch, 3: capacity} for _ in layers],
            "rope_rotary_cos_sin": {0: dim("rope_batch"), 1: capacity},
            "context_lengths": {0: batch},
            "kvcache_start_index": {0: batch},
            "last_token_ids": {0: batch, 1: dim("num_selected")},
            "deepstack_embeds": [{0: batch, 1: seq} for _ in levels],
        }
        if lora:
            rank, r = dim("lora_rank"), 4
            weights, ranks = dict[str, torch.Tensor](), dict[str, Any]()
            for name, (k, m) in self.lora_shapes().items():
                name_a, name_b = lora_input_names(name)
                weights |= {name_a: torch.zeros(k, r, dtype=dtype), name_b: torch.zeros(r, m, dtype=dtype)}
                ranks |= {name_a: {1: rank}, name_b: {0: rank}}
            inputs |= {"lora_weights": weights, "lora_rank_mask": torch.zeros(b, r, dtype=dtype)}
            dynamic_shapes |= {"lora_weights": ranks, "lora_rank_mask": {0: batch, 1: rank}}
        return ExportSpec(inputs, dynamic_shapes, ["logits", *(f"present_key_values_{i}" for i in layers)])
