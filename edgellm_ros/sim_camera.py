"""`sim_camera`: a camera without a camera. Publishes `image`, and for synthetic scenes the truth about every frame.

`ground_truth` (std_msgs/String) is JSON: the frame's header as "stamp": {"sec", "nanosec"} and "frame_id", and the
scene's state, from which `edgellm_ros.scenes` answers any question about that very frame.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from rcl_interfaces.msg import ParameterDescriptor
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import Image
from std_msgs.msg import String

from edgellm.errors import ConfigError
from edgellm_ros.convert import to_message
from edgellm_ros.frames import FrameError, open_source
from edgellm_ros.node_main import run_node

# Reliable: serves reliable and best-effort subscribers alike.
IMAGE_QOS = QoSProfile(depth=1)
TRUTH_QOS = QoSProfile(depth=30)
WARN_PERIOD_S = 5.0
MAX_SIDE = 4096


class SimCamera(Node):
    """The node. Raises ConfigError for a parameter that is not allowed."""

    def __init__(self) -> None:
        super().__init__("sim_camera")
        source = self._parameter("source", "scenes", "scenes, a folder of pictures, or a video file")
        rate = self._parameter("rate", 30.0, "frames per second")
        width = self._parameter("width", 320, "pixels (scenes only)")
        height = self._parameter("height", 256, "pixels (scenes only)")
        seed = self._parameter("seed", 0, "number of the first scene; the same seed shows the same scenes")
        period = self._parameter("scene_period", 10.0, "seconds until another scene appears; 0: never")
        self._frame_id = self._parameter("frame_id", "camera", "frame_id of the images")
        if not 0.01 <= rate <= 1000.0:
            raise ConfigError(f"parameter rate is {rate:g} frames per second; expected 0.01 to 1000")
        if not (16 <= width <= MAX_SIDE and 16 <= height <= MAX_SIDE):
            raise ConfigError(f"parameters width and height are {width} and {height}; expected 16 to {MAX_SIDE}")
        if seed < 0 or period < 0.0:
            raise ConfigError(f"parameters seed and scene_period are {seed} and {period:g}; expected 0 or more")
        self._source = open_source(source, width, height, seed, period)
        self._dt = 1.0 / rate
        self._images = self.create_publisher(Image, "image", IMAGE_QOS)
        self._truths = self.create_publisher(String, "ground_truth", TRUTH_QOS)
        self.create_timer(self._dt, self._publish_frame)
        self.get_logger().info(f"publishing {source} on {self._images.topic_name} at {rate:g} Hz")

    def _parameter(self, name: str, default: Any, description: str) -> Any:
        return self.declare_parameter(name, default, ParameterDescriptor(description=description, read_only=True)).value

    def _publish_frame(self) -> None:
        try:
            frame, truth = self._source.next(self._dt)
        except FrameError as error:
            self.get_logger().warning(str(error), throttle_duration_sec=WARN_PERIOD_S)
            return
        message = to_message(frame)
        message.header.stamp = self.get_clock().now().to_msg()
        message.header.frame_id = self._frame_id
        if truth is not None:  # first, so that nobody has an image without its truth
            stamp = {"sec": message.header.stamp.sec, "nanosec": message.header.stamp.nanosec}
            self._truths.publish(String(data=json.dumps({"stamp": stamp, "frame_id": self._frame_id, **truth})))
        self._images.publish(message)


def main(args: Sequence[str] | None = None) -> int:
    """Run the camera until SIGINT or SIGTERM; 0, or 1 after a one-line error."""
    return run_node(SimCamera, args)


if __name__ == "__main__":
    sys.exit(main())
