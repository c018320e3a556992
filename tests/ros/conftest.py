"""Real nodes in processes of their own, real rclpy, the tiny engine. The ROS domain is this test run's own (see the
conftest one level up); every wait is bounded, and whatever is started is stopped."""

from __future__ import annotations

import array
import importlib.util
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from edgellm_ros.client import Connection, ModelClient
    from edgellm_ros.processes import Child, Children

os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
HAVE_ROS = all(importlib.util.find_spec(name) for name in ("rclpy", "edgellm_ros.msg"))
collect_ignore_glob = [] if HAVE_ROS else ["test_*.py"]
START_S = 60.0
MAX_QUEUE = 2


def pytest_report_header() -> str:
    """Say when the ROS tests are left out."""
    domain = os.environ["ROS_DOMAIN_ID"]
    return f"ROS: domain {domain}" if HAVE_ROS else "ROS: tests/ros left out, rclpy or the interfaces are missing"


@pytest.fixture(scope="session")
def connection() -> Iterator[Connection]:
    """This process's place in the ROS graph."""
    from edgellm_ros.client import Connection

    with Connection("tests") as opened:
        yield opened


@pytest.fixture(scope="session")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Children]:
    """Starts processes that end with the test run."""
    from edgellm_ros.processes import Children

    logs = tmp_path_factory.mktemp("ros_logs")
    os.environ["ROS_LOG_DIR"] = str(logs)
    with Children(logs) as started:
        yield started


@dataclass
class Node:
    """A model node in its own process, and the way to talk to it."""

    process: Child
    model: ModelClient
    namespace: str


@pytest.fixture(scope="session")
def start_model(children: Children, connection: Connection) -> Callable[..., Node]:
    """Call it to start a model node in a namespace of its own: `start_model("name", parameter=value, ...)`; it returns
    when the node can be seen."""
    from edgellm_ros.client import ModelClient
    from edgellm_ros.processes import wait_until

    def start(namespace: str, **parameters: Any) -> Node:
        words = ["--ros-args", "-r", f"__ns:=/{namespace}"]
        for name, value in parameters.items():
            words += ["-p", f"{name}:={str(value).lower() if isinstance(value, bool) else value}"]
        process = children.start(f"model_{namespace}", "edgellm_ros.vlm_node", *words)
        node = Node(process, ModelClient(connection.node, f"/{namespace}/vlm_node"), namespace)

        def visible() -> bool:
            process.check()
            return node.model.status is not None and node.model.action.server_is_ready()

        assert wait_until(visible, START_S), process.last_line()
        return node

    return start


@pytest.fixture
def png() -> Callable[[Any], Any]:
    """Makes a CompressedImage of an RGB array or a PIL image."""
    from PIL import Image as PilImage
    from sensor_msgs.msg import CompressedImage

    def compress(picture: Any) -> Any:
        file = io.BytesIO()
        image = picture if isinstance(picture, PilImage.Image) else PilImage.fromarray(picture)
        image.save(file, "PNG")
        return CompressedImage(format="png", data=array.array("B", file.getvalue()))

    return compress


@pytest.fixture(scope="session")
def live(children: Children, start_model: Callable[..., Node], tiny_engine: Path) -> Node:
    """The node that most tests use: active, a camera in front of it, room for two waiting requests."""
    from edgellm_ros.processes import wait_until

    camera = ["--ros-args", "-r", "__ns:=/live", "-p", "scene_period:=2.0", "-p", "seed:=11"]
    children.start("camera_live", "edgellm_ros.sim_camera", *camera)
    node = start_model("live", engine_dir=tiny_engine, autostart=True, max_queue=MAX_QUEUE)
    node.model.wait(START_S)
    assert wait_until(lambda: node.model.sees_camera, START_S)
    return node
