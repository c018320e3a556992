"""Synthetic scenes: repeatable, separate per split, never overlapping while they move, and drawn where they say."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

from edgellm_ros.scenes import Scene, render, sample_scene, scene_from_dict, scene_rng

SIZE = (320, 256)


def draw(split: str, count: int) -> list[Scene]:
    return [sample_scene(scene_rng(split, seed)) for seed in range(count)]


def closest(scene: Scene) -> float:
    """The smallest distance between two objects, in sums of their radii."""
    pairs = itertools.combinations(scene.objects, 2)
    return min((math.hypot(a.x - b.x, a.y - b.y) / (a.radius + b.radius) for a, b in pairs), default=9.0)


def test_a_seed_gives_the_same_scene_and_pixels() -> None:
    first, second = draw("test", 5), draw("test", 5)
    assert first == second
    assert torch.equal(render(first, SIZE), render(second, SIZE))


def test_splits_share_no_scene() -> None:
    states = [json.dumps(s.to_dict()) for split in ("train", "held_out", "live", "test") for s in draw(split, 300)]
    assert len(set(states)) == len(states)


def test_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match="'dev'.*train, held_out, live, test"):
        scene_rng("dev", 0)


def test_scenes_are_varied_and_objects_stay_apart_inside_the_frame() -> None:
    scenes = draw("test", 400)
    assert {len(s.objects) for s in scenes} == set(range(7))
    assert {s.look.background for s in scenes} == {"plain", "gradient", "checker", "stripes", "horizon", "clouds"}
    objects = [(s, o) for s in scenes for o in s.objects]
    assert len({(o.color, o.shape, o.size) for _, o in objects}) == 7 * 6 * 2
    for scene, obj in objects:
        assert obj.radius <= obj.x <= scene.aspect - obj.radius
        assert obj.radius <= obj.y <= 1 - obj.radius
    assert min(closest(s) for s in scenes) > 1.1


def test_moving_objects_stay_in_the_frame_and_apart() -> None:
    scene = next(s for s in draw("test", 50) if len(s.objects) == 6)
    start = [(o.x, o.y) for o in scene.objects]
    for _ in range(30 * 60):
        scene.step(1 / 30)
        assert closest(scene) > 1.0
        assert all(
            o.radius <= o.x <= scene.aspect - o.radius and o.radius <= o.y <= 1 - o.radius for o in scene.objects
        )
    assert scene.frame == 1800
    assert all(math.dist(before, (o.x, o.y)) > 0.01 for before, o in zip(start, scene.objects, strict=True))


def test_state_survives_json() -> None:
    scene = draw("test", 20)[-1]
    scene.step(0.5)
    rebuilt = scene_from_dict(json.loads(json.dumps(scene.to_dict())))
    assert rebuilt == scene
    assert torch.equal(render([rebuilt], SIZE), render([scene], SIZE))


@pytest.mark.parametrize("size", [(320, 256), (256, 256), (640, 480), (96, 64)])
def test_a_batch_draws_what_single_scenes_draw(size: tuple[int, int]) -> None:
    scenes = draw("test", 12)
    batch = render(scenes, size)
    assert batch.dtype == torch.uint8
    assert batch.shape == (12, size[1], size[0], 3)
    for scene, frame in zip(scenes, batch, strict=True):
        assert (render([scene], size)[0].int() - frame.int()).abs().max() <= 1


def test_objects_are_drawn_where_and_in_the_colour_the_scene_says() -> None:
    for scene in draw("test", 200):
        # What light and tint do to a white patch tells what colour to expect of the object.
        frame = render([scene], SIZE)[0].double().numpy() / 255
        for obj in scene.objects:
            x, y = obj.x / scene.aspect, obj.y
            away = 0.7 * obj.radius if obj.shape == "ring" else 0.0  # a ring is empty in the middle
            column, line = int((x + away / scene.aspect) * SIZE[0]), int(y * SIZE[1])
            seen = frame[line - 1 : line + 2, column - 1 : column + 2].mean((0, 1))
            slope = 1 + scene.look.light_slope[0] * (x - 0.5) + scene.look.light_slope[1] * (y - 0.5)
            expected = np.array(obj.rgb) * np.array(scene.look.tint) * scene.look.brightness * slope
            # The margin covers noise (9 pixels averaged), the ring's sloping light and its shaded rim.
            assert np.abs(seen - expected.clip(0, 1)).max() < (0.25 if obj.shape == "ring" else 0.09), (obj, seen)


def test_noise_changes_from_frame_to_frame() -> None:
    scene = next(s for s in draw("test", 50) if s.look.noise > 0.02 and not s.objects)
    before = render([scene], SIZE)
    scene.step(1 / 30)
    assert (render([scene], SIZE) != before).float().mean() > 0.5
