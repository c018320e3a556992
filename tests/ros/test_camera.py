"""The simulated camera: frames and their truth, folders, animations and videos, and sources that do not work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PilImage
from rclpy.qos import QoSProfile
from sensor_msgs.msg import Image
from std_msgs.msg import String

from edgellm.errors import ConfigError
from edgellm_ros.client import Connection
from edgellm_ros.convert import to_rgb
from edgellm_ros.frames import FrameError, open_source
from edgellm_ros.processes import wait_until
from edgellm_ros.scenes import render, scene_from_dict

WAIT_S = 60.0


@pytest.fixture
def pictures(tmp_path: Path) -> list[np.ndarray]:
    """Three pictures in a folder, and a file that is none."""
    colors = [np.full((8, 12, 3), level, np.uint8) for level in (10, 120, 240)]
    for index, color in enumerate(colors):
        PilImage.fromarray(color).save(tmp_path / f"{index}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    return colors


def test_frames_come_with_the_truth_about_them(children: Any, connection: Connection) -> None:
    words = ["--ros-args", "-r", "__ns:=/studio", "-p", "seed:=4", "-p", "frame_id:=mast", "-p", "width:=160"]
    camera = children.start("camera_studio", "edgellm_ros.sim_camera", *words)
    images: dict[tuple[int, int], Image] = {}
    truths: dict[tuple[int, int], dict[str, Any]] = {}

    def on_truth(message: String) -> None:
        truth = json.loads(message.data)
        truths[(truth["stamp"]["sec"], truth["stamp"]["nanosec"])] = truth

    def on_image(message: Image) -> None:
        images[(message.header.stamp.sec, message.header.stamp.nanosec)] = message

    # A listener that wants reliable delivery; the model node is one that does not.
    subscriptions = [
        connection.node.create_subscription(Image, "/studio/image", on_image, QoSProfile(depth=10)),
        connection.node.create_subscription(String, "/studio/ground_truth", on_truth, 30),
    ]
    assert wait_until(lambda: len(set(images) & set(truths)) >= 30, WAIT_S)
    assert camera.stop() == 0
    for subscription in subscriptions:
        connection.node.destroy_subscription(subscription)
    both = sorted(set(images) & set(truths))
    for stamp in both[::10]:
        message, truth = images[stamp], truths[stamp]
        assert (message.encoding, message.width, message.height, message.step) == ("rgb8", 160, 256, 480)
        assert message.header.frame_id == truth["frame_id"] == "mast"
        seen = render([scene_from_dict(truth)], (160, 256))[0].numpy()
        np.testing.assert_allclose(to_rgb(message).astype(int), seen, atol=1)
    seconds = [sec + nanosec / 1e9 for sec, nanosec in both]
    assert np.median(np.diff(seconds)) == pytest.approx(1 / 30, rel=0.2)


def test_a_folder_is_shown_in_order_over_and_over(pictures: list[np.ndarray], tmp_path: Path) -> None:
    source = open_source(str(tmp_path), 0, 0, 0, 0.0)
    for expected in [*pictures, *pictures]:
        frame, truth = source.next(0.1)
        assert truth is None
        np.testing.assert_array_equal(frame, expected)


def test_a_damaged_picture_is_left_out(pictures: list[np.ndarray], tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"damaged")
    source = open_source(str(tmp_path), 0, 0, 0, 0.0)
    with pytest.raises(FrameError, match="cannot read .*0.png"):
        source.next(0.1)
    np.testing.assert_array_equal(source.next(0.1)[0], pictures[1])


def test_an_animation_is_a_video(pictures: list[np.ndarray], tmp_path: Path) -> None:
    first, *others = [PilImage.fromarray(picture) for picture in pictures]
    first.save(tmp_path / "film.gif", save_all=True, append_images=others)
    source = open_source(str(tmp_path / "film.gif"), 0, 0, 0, 0.0)
    for expected in [*pictures, *pictures]:
        np.testing.assert_allclose(source.next(0.1)[0].astype(int), expected, atol=2)


def test_a_video_file_needs_opencv_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = tmp_path / "film.mp4"
    film.write_bytes(b"no video")
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(ConfigError, match="takes OpenCV, which is not installed"):
        open_source(str(film), 0, 0, 0, 0.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "source:=/no/such/place"], "expected scenes, a folder of pictures or a video file"),
        (["-p", "rate:=0.0"], "parameter rate is 0 frames per second; expected 0.01 to 1000"),
    ],
)
def test_a_parameter_that_is_not_allowed_is_one_line(children: Any, arguments: list[str], words: str) -> None:
    child = children.start("camera_bad", "edgellm_ros.sim_camera", "--ros-args", *arguments)
    assert child.process.wait(WAIT_S) == 1
    (line,) = child.log.read_text().strip().splitlines()
    assert line.startswith("error: ") and words in line


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no pictures"):
        open_source(str(tmp_path), 0, 0, 0, 0.0)
