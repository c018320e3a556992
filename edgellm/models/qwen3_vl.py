"""Qwen3-VL: a Qwen3 decoder with multimodal RoPE and DeepStack, and its visual encoder.

The encoder runs one image at a time. What depends only on the image's size (interpolation of the learned positional
grid, rotary angles) comes in as tensors, so that the graph holds no data-dependent control flow.

Shape letters: P patches, E encoder width, H decoder hidden size, M patches merged into one token, T = P / M tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgellm.config import DecoderConfig
from edgellm.errors import CheckpointError
from edgellm.models.layers import EdgeLLMForCausalLM, ExportSpec, VisualEncoder
from edgellm.models.qwen3 import qwen3_decoder_config
from edgellm.models.registry import register_model


@dataclass(frozen=True)
class VisualConfig:
    """Dimensions of the visual encoder."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch_dim: int
    merge_unit: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> VisualConfig:
        """Dimensions from a checkpoint's `vision_config`; raises CheckpointError naming a key that is missing."""
        try:
            if hf["hidden_act"] != "gelu_pytorch_tanh":
                raise CheckpointError(f"vision_config: hidden_act {hf['hidden_act']!r} is not supported for qwen3_vl")
            return cls(
                depth=hf["depth"],
                hidden_size=hf["hidden_size"],
                intermediate_size=hf["intermediate_size"],
                num_heads=hf["num_heads"],
                patch_dim=hf["in_channels"] * hf["temporal_patch_size"] * hf["patch_size"] ** 2,
                merge_unit=hf["spatial_merge_size"] ** 2,
                out_hidden_size=hf["out_hidden_size"],
                num_position_embeddings=hf["num_position_embeddings"],
                deepstack_visual_indexes=tuple(hf["deepstack_visual_indexes"]),
            )
        except (KeyError, TypeError) as e:
            raise CheckpointError(f"config.json: vision_config lacks or misuses {e}; is it complete?") from None


class PatchEmbed(nn.Module):
    """The convolution over non-overlapping patches, as the matrix product that it is."""

    def __init__(self, config: VisualConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.patch_dim, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.proj(pixel_values.to(self.proj.weight.dtype))
        return embedded


class VisualAttention(nn.Module):
    """Full attention among the patches of one image, with two-dimensional rotary positions."""

    def __init__(self, config: VisualConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_PE: torch.Tensor, cos_P1D: torch.Tensor, sin_P1D: torch.Tensor) -> torch.Tensor:
        """`x_PE` → [P, E]; cosines and sines [P, 1, D / 2]."""
        patches = x_PE.shape[0]
        q, k, v = self.qkv(x_PE).view(patches, 3, self.num_heads, -1).unbind(1)
        # The scale goes into the fp32 rotation: as a constant in a half-precision graph it would be rounded.
        scale = q.shape[-1] ** -0.5
        q, k = _rotate(q, cos_P1D * scale, sin_P1D * scale), _rotate(k, cos_P1D, sin_P1D)
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)
        projected: torch.Tensor = self.proj(out[0].transpose(0, 1).reshape(patches, -1))
        return projected


def _rotate(x_PND: torch.Tensor, cos_P1D: torch.Tensor, sin_P1D: torch.Tensor) -> torch.Tensor:
    x1, x2 = x_PND.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos_P1D - x2 * sin_P1D, x2 * cos_P1D + x1 * sin_P1D), dim=-1).to(x_PND.dtype)


class VisualMLP(nn.Module):
    """Two linear layers around a tanh-approximated GELU."""

    def __init__(self, config: VisualConfig) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_PE: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear_fc2(nn.functional.gelu(self.linear_fc1(x_PE), approximate="tanh"))
        return out


class VisualBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisualConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.attn = VisualAttention(config)
        self.mlp = VisualMLP(config)

    def forward(self, x_PE: torch.Tensor, cos_P1D: torch.Tensor, sin_P1D: torch.Tensor) -> torch.Tensor:
        x_PE = x_PE + self.attn(self.norm1(x_PE), cos_P1D, sin_P1D)
        out: torch.Tensor = x_PE + self.mlp(self.norm2(x_PE))
        return out


class PatchMerger(nn.Module):
    """Merges M neighbouring patches into one token of the decoder's width; patches come in merge-block order."""

    def __init__(self, config: VisualConfig, *, norm_after_merge: bool) -> None:
        super().__init__()
        self.width = config.hidden_size * config.merge_unit
        self.norm_after_merge = norm_after_merge
        self.norm = nn.LayerNorm(self.width if norm_after_merge else config.hidden_size, eps=1e-6)
        self.linear_fc1 = nn.Linear(self.width, self.width)
        self.linear_fc2 = nn.Linear(self.width, config.out_hidden_size)

    def forward(self, x_PE: torch.Tensor) -> torch.Tensor:
        """`x_PE` → [T, H]."""
        merged = self.norm(x_PE.view(-1, self.width)) if self.norm_after_merge else self.norm(x_PE).view(-1, self.width)
        out: torch.Tensor = self.linear_fc2(nn.functional.gelu(self.linear_fc1(merged)))
        return out


class Qwen3VLVisual(VisualEncoder):
    """The visual encoder."""

    def __init__(self, config: VisualConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(VisualBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config, norm_after_merge=False)
        self.deepstack_merger_list = nn.ModuleList(
            PatchMerger(config, norm_after_merge=True) for _ in config.deepstack_visual_indexes
        )

    def forward(
        self,
        pixel_values: torch.Tensor,
        pos_embed_indices: torch.Tensor,
        pos_embed_weights: torch.Tensor,
        rotary_cos_sin: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Token embeddings [T, H], then one [T, H] for each DeepStack level.

        `pixel_values` [P, patch_dim] fp32; `pos_embed_indices` [4, P] int64 and `pos_embed_weights` [4, P] fp32, the
        bilinear interpolation of the positional grid; `rotary_cos_sin` [P, head_dim] fp32, cosines then sines.
        """
        x_PE = self.patch_embed(pixel_values)
        positions = (self.pos_embed(pos_embed_indices).float() * pos_embed_weights[..., None]).sum(0)
        x_PE = x_PE + positions.to(x_PE.dtype)
        cos_P1D, sin_P1D = rotary_cos_sin[:, None, :].chunk(2, dim=-1)
        deepstack = []
        for i, block in enumerate(self.blocks):
            x_PE = block(x_PE, cos_P1D, sin_P1D)
            if i in self.config.deepstack_visual_indexes:
                level = self.config.deepstack_visual_indexes.index(i)
                deepstack.append(self.deepstack_merger_list[level](x_PE))
        return (self.merger(x_PE), *deepstack)

    def export_spec(self) -> ExportSpec:
        """For one image of any size."""
        merge, head_dim = self.config.merge_unit, self.config.hidden_size // self.config.num_heads
        patches, p = torch.export.Dim("num_image_tokens") * merge, 2 * merge
        inputs = {
            "pixel_values": torch.zeros(p, self.config.patch_dim),
            "pos_embed_indices": torch.zeros(4, p, dtype=torch.int64),
            "pos_embed_weights": torch.zeros(4, p),
            "rotary_cos_sin": torch.zeros(p, head_dim),
        }
        dynamic_shapes = {
            "pixel_values": {0: patches},
            "pos_embed_indices": {1: patches},
            "pos_embed_weights": {1: patches},
            "rotary_cos_sin": {0: patches},
        }
        levels = range(len(self.deepstack_merger_list))
        return ExportSpec(inputs, dynamic_shapes, ["image_embeds", *(f"deepstack_embeds_{i}" for i in levels)])


@register_model("qwen3_vl")
class Qwen3VL:
    """The family: where a Qwen3-VL checkpoint keeps what the decoder and the encoder need."""

    def decoder_config(self, hf_config: Mapping[str, Any]) -> DecoderConfig:
        """Dimensions from the checkpoint's text configuration."""
        levels = len(hf_config.get("vision_config", {}).get("deepstack_visual_indexes", ()))
        text = dict(hf_config.get("text_config", {}))
        text["tie_word_embeddings"] = hf_config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        return qwen3_decoder_config(text, num_deepstack=levels)

    def decoder(self, config: DecoderConfig) -> EdgeLLMForCausalLM:
        """The decoder, weights not loaded."""
        return EdgeLLMForCausalLM(config)

    def decoder_weight_name(self, name: str, config: DecoderConfig) -> str:
        """The text model sits under `model.language_model`; a tied head is the embedding."""
        if name == "lm_head.weight":
            return self.embedding_name() if config.tie_word_embeddings else name
        return "model.language_model." + name.removeprefix("model.")

    def embedding_name(self) -> str:
        """Name of the token embedding."""
        return "model.language_model.embed_tokens.weight"

    def visual(self, hf_config: Mapping[str, Any]) -> VisualEncoder | None:
        """The visual encoder, weights not loaded."""
        return Qwen3VLVisual(VisualConfig.from_hf(hf_config.get("vision_config", {})))

    def visual_weight_name(self, name: str) -> str:
        """The encoder sits under `model.visual`."""
        return f"model.visual.{name}"
