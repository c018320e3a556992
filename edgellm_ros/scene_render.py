"""Pixels of synthetic scenes, for a whole batch at once on any torch device.

Each shape is a signed distance to its outline, evaluated on a small square around the object and blended into the
background with a soft edge. The same scene gives the same picture on every device, up to rounding.

Shape letters: N scenes, H rows, W columns, S side of an object's square in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgellm_ros.scene_world import BACKGROUNDS, Scene, SceneObject

# Sensor noise is read from one long fixed tape of normal numbers, each frame at another place: cheap and repeatable.
_TAPE_STARTS = 1 << 20
_EDGE_PX = 0.75
_OUTLINE = 0.10  # of the radius: a darker rim, as paint and shadow give real objects


@dataclass(frozen=True)
class SceneTable:
    """Scenes as numbers, ready to render: cheap to send between processes. Rows are scenes."""

    backgrounds: npt.NDArray[np.int64]  # [N], index into BACKGROUNDS
    looks: npt.NDArray[np.float32]  # [N, 17]: aspect, angle, scale, phase, colours a b, brightness, slope, tint, noise
    tape_starts: npt.NDArray[np.int64]  # [N], where each frame's noise begins
    objects: npt.NDArray[np.float32]  # [N, K, 14], see `_shape_numbers`; unused slots have radius 0


def tabulate(scenes: list[Scene]) -> SceneTable:
    """Turn scenes into the numbers that `render_table` draws from."""
    looks = [scene.look for scene in scenes]
    slots = max((len(scene.objects) for scene in scenes), default=0)
    objects = np.zeros((len(scenes), slots, 14), np.float32)
    for row, scene in enumerate(scenes):
        for slot, obj in enumerate(scene.objects):
            objects[row, slot] = _shape_numbers(obj)
    numbers = [
        (s.aspect, k.angle, k.scale, k.phase, *k.color_a, *k.color_b, k.brightness, *k.light_slope, *k.tint, k.noise)
        for s, k in zip(scenes, looks, strict=True)
    ]
    return SceneTable(
        np.array([BACKGROUNDS.index(look.background) for look in looks], np.int64),
        np.array(numbers, np.float32).reshape(len(scenes), 17),
        np.array([(s.look.noise_seed + s.frame * 100_003) % _TAPE_STARTS for s in scenes], np.int64),
        objects,
    )


def render(scenes: list[Scene], size: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """Draw `scenes`, all at the same `size` (width, height) in pixels: uint8 [N, H, W, 3], RGB, on `device`."""
    return render_table(tabulate(scenes), size, device)


def render_table(table: SceneTable, size: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """`render` for scenes that are already tabulated."""
    device = torch.device(device)
    looks = torch.from_numpy(table.looks).to(device)
    image = _backgrounds(table, looks, size, device)
    objects = torch.from_numpy(table.objects).to(device)
    for slot in range(table.objects.shape[1]):
        radii = table.objects[:, slot, 2]
        rows = np.flatnonzero(radii)
        index = torch.from_numpy(rows).to(device)
        least_aspect = float(table.looks[rows, 0].min())
        _blend_objects(image, index, objects[index, slot], looks[index, 0], least_aspect, float(radii.max()))
    return _expose(image, looks, table.tape_starts)


def _backgrounds(table: SceneTable, looks: Tensor, size: tuple[int, int], device: torch.device) -> Tensor:
    """Backgrounds as float [N, 3, H, W] in [0, 1]: two colours mixed by a pattern."""
    width, height = size
    x = (torch.arange(width, device=device) + 0.5) / width
    y = (torch.arange(height, device=device) + 0.5) / height
    mix = torch.empty(len(looks), 1, height, width, device=device)
    for number, name in enumerate(BACKGROUNDS):
        rows = np.flatnonzero(table.backgrounds == number)
        if len(rows):
            index = torch.from_numpy(rows).to(device)
            mix[index, 0] = _pattern(name, looks[index, 1:4], x * looks[index, :1], y)
    return torch.lerp(looks[:, 4:7, None, None], looks[:, 7:10, None, None], mix)


def _pattern(name: str, knobs: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """One background pattern as the share of the second colour, [N, H, W]; x [N, W] and y [H] are in heights."""
    angle, scale, phase = knobs.unbind(1)
    across, along = x[:, None, :], y[None, :, None]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    scale, phase = scale[:, None, None], phase[:, None, None]
    if name == "plain":
        return torch.zeros_like(across + along)
    if name == "horizon":  # a wall above a floor that gets lighter towards the camera
        return torch.where(along > phase, 0.5 + 0.5 * (along - phase), torch.zeros_like(across))
    if name == "checker":
        return ((across / scale).floor() + (along / scale + phase).floor()).remainder(2.0)
    slope = across * cos + along * sin
    if name == "gradient":
        return (slope + 1.0 - phase).clamp(0.0, 1.0)
    if name == "stripes":
        return ((slope / scale).remainder(1.0) > phase).float()
    cross = along * cos - across * sin
    return 0.5 + 0.25 * ((slope * 7 + 9 * phase).sin() + (cross * 11 + 5 * angle[:, None, None] + slope * 3).sin())


def _blend_objects(
    image: Tensor, rows: Tensor, objects: Tensor, aspect: Tensor, least_aspect: float, largest: float
) -> None:
    """Draw one object [R, 14] into each of the `rows` [R] of `image` [N, 3, H, W], in place; aspect is [R].

    `least_aspect` and `largest` (radius) are bounds known on the host: they size the square without asking the device.
    """
    height, width = image.shape[2:]
    x0, y0, radius = objects[:, 0], objects[:, 1], objects[:, 2]
    x_scale = width / aspect  # pixels per height, across
    side_x = min(width, 2 * math.ceil(largest * width / least_aspect + 2))
    side_y = min(height, 2 * math.ceil(largest * height + 2))
    left = (x0 * x_scale - side_x / 2).round().clamp(0, width - side_x)
    top = (y0 * height - side_y / 2).round().clamp(0, height - side_y)
    columns = left[:, None] + torch.arange(side_x, device=image.device)
    lines = top[:, None] + torch.arange(side_y, device=image.device)
    dx = (columns + 0.5) / x_scale[:, None] - x0[:, None]
    dy = (lines + 0.5) / height - y0[:, None]
    distance = _signed_distance(objects, dx, dy)
    cover = (0.5 - distance * (height / (2 * _EDGE_PX))).clamp(0.0, 1.0)[..., None]
    rim = (1.0 + (distance / (_OUTLINE * radius[:, None, None])).clamp(-1.0, 0.0))[..., None]
    color = objects[:, None, None, 3:6] * (1.0 - 0.35 * rim)
    at = (rows[:, None, None], slice(None), lines.long()[:, :, None], columns.long()[:, None, :])
    image[at] = torch.lerp(image[at], color, cover)  # [R, S, S, 3]: the advanced indices come first


def _shape_numbers(obj: SceneObject) -> tuple[float, ...]:
    """A shape as 14 numbers: place, radius, colour, turn, and the outline for `_signed_distance`.

    Round shapes are ``| |p| - hole | - band``. The others have `fold` equal corners: in the sector of one corner they
    are cut by two straight lines, each given by the direction of its normal and its distance from the centre.
    """
    r = obj.radius
    far = 10.0
    outlines = {  # fold, normal 1, offset 1, normal 2, offset 2, hole, band
        "circle": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.88 * r),
        "ring": (0.0, 0.0, 0.0, 0.0, 0.0, 0.70 * r, 0.24 * r),
        "triangle": (3.0, math.pi / 3, r * math.cos(math.pi / 3), 0.0, far, 0.0, 0.0),
        "square": (4.0, math.pi / 4, r * math.cos(math.pi / 4), 0.0, far, 0.0, 0.0),
        "star": (5.0, math.radians(66), r * math.cos(math.radians(66)), 0.0, far, 0.0, 0.0),
        "cross": (4.0, 0.0, 0.95 * r, math.pi / 2, 0.30 * r, 0.0, 0.0),
    }
    # Corners point up; a square lies flat, so its corner points to the upper right.
    turn = obj.angle - math.pi / 2 + (math.pi / 4 if obj.shape == "square" else 0.0)
    return (obj.x, obj.y, r, *obj.rgb, turn, *outlines[obj.shape])


def _signed_distance(numbers: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Distance to each object's outline in heights, negative inside; dx [N, S], dy [N, S] -> [N, S, S]."""
    turn, fold, angle1, offset1, angle2, offset2, hole, band = numbers[:, 6:, None, None].unbind(1)
    px, py = dx[:, None, :], dy[:, :, None]
    length = torch.hypot(px, py)
    sector = (2 * math.pi) / fold.clamp(min=1.0)
    bearing = torch.atan2(py, px) - turn
    bearing = bearing - sector * (bearing / sector).round()
    along, beside = length * bearing.cos(), length * bearing.sin().abs()
    line1 = along * angle1.cos() + beside * angle1.sin() - offset1
    line2 = along * angle2.cos() + beside * angle2.sin() - offset2
    return torch.where(fold > 0, torch.maximum(line1, line2), (length - hole).abs() - band)


def _expose(image: Tensor, looks: Tensor, tape_starts: npt.NDArray[np.int64]) -> Tensor:
    """Light, tint and noise on linear colours [N, 3, H, W] -> uint8 [N, H, W, 3]."""
    count, _, height, width = image.shape
    brightness, slope_x, slope_y = looks[:, 10:13, None, None].unbind(1)
    x = torch.linspace(-0.5, 0.5, width, device=image.device)
    y = torch.linspace(-0.5, 0.5, height, device=image.device)
    shade = (1.0 + slope_x * x + slope_y * y[:, None]) * brightness
    pixels = image.permute(0, 2, 3, 1) * shade[..., None] * looks[:, None, None, 13:16]
    size = height * width * 3
    tape = _noise_tape(size, str(image.device))
    noise = torch.stack([tape[start : start + size] for start in tape_starts.tolist()]).view(count, height, width, 3)
    pixels = torch.addcmul(pixels, noise, looks[:, 16, None, None, None])
    return pixels.mul_(255.0).round_().clamp_(0.0, 255.0).to(torch.uint8)


@lru_cache(maxsize=8)
def _noise_tape(frame_size: int, device: str) -> Tensor:
    numbers = np.random.default_rng(0).standard_normal(_TAPE_STARTS + frame_size, dtype=np.float32)
    return torch.from_numpy(numbers).to(device)
