"""Typed configuration: the decoder's dimensions and the limits an engine is built for.

Frozen dataclasses with one home for each default; the command line's defaults point here. `from_dict` refuses an
unknown key and lists the valid ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from edgellm.errors import ConfigError

T = TypeVar("T")

ONNX_SCHEMA_VERSION = 1
"""Version of the ONNX directory's `config.json`."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of the decoder.

    `mrope_section` gives, for multimodal models, how many of the `rotary_dim / 2` frequencies turn with the temporal,
    the height and the width position; None for text models.
    """

    theta: float
    rotary_dim: int
    mrope_section: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class DecoderConfig:
    """Dimensions of a decoder-only transformer, the same for every family."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool = False
    qk_norm: bool = False
    num_deepstack: int = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )


@dataclass(frozen=True)
class BuildConfig:
    """The limits an engine is built for; lengths in tokens, image sizes in tokens that the decoder sees.

    `max_lora_rank` bounds the ranks of a batch's different LoRA adapters together; None is what the ONNX graph was
    exported for, and in an engine's manifest it is always a number, 0 for an engine without LoRA.
    """

    max_batch_size: int = 4
    max_input_len: int = 1024
    max_kv_cache_capacity: int = 2048
    min_image_tokens: int = 4
    max_image_tokens: int = 1024
    max_lora_rank: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "max_lora_rank" else 1
            if value is None and field.default is None:
                continue
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{field.name} is {value!r}; it must be a whole number of at least {least}")
        if self.max_input_len >= self.max_kv_cache_capacity:
            raise ConfigError(
                f"max_input_len ({self.max_input_len}) must be below max_kv_cache_capacity "
                f"({self.max_kv_cache_capacity}): the cache holds the prompt and the answer"
            )
        if self.min_image_tokens > self.max_image_tokens:
            raise ConfigError(
                f"min_image_tokens ({self.min_image_tokens}) must not exceed max_image_tokens ({self.max_image_tokens})"
            )


@dataclass(frozen=True)
class OnnxConfig:
    """`config.json` of an ONNX directory: what was exported.

    `dtype` is the weights' ("float32", "float16" or "bfloat16"). `vision` holds the image preprocessing of the family's
    visual runner (`edgellm/vision/`), None for a text model. `max_lora_rank` above 0 says that the decoder takes LoRA
    weights, up to this rank in total.
    """

    schema_version: int
    model_type: str
    dtype: str
    decoder: DecoderConfig
    vision: dict[str, Any] | None
    max_lora_rank: int = 0


@dataclass(frozen=True)
class NullConfig:
    """How long a null engine takes, in seconds; `vocab_size` 0 stands for the model's own."""

    prefill_s_per_token: float = 0.0
    decode_s_per_step: float = 0.0
    encode_s_per_image: float = 0.0
    vocab_size: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 2**24:
                raise ConfigError(f"{field.name} is {value!r}; it must be a number of at least 0")
        if not isinstance(self.vocab_size, int):
            raise ConfigError(f"vocab_size is {self.vocab_size!r}; it must be a whole number")


def from_dict(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build the dataclass `cls` from `values`, nested dataclasses and tuples included.

    Raises ConfigError that names `where`, the offending key and the valid keys.
    """
    assert dataclasses.is_dataclass(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {key!r}; valid keys are {', '.join(sorted(fields))}")
    required = dataclasses.MISSING
    for name, f in fields.items():
        if name not in values and f.default is required and f.default_factory is required:
            raise ConfigError(f"{where}: key {name!r} is missing")
    kwargs: dict[str, Any] = {}
    for key, value in values.items():
        nested = _NESTED.get(str(fields[key].type).removesuffix(" | None"))
        if nested is not None and isinstance(value, Mapping):
            value = from_dict(nested, value, f"{where}: {key}")
        kwargs[key] = tuple(value) if isinstance(value, list) else value
    return cls(**kwargs)


_NESTED: dict[str, type] = {c.__name__: c for c in (RopeConfig, DecoderConfig, BuildConfig)}
