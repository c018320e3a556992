"""Synthetic camera scenes: draw them, move them, render them, ask about them. The one module to import.

    rng = scene_rng("live", 7)
    scene = sample_scene(rng)
    scene.step(1 / 30)
    frame = render([scene], (320, 256))[0].numpy()      # uint8 [256, 320, 3], RGB
    question, reply = ask(scene, "where", rng)

The parts: `scene_world.py` (objects, motion), `scene_questions.py` (questions and answers), `scene_render.py` (pixels).
Needs numpy and torch, no ROS.
"""

from edgellm_ros.scene_questions import (
    KINDS,
    STYLES,
    Example,
    NotAskableError,
    Noun,
    Query,
    answer,
    ask,
    clear_queries,
    examples,
    ground_truth,
    phrase,
    propose,
)
from edgellm_ros.scene_render import render
from edgellm_ros.scene_world import COLORS, SHAPES, SIZES, Scene, SceneObject, sample_scene, scene_from_dict, scene_rng

__all__ = [
    "COLORS",
    "KINDS",
    "SHAPES",
    "SIZES",
    "STYLES",
    "Example",
    "NotAskableError",
    "Noun",
    "Query",
    "Scene",
    "SceneObject",
    "answer",
    "ask",
    "clear_queries",
    "examples",
    "ground_truth",
    "phrase",
    "propose",
    "render",
    "sample_scene",
    "scene_from_dict",
    "scene_rng",
]
