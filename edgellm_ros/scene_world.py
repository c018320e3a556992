"""The synthetic world in front of the simulated camera: coloured shapes that move, and how a scene is drawn at random.

Needs numpy only. Lengths are in *heights*: the frame is 1.0 high and ``aspect`` wide, x grows to the right and y grows
downwards. Pixels come in with the renderer (`scene_render.py`), questions with `scene_questions.py`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "white")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "large")
BACKGROUNDS = ("plain", "gradient", "checker", "stripes", "horizon", "clouds")
MAX_OBJECTS = 6
DEFAULT_ASPECT = 320 / 256
# The gap between the two classes is wide on purpose: "small" and "large" are never borderline.
RADIUS_RANGE = {"small": (0.055, 0.075), "large": (0.115, 0.150)}
MAX_RADIUS = RADIUS_RANGE["large"][1]
# Objects keep this multiple of their radii apart, so none ever hides another.
SPACING = 1.12
# One stream of random numbers per split; a scene of one split can never be a scene of another.
SPLITS = {"train": 1, "held_out": 2, "live": 3, "test": 4}

_COUNT_WEIGHTS = np.array([0.03, 0.13, 0.20, 0.22, 0.19, 0.13, 0.10])
_RGB_RANGE = {  # per channel (low, high), before light and noise
    "red": ((0.78, 0.95), (0.04, 0.14), (0.04, 0.14)),
    "orange": ((0.92, 1.00), (0.43, 0.54), (0.00, 0.08)),
    "yellow": ((0.92, 1.00), (0.84, 0.95), (0.05, 0.20)),
    "green": ((0.05, 0.18), (0.58, 0.75), (0.10, 0.25)),
    "blue": ((0.05, 0.15), (0.22, 0.38), (0.80, 0.98)),
    "purple": ((0.48, 0.60), (0.10, 0.20), (0.62, 0.80)),
    "white": ((0.95, 1.00), (0.95, 1.00), (0.95, 1.00)),
}


@dataclass
class SceneObject:
    """One coloured shape. Radius, position and velocity are in heights (and heights per second), angle in radians."""

    color: str
    shape: str
    size: str
    radius: float
    x: float
    y: float
    vx: float
    vy: float
    angle: float
    rgb: tuple[float, float, float]


@dataclass(frozen=True)
class Look:
    """What the picture looks like apart from its objects: background, light and sensor noise. Colours are in [0, 1]."""

    background: str
    color_a: tuple[float, float, float]
    color_b: tuple[float, float, float]
    angle: float
    scale: float
    phase: float
    brightness: float
    tint: tuple[float, float, float]
    light_slope: tuple[float, float]
    noise: float
    noise_seed: int


@dataclass
class Scene:
    """Objects in front of a camera at one moment. `step` moves time on; everything else reads the current state."""

    aspect: float
    look: Look
    objects: list[SceneObject] = field(default_factory=list)
    frame: int = 0

    def step(self, dt: float) -> None:
        """Move every object by `dt` seconds; objects bounce off the frame's edges and off each other."""
        for obj in self.objects:
            obj.x, obj.vx = _bounce(obj.x + obj.vx * dt, obj.vx, obj.radius, self.aspect - obj.radius)
            obj.y, obj.vy = _bounce(obj.y + obj.vy * dt, obj.vy, obj.radius, 1.0 - obj.radius)
        for i, a in enumerate(self.objects):
            for b in self.objects[i + 1 :]:
                _collide(a, b)
        self.frame += 1

    def to_dict(self) -> dict[str, Any]:
        """The whole state as JSON-ready values; `scene_from_dict` is the inverse."""
        return asdict(self)


def _bounce(position: float, velocity: float, low: float, high: float) -> tuple[float, float]:
    if position < low:
        return min(2 * low - position, high), abs(velocity)
    if position > high:
        return max(2 * high - position, low), -abs(velocity)
    return position, velocity


def _collide(a: SceneObject, b: SceneObject) -> None:
    """Equal-mass elastic collision: exchange the velocity components along the line of centres."""
    dx, dy = b.x - a.x, b.y - a.y
    distance = math.hypot(dx, dy)
    if distance == 0.0 or distance >= SPACING * (a.radius + b.radius):
        return
    nx, ny = dx / distance, dy / distance
    closing = (a.vx - b.vx) * nx + (a.vy - b.vy) * ny
    if closing > 0.0:
        a.vx, a.vy = a.vx - closing * nx, a.vy - closing * ny
        b.vx, b.vy = b.vx + closing * nx, b.vy + closing * ny


def scene_rng(split: str, seed: int) -> np.random.Generator:
    """The random stream number `seed` of a split (one of `SPLITS`); streams of different splits are unrelated."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; valid: {', '.join(SPLITS)}")
    return np.random.default_rng([SPLITS[split], seed])


def sample_scene(rng: np.random.Generator, aspect: float = DEFAULT_ASPECT) -> Scene:
    """A random scene of 0 to 6 objects that do not overlap, `aspect` heights wide."""
    wanted = int(rng.choice(len(_COUNT_WEIGHTS), p=_COUNT_WEIGHTS))
    objects: list[SceneObject] = []
    repeat = 0.25 if wanted > 1 else 0.0
    for _ in range(wanted):
        if objects and rng.random() < repeat:  # twins make counting interesting
            color, shape = objects[-1].color, objects[-1].shape
        else:
            color, shape = COLORS[rng.integers(len(COLORS))], SHAPES[rng.integers(len(SHAPES))]
        placed = _place(rng, objects, color, shape, aspect)
        if placed is not None:
            objects.append(placed)
    rng.shuffle(objects)
    return Scene(aspect=aspect, look=_sample_look(rng), objects=objects)


def _place(
    rng: np.random.Generator, objects: list[SceneObject], color: str, shape: str, aspect: float
) -> SceneObject | None:
    """A new object in free space, or None when 40 tries found none."""
    size = SIZES[rng.integers(len(SIZES))]
    radius = float(rng.uniform(*RADIUS_RANGE[size]))
    for _ in range(40):
        x, y = float(rng.uniform(radius, aspect - radius)), float(rng.uniform(radius, 1.0 - radius))
        if all(math.hypot(x - o.x, y - o.y) >= SPACING * (radius + o.radius) for o in objects):
            speed, heading = float(rng.uniform(0.04, 0.16)), float(rng.uniform(0, 2 * math.pi))
            red, green, blue = (float(rng.uniform(*bounds)) for bounds in _RGB_RANGE[color])
            angle = float(rng.uniform(-0.26, 0.26))
            vx, vy = speed * math.cos(heading), speed * math.sin(heading)
            return SceneObject(color, shape, size, radius, x, y, vx, vy, angle, (red, green, blue))
    return None


def _sample_look(rng: np.random.Generator) -> Look:
    # Backgrounds stay dull and not too bright, so that every object colour (white too) stands out.
    level = rng.uniform(0.10, 0.58)
    color_a = np.clip(level + rng.uniform(-0.07, 0.07, 3), 0.03, 0.65)
    color_b = np.clip(level + rng.uniform(-0.20, 0.12) + rng.uniform(-0.07, 0.07, 3), 0.03, 0.68)
    return Look(
        background=BACKGROUNDS[rng.integers(len(BACKGROUNDS))],
        color_a=_triple(color_a),
        color_b=_triple(color_b),
        angle=float(rng.uniform(0, math.pi)),
        scale=float(rng.uniform(0.06, 0.30)),
        phase=float(rng.uniform(0.25, 0.75)),
        brightness=float(rng.uniform(0.75, 1.12)),
        tint=_triple(rng.uniform(0.94, 1.06, 3)),
        light_slope=(float(rng.uniform(-0.22, 0.22)), float(rng.uniform(-0.22, 0.22))),
        noise=float(rng.uniform(0.0, 0.045)),
        noise_seed=int(rng.integers(1 << 30)),
    )


def _triple(values: np.ndarray) -> tuple[float, float, float]:
    return float(values[0]), float(values[1]), float(values[2])


def scene_from_dict(state: dict[str, Any]) -> Scene:
    """Rebuild a scene from `Scene.to_dict()` (also after a trip through JSON)."""
    objects = [replace(SceneObject(**obj), rgb=tuple(obj["rgb"])) for obj in state["objects"]]
    look = state["look"]
    pairs = {key: tuple(look[key]) for key in ("color_a", "color_b", "tint", "light_slope")}
    return Scene(state["aspect"], Look(**{**look, **pairs}), objects, state["frame"])
