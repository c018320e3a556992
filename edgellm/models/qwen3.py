"""Qwen3 (dense): grouped-query attention with QK-norm, SwiGLU, default RoPE (Yang et al., 2025, arXiv:2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgellm.config import DecoderConfig, RopeConfig
from edgellm.errors import CheckpointError
from edgellm.models.layers import EdgeLLMForCausalLM, VisualEncoder
from edgellm.models.registry import register_model


@register_model("qwen3")
class Qwen3:
    """Text model; parameters are named as in the checkpoint."""

    def decoder_config(self, hf_config: Mapping[str, Any]) -> DecoderConfig:
        """Dimensions from the checkpoint's configuration."""
        return qwen3_decoder_config(hf_config)

    def decoder(self, config: DecoderConfig) -> EdgeLLMForCausalLM:
        """The decoder, weights not loaded."""
        return EdgeLLMForCausalLM(config)

    def decoder_weight_name(self, name: str, config: DecoderConfig) -> str:
        """A tied head is the embedding."""
        return self.embedding_name() if name == "lm_head.weight" and config.tie_word_embeddings else name

    def embedding_name(self) -> str:
        """Name of the token embedding."""
        return "model.embed_tokens.weight"

    def visual(self, hf_config: Mapping[str, Any]) -> VisualEncoder | None:
        """A text model has none."""
        return None

    def visual_weight_name(self, name: str) -> str:
        """Never asked for."""
        raise CheckpointError(f"qwen3 has no visual encoder, so no weight {name}")


def qwen3_decoder_config(hf: Mapping[str, Any], *, num_deepstack: int = 0) -> DecoderConfig:
    """Dimensions from a Qwen3 text configuration; raises CheckpointError for a feature that is not supported."""
    try:
        rope = hf.get("rope_parameters") or {"rope_theta": hf.get("rope_theta"), **(hf.get("rope_scaling") or {})}
        if rope.get("rope_type", rope.get("type", "default")) not in ("default", "mrope"):
            raise CheckpointError(f"rope type {rope.get('rope_type')!r} is not supported for qwen3; use 'default'")
        if hf.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"hidden_act {hf['hidden_act']!r} is not supported for qwen3; use 'silu'")
        if hf.get("use_sliding_window"):
            raise CheckpointError("use_sliding_window is not supported for qwen3; set it to false")
        section = rope.get("mrope_section")
        return DecoderConfig(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_hidden_layers=hf["num_hidden_layers"],
            num_attention_heads=hf["num_attention_heads"],
            num_key_value_heads=hf["num_key_value_heads"],
            head_dim=hf["head_dim"],
            rms_norm_eps=hf["rms_norm_eps"],
            rope=RopeConfig(float(rope["rope_theta"]), hf["head_dim"], tuple(section) if section else None),
            tie_word_embeddings=hf.get("tie_word_embeddings", False),
            attention_bias=hf.get("attention_bias", False),
            qk_norm=True,
            num_deepstack=num_deepstack,
        )
    except (KeyError, TypeError) as e:
        raise CheckpointError(f"config.json: the text configuration lacks or misuses {e}; is it complete?") from None
