"""The camera side of the model node: keep the newest frame, and nothing but the newest.

Frames are kept as they came off the wire (`raw=True`): one that is never used is never deserialized or converted.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from builtin_interfaces.msg import Time as TimeMessage
from rclpy.callback_groups import CallbackGroup
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from rclpy.time import Time
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from edgellm_ros.convert import RGB, ImageError, to_rgb

NEWEST_ONLY = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
NANOSECONDS = 1e9


@dataclass(frozen=True)
class Frame:
    """A picture, where and when it was taken, and how many frames before it nobody looked at."""

    rgb: RGB
    header: Header
    age_s: float  # node clock minus header.stamp when the frame was handed out
    skipped: int


class Camera:
    """Subscribes to `image` and `image/compressed`; whichever has the newest frame serves it."""

    def __init__(self, node: Node, group: CallbackGroup) -> None:
        self._node = node
        self._lock = threading.Lock()
        self._newest: tuple[type, bytes, Time] | None = None
        self._received = 0
        self._handed_out = 0  # value of _received when the last frame was handed out
        self._subscriptions = [
            node.create_subscription(
                kind,
                topic,
                lambda data, kind=kind: self._keep(kind, data),
                NEWEST_ONLY,
                callback_group=group,
                raw=True,
            )
            for kind, topic in ((Image, "image"), (CompressedImage, "image/compressed"))
        ]

    @property
    def topics(self) -> str:
        """The topics in words, after namespace and remapping."""
        return " or ".join(subscription.topic_name for subscription in self._subscriptions)

    @property
    def received(self) -> int:
        """Frames since the node started."""
        return self._received

    def _keep(self, kind: type, data: bytes) -> None:
        arrived = self._node.get_clock().now()
        with self._lock:
            self._newest = (kind, data, arrived)
            self._received += 1

    def newest(self, max_age_s: float) -> Frame:
        """The newest frame; `max_age_s` 0 takes it however old it is. Blocks for the conversion: not for the executor.

        Raises ImageError when no frame has come yet, the newest is too old, or it cannot be converted.
        """
        with self._lock:
            newest, received = self._newest, self._received
            skipped = max(0, received - self._handed_out - 1)
            self._handed_out = received
        if newest is None:
            raise ImageError(f"no image has arrived on {self.topics}; start a camera or remap the topic")
        kind, data, arrived = newest
        message = deserialize_message(data, kind)
        if message.header.stamp == TimeMessage():  # a camera that does not stamp its frames
            message.header.stamp = arrived.to_msg()
        age = self.age(message.header)
        if max_age_s and age > max_age_s:
            raise ImageError(
                f"the newest image on {self.topics} is {age:.1f} s old, more than the {max_age_s:g} s allowed; "
                "is the camera still running, and do both machines have the same time?"
            )
        return Frame(to_rgb(message), message.header, age, skipped)

    def age(self, header: Header) -> float:
        """Seconds from a header's stamp until now, by the node's clock."""
        return (self._node.get_clock().now().nanoseconds - Time.from_msg(header.stamp).nanoseconds) / NANOSECONDS
