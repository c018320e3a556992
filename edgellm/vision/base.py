"""What a visual runner is, and the registry that finds the one for a model type.

A visual runner owns everything a vision-language family needs around its encoder engine: image preprocessing, the
encoder call, the image tokens of a prompt and their rotary positions. Shape legend: P patches of one image, N = tokens
that the decoder sees for it, H the decoder's hidden size, S tokens of a prompt.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from edgellm.errors import CheckpointError, ConfigError
from edgellm.vision.image import ImageInput

ENCODE_PHASE = "encode"
"""The phase that `encode` passes to the visual engine; it has only this one."""

Grid = tuple[int, int, int]
"""Patches of one image along time, height and width."""


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """One image ready for the encoder.

    `pixel_values` [P, channels * temporal * patch * patch] fp32, patches in merge-block order; `num_tokens` = N;
    `key` is equal for equal resized pictures and serves the encoder cache and the prompt cache.
    """

    pixel_values: torch.Tensor
    grid_thw: Grid
    num_tokens: int
    key: str


@dataclass(frozen=True, eq=False)
class VisualFeatures:
    """Encoder output of one image: `image_embeds` [N, H] and, per deepstack level, another [N, H]."""

    image_embeds: torch.Tensor
    deepstack_embeds: tuple[torch.Tensor, ...]


class EncoderEngine(Protocol):
    """The part of the engine protocol that a visual runner calls."""

    def run(self, phase: str, inputs: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor], /) -> None:
        """Fill `outputs` from `inputs`."""


class VisualRunner(Protocol):
    """Preprocessing, encoder call and prompt bookkeeping of one vision-language family."""

    @property
    def image_token_id(self) -> int:
        """Id of the token that stands for image features in a prompt."""

    @property
    def max_image_tokens(self) -> int:
        """Most tokens that one image may take."""

    def prepare(self, image: ImageInput, where: str = "image") -> PreparedImage:
        """Check, resize and patchify one image; callable from any thread. Raises RequestError."""

    def encode(self, engine: EncoderEngine, image: PreparedImage) -> VisualFeatures:
        """Run the encoder on one image."""

    def expand_image_tokens(self, token_ids: Sequence[int], images: Sequence[PreparedImage]) -> list[int]:
        """Repeat each image token as often as its image has tokens. Raises RequestError when the counts differ."""

    def mrope_positions(self, token_ids: Sequence[int], grids: Sequence[Grid]) -> tuple[torch.Tensor, int]:
        """Positions [3, S] int64 (time, height, width) of an expanded prompt, and the position that follows it."""


_FAMILIES: dict[str, str] = {"qwen3_vl": "edgellm.vision.qwen3_vl"}


def _family(model_type: str) -> Any:
    if model_type not in _FAMILIES:
        valid = ", ".join(sorted(_FAMILIES))
        raise ConfigError(f"no visual runner for model_type {model_type!r}; valid model types are {valid}")
    return importlib.import_module(_FAMILIES[model_type])


def load_visual_runner(
    model_type: str,
    config: Mapping[str, Any],
    *,
    device: torch.device | str = "cpu",
    output_dtype: torch.dtype = torch.float32,
) -> VisualRunner:
    """The runner of `model_type` from its config dict (see `vision_config_from_checkpoint`).

    `device` is where the encoder reads and writes, `output_dtype` what it writes. Raises ConfigError.
    """
    runner: VisualRunner = _family(model_type).load_runner(config, torch.device(device), output_dtype)
    return runner


def vision_config_from_checkpoint(
    model_type: str, hf_config: Mapping[str, Any], preprocessor_config: Mapping[str, Any]
) -> dict[str, Any]:
    """The family's vision config as a plain dict, from a checkpoint's config.json and preprocessor config.

    Raises ConfigError for an unknown model type and for settings that the runner does not implement.
    """
    result: dict[str, Any] = _family(model_type).config_from_checkpoint(hf_config, preprocessor_config)
    return result


def limit_image_tokens(
    model_type: str, config: Mapping[str, Any], min_image_tokens: int, max_image_tokens: int
) -> dict[str, Any]:
    """`config` narrowed to the tokens per image that an engine is built for; raises ConfigError when none is left."""
    result: dict[str, Any] = _family(model_type).limit_image_tokens(config, min_image_tokens, max_image_tokens)
    return result


def read_preprocessor_config(directory: str | Path) -> dict[str, Any]:
    """The image processor's settings of a checkpoint, from preprocessor_config.json or processor_config.json.

    Raises CheckpointError when neither file is there or the one found is broken.
    """
    for name, section in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = Path(directory) / name
        if not path.is_file():
            continue
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise CheckpointError(f"{path} cannot be read as JSON ({e}); copy the checkpoint again") from e
        if section is not None and isinstance(settings, dict):
            settings = settings.get(section)
        if not isinstance(settings, dict):
            raise CheckpointError(f"{path} holds no image processor settings; copy the checkpoint again")
        return settings
    raise CheckpointError(f"{directory} has no preprocessor_config.json, which a vision model needs")
