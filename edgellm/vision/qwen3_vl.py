"""Qwen3-VL: image preprocessing, positions of the encoder's patches, image tokens and MRoPE positions of a prompt.

Preprocessing gives bit for bit what transformers' `Qwen2VLImageProcessorPil` gives, its image processor of qwen3_vl
that needs no torchvision. Patches come in merge-block order: block row, block column, row in block, column in block.
Shape legend: P patches, N = P / merge^2 tokens, H decoder hidden size, D encoder head size, S tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from edgellm.config import from_dict
from edgellm.errors import ConfigError, RequestError
from edgellm.vision.base import ENCODE_PHASE, EncoderEngine, Grid, PreparedImage, VisualFeatures
from edgellm.vision.image import ImageInput, load_image

MAX_ASPECT_RATIO = 200
_BICUBIC = 3  # PIL's code, as preprocessor configs write it


@dataclass(frozen=True)
class VisionConfig:
    """What preprocessing and the encoder call need to know; sizes of the picture in pixels.

    `min_pixels` and `max_pixels` bound the resized picture, `max_input_pixels` the picture that a caller hands in.
    """

    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    in_channels: int
    num_position_embeddings: int
    head_dim: int
    out_hidden_size: int
    num_deepstack: int
    image_token_id: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    min_pixels: int
    max_pixels: int
    rescale_factor: float = 1 / 255
    rope_theta: float = 10000.0
    max_input_pixels: int = 2**25  # an 8K UHD frame fits; about 100 MB as RGB

    def __post_init__(self) -> None:
        if self.in_channels != 3 or len(self.image_mean) != 3 or len(self.image_std) != 3:
            raise ConfigError(f"vision config: in_channels is {self.in_channels}; only RGB (3 means, 3 stds) works")
        if math.isqrt(self.num_position_embeddings) ** 2 != self.num_position_embeddings:
            raise ConfigError(
                f"vision config: num_position_embeddings is {self.num_position_embeddings}; it must be a square number"
            )
        if self.max_image_tokens < max(1, self.min_image_tokens):
            raise ConfigError(
                f"vision config: images of {self.min_image_tokens} to {self.max_image_tokens} tokens are allowed, "
                "which leaves none; raise max_image_tokens or lower min_image_tokens"
            )

    @property
    def factor(self) -> int:
        """Side in pixels of the square that becomes one token."""
        return self.patch_size * self.spatial_merge_size

    @property
    def min_image_tokens(self) -> int:
        """Fewest tokens that one image takes."""
        return max(1, math.ceil(self.min_pixels / self.factor**2))

    @property
    def max_image_tokens(self) -> int:
        """Most tokens that one image takes."""
        return self.max_pixels // self.factor**2

    @property
    def max_patches(self) -> int:
        """Most patches that the encoder sees for one image."""
        return self.max_image_tokens * self.spatial_merge_size**2

    def with_token_limits(self, min_image_tokens: int, max_image_tokens: int) -> VisionConfig:
        """This config with the tokens per image narrowed to a build's limits, which go before the checkpoint's own."""
        most = min(self.max_pixels, max_image_tokens * self.factor**2)
        least = max(self.min_pixels, min_image_tokens * self.factor**2)
        return dataclasses.replace(self, min_pixels=min(least, most), max_pixels=most)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that `from_dict` reads back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VisionConfig:
        """From `to_dict`'s form; raises ConfigError for unknown or missing keys and impossible values."""
        return from_dict(cls, values, "vision config")

    @classmethod
    def from_checkpoint(cls, hf_config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> VisionConfig:
        """From a checkpoint's config.json and image processor settings; raises ConfigError for what cannot work."""
        try:
            vision = hf_config["vision_config"]
            size = preprocessor.get("size") or {}
            _check_preprocessor(preprocessor, vision)
            return cls(
                patch_size=vision["patch_size"],
                temporal_patch_size=vision["temporal_patch_size"],
                spatial_merge_size=vision["spatial_merge_size"],
                in_channels=vision.get("in_channels", 3),
                num_position_embeddings=vision["num_position_embeddings"],
                head_dim=vision["hidden_size"] // vision["num_heads"],
                out_hidden_size=vision["out_hidden_size"],
                num_deepstack=len(vision["deepstack_visual_indexes"]),
                image_token_id=hf_config["image_token_id"],
                image_mean=_per_channel(preprocessor["image_mean"]),
                image_std=_per_channel(preprocessor["image_std"]),
                min_pixels=_first_not_none(preprocessor.get("min_pixels"), size.get("shortest_edge")),
                max_pixels=_first_not_none(preprocessor.get("max_pixels"), size.get("longest_edge")),
                rescale_factor=preprocessor.get("rescale_factor", 1 / 255),
                rope_theta=(vision.get("rope_parameters") or {}).get("rope_theta", 10000.0),
            )
        except KeyError as e:
            raise ConfigError(
                f"checkpoint has no vision setting {e}; its config or preprocessor config is incomplete"
            ) from e


def _first_not_none(*values: Any) -> int:
    """An explicit min/max_pixels goes before `size`, as in transformers."""
    for value in values:
        if value is not None:
            return int(value)
    raise ConfigError("preprocessor config has neither min_pixels/max_pixels nor size.shortest_edge/longest_edge")


def _per_channel(value: float | Sequence[float]) -> tuple[float, ...]:
    """A preprocessor config may give one number for all three channels."""
    return (value,) * 3 if isinstance(value, (int, float)) else tuple(value)


def _check_preprocessor(preprocessor: Mapping[str, Any], vision: Mapping[str, Any]) -> None:
    expected = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": _BICUBIC,
        "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "merge_size": vision["spatial_merge_size"],
    }
    for key, value in expected.items():
        found = preprocessor.get(key, value)
        if found is not None and found != value:
            raise ConfigError(f"preprocessor config: {key} is {found!r}; only {value!r} works with this model")


def smart_resize(height: int, width: int, config: VisionConfig, where: str = "image") -> tuple[int, int]:
    """Height and width, multiples of `config.factor`, that an image is resized to; transformers' `smart_resize`.

    Raises RequestError when the sides differ too much to keep the token count within the limits.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise RequestError(
            f"{where}: image is {width}x{height} pixels; one side may be at most {MAX_ASPECT_RATIO} times the other"
        )
    factor = config.factor
    h_bar, w_bar = round(height / factor) * factor, round(width / factor) * factor
    if h_bar * w_bar > config.max_pixels:
        beta = math.sqrt((height * width) / config.max_pixels)
        h_bar = max(factor, math.floor(height / beta / factor) * factor)
        w_bar = max(factor, math.floor(width / beta / factor) * factor)
    elif h_bar * w_bar < config.min_pixels:
        beta = math.sqrt(config.min_pixels / (height * width))
        h_bar = math.ceil(height * beta / factor) * factor
        w_bar = math.ceil(width * beta / factor) * factor
    # transformers goes past its own limit for long, thin images; an engine cannot.
    tokens = h_bar * w_bar // factor**2
    if not 1 <= tokens <= config.max_image_tokens:
        raise RequestError(
            f"{where}: image is {width}x{height} pixels, which needs {tokens} image tokens; the engine takes 1 to "
            f"{config.max_image_tokens}, crop the longer side"
        )
    return h_bar, w_bar


@lru_cache(maxsize=4)
def _normalized_values(config: VisionConfig) -> npt.NDArray[np.float32]:
    """The normalized value of each byte, [3, 256]: a table keeps transformers' rounding without its arithmetic."""
    rescaled = (np.arange(256, dtype=np.float64) * config.rescale_factor).astype(np.float32)
    mean = np.array(config.image_mean, dtype=np.float32)
    std = np.array(config.image_std, dtype=np.float32)
    table: npt.NDArray[np.float32] = (rescaled[None, :] - mean[:, None]) / std[:, None]
    return table


def patchify(pixels_HWC: npt.NDArray[np.uint8], config: VisionConfig) -> torch.Tensor:
    """Normalized patches [P, C * temporal * patch * patch] fp32 of a resized picture; the frame repeats along time."""
    p, m, t = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    grid_h, grid_w = pixels_HWC.shape[0] // p, pixels_HWC.shape[1] // p
    blocks = pixels_HWC.reshape(grid_h // m, m, p, grid_w // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    patches_PCx = np.ascontiguousarray(blocks).reshape(grid_h * grid_w, 3, p * p)
    out_PCTx = np.empty((grid_h * grid_w, 3, t, p * p), dtype=np.float32)
    table = _normalized_values(config)
    for channel in range(3):
        # mode="clip" lets take write straight into `out`; a byte is never out of range.
        np.take(table[channel], patches_PCx[:, channel], out=out_PCTx[:, channel, 0], mode="clip")
    out_PCTx[:, :, 1:] = out_PCTx[:, :, :1]
    return torch.from_numpy(out_PCTx.reshape(grid_h * grid_w, -1))


def _axis_taps(size: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of `size` positions along an axis of a `side`-long table: two entries [size, 2] and their weights."""
    source = torch.arange(size, dtype=torch.float32) * (side - 1) / max(size - 1, 1)
    floor = torch.floor(source)
    offsets = torch.arange(2)
    taps = (floor.long()[:, None] + offsets).clamp(0, side - 1)
    weights = (1 - (source[:, None] - floor[:, None] - offsets).abs()).clamp(min=0)
    return taps, weights


def _merge_order(grid: torch.Tensor, merge: int) -> torch.Tensor:
    """[gh, gw, ...] from raster order to merge-block order, [gh * gw, ...]."""
    gh, gw, *rest = grid.shape
    return grid.reshape(gh // merge, merge, gw // merge, merge, *rest).transpose(1, 2).reshape(gh * gw, *rest)


@lru_cache(maxsize=16)
def position_inputs(grid_h: int, grid_w: int, config: VisionConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The encoder's position inputs of a `grid_h` x `grid_w` image; cached, so never write into them.

    `pos_embed_indices` [4, P] int64 and `pos_embed_weights` [4, P] fp32 interpolate the square table of learned
    positions (bilinear, corners aligned); `rotary_cos_sin` [P, D] fp32 holds D/2 cosines (height, then width
    frequencies), then D/2 sines. Source: transformers' vision_utils and Qwen3VLVisionRotaryEmbedding.
    """
    merge, side = config.spatial_merge_size, math.isqrt(config.num_position_embeddings)
    (h_taps, h_weights), (w_taps, w_weights) = _axis_taps(grid_h, side), _axis_taps(grid_w, side)
    indices = (h_taps * side)[:, None, :, None] + w_taps[None, :, None, :]
    weights = h_weights[:, None, :, None] * w_weights[None, :, None, :]
    half = config.head_dim // 2
    inv_freq = 1.0 / (config.rope_theta ** (torch.arange(0, half, 2, dtype=torch.float32) / half))
    h_angles = (torch.arange(grid_h, dtype=torch.float32)[:, None] * inv_freq)[:, None].expand(-1, grid_w, -1)
    w_angles = (torch.arange(grid_w, dtype=torch.float32)[:, None] * inv_freq)[None].expand(grid_h, -1, -1)
    angles = _merge_order(torch.cat([h_angles, w_angles], dim=-1), merge)
    return (
        _merge_order(indices.flatten(2), merge).T.contiguous(),
        _merge_order(weights.flatten(2), merge).T.contiguous(),
        torch.cat([angles.cos(), angles.sin()], dim=-1),
    )


def expand_image_tokens(token_ids: Sequence[int], images: Sequence[PreparedImage], image_token_id: int) -> list[int]:
    """`token_ids` with the k-th image token repeated `images[k].num_tokens` times.

    Raises RequestError when there are not exactly as many image tokens as images.
    """
    found = sum(1 for token in token_ids if token == image_token_id)
    if found != len(images):
        raise RequestError(
            f"prompt has {found} image tokens but {len(images)} images came with it; give one image for each, and do "
            "not write the image token in text"
        )
    expanded: list[int] = []
    remaining = iter(images)
    for token in token_ids:
        if token == image_token_id:
            expanded.extend([token] * next(remaining).num_tokens)
        else:
            expanded.append(token)
    return expanded


def mrope_positions(
    token_ids: Sequence[int], grids: Sequence[Grid], image_token_id: int, merge: int
) -> tuple[torch.Tensor, int]:
    """Rotary positions [3, S] int64 (time, height, width) of an expanded prompt, and the position that follows it.

    Text counts up in all three rows; an image stands still in time and spreads over its rows and columns; text after
    it goes on from the larger side. Equal to transformers' `get_rope_index`. Raises RequestError when the image
    tokens do not fit the grids.
    """
    is_image = np.asarray(token_ids, dtype=np.int64) == image_token_id
    positions = np.empty((3, len(token_ids)), dtype=np.int64)
    cursor = next_position = 0
    counts = [t * (h // merge) * (w // merge) for t, h, w in grids]
    if int(is_image.sum()) != sum(counts):
        raise RequestError(f"prompt has {int(is_image.sum())} image tokens; its images need {sum(counts)}")
    for (t, gh, gw), count in zip(grids, counts, strict=True):
        start = cursor + int(is_image[cursor:].argmax())
        if not is_image[start : start + count].all():
            raise RequestError(
                f"prompt: the image tokens from token {start} on are fewer than the {count} of their image"
            )
        positions[:, cursor:start] = np.arange(next_position, next_position + start - cursor)
        next_position += start - cursor
        rows, columns = gh // merge, gw // merge
        positions[:, start : start + count] = np.indices((t, rows, columns)).reshape(3, -1) + next_position
        next_position += max(rows, columns)
        cursor = start + count
    text = len(token_ids) - cursor
    positions[:, cursor:] = np.arange(next_position, next_position + text)
    return torch.from_numpy(positions), next_position + text


class Qwen3VLRunner:
    """The visual runner of Qwen3-VL (see `edgellm.vision.base.VisualRunner`)."""

    def __init__(self, config: VisionConfig, device: torch.device, output_dtype: torch.dtype) -> None:
        self.config = config
        self._device = device
        self._output_dtype = output_dtype

    @property
    def image_token_id(self) -> int:
        """Id of <|image_pad|>."""
        return self.config.image_token_id

    @property
    def max_image_tokens(self) -> int:
        """Most tokens that one image may take."""
        return self.config.max_image_tokens

    def prepare(self, image: ImageInput, where: str = "image") -> PreparedImage:
        """Check, resize and patchify one image; callable from any thread. Raises RequestError naming `where`."""
        picture = load_image(image, max_pixels=self.config.max_input_pixels, where=where)
        height, width = smart_resize(picture.height, picture.width, self.config, where)
        pixels_HWC = np.asarray(picture.resize((width, height), resample=Image.Resampling.BICUBIC))
        grid = (1, height // self.config.patch_size, width // self.config.patch_size)
        digest = hashlib.sha256(f"{height}x{width}:".encode())
        digest.update(np.ascontiguousarray(pixels_HWC).data)
        return PreparedImage(
            pixel_values=patchify(pixels_HWC, self.config),
            grid_thw=grid,
            num_tokens=grid[1] * grid[2] // self.config.spatial_merge_size**2,
            key=digest.hexdigest(),
        )

    def encode(self, engine: EncoderEngine, image: PreparedImage) -> VisualFeatures:
        """Run the encoder on one image: [N, H] features and `num_deepstack` more of them, on the runner's device."""
        _, grid_h, grid_w = image.grid_thw
        indices, weights, rotary = position_inputs(grid_h, grid_w, self.config)
        inputs = {
            "pixel_values": image.pixel_values,
            "pos_embed_indices": indices,
            "pos_embed_weights": weights,
            "rotary_cos_sin": rotary,
        }
        names = ["image_embeds", *(f"deepstack_embeds_{i}" for i in range(self.config.num_deepstack))]
        shape = (image.num_tokens, self.config.out_hidden_size)
        outputs = {name: torch.empty(shape, dtype=self._output_dtype, device=self._device) for name in names}
        engine.run(ENCODE_PHASE, {name: x.to(self._device) for name, x in inputs.items()}, outputs)
        return VisualFeatures(outputs["image_embeds"], tuple(outputs[name] for name in names[1:]))

    def expand_image_tokens(self, token_ids: Sequence[int], images: Sequence[PreparedImage]) -> list[int]:
        """See the module's `expand_image_tokens`."""
        return expand_image_tokens(token_ids, images, self.config.image_token_id)

    def mrope_positions(self, token_ids: Sequence[int], grids: Sequence[Grid]) -> tuple[torch.Tensor, int]:
        """See the module's `mrope_positions`."""
        return mrope_positions(token_ids, grids, self.config.image_token_id, self.config.spatial_merge_size)


def load_runner(config: Mapping[str, Any], device: torch.device, output_dtype: torch.dtype) -> Qwen3VLRunner:
    """The registry's entry: a runner from `VisionConfig.to_dict()`."""
    return Qwen3VLRunner(VisionConfig.from_dict(config), device, output_dtype)


def config_from_checkpoint(hf_config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """The registry's entry: `VisionConfig.to_dict()` from a checkpoint's files."""
    return VisionConfig.from_checkpoint(hf_config, preprocessor).to_dict()


def limit_image_tokens(config: Mapping[str, Any], min_image_tokens: int, max_image_tokens: int) -> dict[str, Any]:
    """The registry's entry: `VisionConfig.with_token_limits` on its dict form."""
    return VisionConfig.from_dict(config).with_token_limits(min_image_tokens, max_image_tokens).to_dict()
