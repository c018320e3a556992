"""What the demo knows about the world: the camera's frames, the truth about each, and questions worth asking."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import Image
from std_msgs.msg import String

from edgellm_ros.convert import RGB, to_rgb
from edgellm_ros.scenes import NotAskableError, Query, Scene, answer, phrase, propose, scene_from_dict

Stamp = tuple[int, int]  # seconds, nanoseconds
T = TypeVar("T")
REMEMBERED_FRAMES = 120
LEAST_OBJECTS = 2
# A question is asked only if its answer stays the same for this long as far as the motion can tell: seconds ahead.
LOOK_AHEAD_S, LOOK_AHEAD_STEP_S = 0.3, 0.05


@dataclass(frozen=True)
class Question:
    """A question in words, and what it means."""

    text: str
    query: Query

    def truth(self, scene: Scene) -> str | None:
        """The one right answer about a scene; None when the scene leaves it open."""
        return answer(scene, self.query)


class World:
    """Listens to the simulated camera; used from the demo's thread, fed from the connection's."""

    def __init__(self, node: Node, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._lock = threading.Lock()
        self._scenes: OrderedDict[Stamp, Scene] = OrderedDict()
        self._images: OrderedDict[Stamp, Image] = OrderedDict()
        self._asked_about: int | None = None
        self._examined: Stamp | None = None
        node.create_subscription(String, "ground_truth", self._on_truth, QoSProfile(depth=30))
        node.create_subscription(Image, "image", self._on_image, QoSProfile(depth=10))

    def _on_truth(self, message: String) -> None:
        truth = json.loads(message.data)
        stamp = truth["stamp"]
        self._remember(self._scenes, (stamp["sec"], stamp["nanosec"]), scene_from_dict(truth))

    def _on_image(self, message: Image) -> None:
        self._remember(self._images, (message.header.stamp.sec, message.header.stamp.nanosec), message)

    def _remember(self, memory: OrderedDict[Stamp, T], stamp: Stamp, thing: T) -> None:
        with self._lock:
            memory[stamp] = thing
            while len(memory) > REMEMBERED_FRAMES:
                memory.popitem(last=False)

    @property
    def frames(self) -> int:
        """Frames in memory."""
        return len(self._images)

    def knows(self, stamp: Stamp) -> bool:
        """Whether frame and truth of that moment have arrived (and are not forgotten)."""
        with self._lock:
            return stamp in self._scenes and stamp in self._images

    def scene(self, stamp: Stamp) -> Scene:
        """The truth about the frame of that moment."""
        return self._scenes[stamp]

    def picture(self, stamp: Stamp) -> RGB:
        """The frame of that moment as it came over the topic."""
        return to_rgb(self._images[stamp])

    def question(self, kind: str) -> Question | None:
        """A question of that kind about the newest frame, if it shows a scene that was not asked about and has one."""
        with self._lock:
            stamp, scene = next(reversed(self._scenes.items()), (None, None))
        if scene is None or stamp == self._examined:
            return None
        self._examined = stamp
        if scene.look.noise_seed == self._asked_about or len(scene.objects) < LEAST_OBJECTS:
            return None
        try:
            query = propose(scene, kind, self._rng)
        except NotAskableError:
            return None
        if not _stays_clear(scene, query):
            return None
        self._asked_about = scene.look.noise_seed
        return Question(phrase(query, self._rng), query)


def _stays_clear(scene: Scene, query: Query) -> bool:
    later, expected = scene_from_dict(scene.to_dict()), answer(scene, query)
    for _ in range(round(LOOK_AHEAD_S / LOOK_AHEAD_STEP_S)):
        later.step(LOOK_AHEAD_STEP_S)
        if answer(later, query) != expected:
            return False
    return True
