"""What a careless client or camera can send: each ends in one clear line, and the node answers the next request."""

from __future__ import annotations

import array
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PilImage
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import String

from edgellm_ros import msg
from edgellm_ros.client import Connection, Goal
from edgellm_ros.convert import to_message
from edgellm_ros.processes import wait_until

WAIT_S = 30.0
QUESTION = "What do you see?"
FRAME = np.full((64, 64, 3), 90, np.uint8)


def inline(**changes: Any) -> dict[str, Any]:
    """Goal fields for an inline image of which some fields are wrong."""
    image = to_message(FRAME)
    for name, value in changes.items():
        setattr(image, name, value)
    return {"image_source": Goal.IMAGE_INLINE, "images": [image]}


def jpeg(data: bytes) -> dict[str, Any]:
    image = CompressedImage(format="jpeg", data=array.array("B", data))
    return {"image_source": Goal.IMAGE_COMPRESSED, "compressed_images": [image]}


def sampling(**fields: Any) -> dict[str, Any]:
    return {"sampling": msg.SamplingParams(**fields)}


def said(role: str, text: str, num_images: int = 0) -> msg.ChatMessage:
    return msg.ChatMessage(role=role, text=text, num_images=num_images)


BAD_GOALS = {
    "encoding": (QUESTION, inline(encoding="rgb9"), "encoding 'rgb9'; expected one of mono8"),
    "depth image": (QUESTION, inline(encoding="32FC1"), "encoding '32FC1'"),
    "0x0": (QUESTION, inline(width=0, height=0, data=array.array("B")), "0x0 pixels; it must not be empty"),
    "20,000x20,000": (QUESTION, inline(width=20_000, height=20_000), "20000x20000 pixels; at most"),
    "step": (QUESTION, inline(step=100), "step is 100 bytes; 64 pixels of rgb8 need 192"),
    "too few bytes": (QUESTION, inline(height=65), "has 12288 bytes; 64x65 rgb8 with step 192 needs 12480"),
    "no JPEG": (QUESTION, jpeg(b"not a picture"), "cannot be decoded; send JPEG or PNG"),
    "empty JPEG": (QUESTION, jpeg(b""), "cannot be decoded; send JPEG or PNG"),
    "sliver": (
        QUESTION,
        inline(width=1, height=4096, step=3, data=array.array("B", bytes(3 * 4096))),
        "1x4096 pixels; one side may be at most",
    ),
    "long prompt": ("word " * 5000, {}, "tokens, the engine takes 1024; shorten it"),
    "1 MB prompt": ("x" * 1_000_000, {}, "the engine takes 1024"),
    "no messages": ([], {}, "the goal has no messages"),
    "unknown role": ([said("robot", "hello"), said("user", QUESTION)], {}, "role"),
    "ends with the assistant": ([said("user", QUESTION), said("assistant", "I")], {}, "it must be the user's"),
    "image missing": (QUESTION, {"image_source": Goal.IMAGE_INLINE}, "images is empty"),
    "image not wanted": (QUESTION, {**inline(), "image_source": Goal.IMAGE_NONE}, "images is set, but image_source"),
    "image count": ([said("user", QUESTION, 2)], inline(), "claim 2 images .num_images., the goal has 1"),
    "image source": (QUESTION, {"image_source": 77}, "image_source is 77; expected one of 0"),
    "image age": (QUESTION, {"image_source": Goal.IMAGE_LATEST, "max_image_age": -1.0}, "max_image_age is -1"),
    "NaN age": (QUESTION, {"image_source": Goal.IMAGE_LATEST, "max_image_age": math.nan}, "max_image_age is nan"),
    "old image": (
        QUESTION,
        {"image_source": Goal.IMAGE_LATEST, "max_image_age": 1e-4},
        "s old, more than the 0.0001 s",
    ),
    "NaN temperature": (QUESTION, sampling(temperature=math.nan), "temperature is nan"),
    "hot": (QUESTION, sampling(temperature=1e9), "temperature"),
    "top_p": (QUESTION, sampling(top_p=1.5), "top_p is 1.5"),
    "min_p": (QUESTION, sampling(min_p=2.0), "min_p is 2.0"),
    "stop": (QUESTION, sampling(stop=[""]), "stop"),
    "stop token": (QUESTION, sampling(stop_token_ids=[-5]), "stop_token_ids"),
}


def assert_fails(live: Any, question: Any, goal: dict[str, Any], words: str) -> None:
    asked = live.model.ask(question, **goal)
    result = asked.wait(WAIT_S)
    assert result.status == msg.GenerateResult.STATUS_ABORTED and result.finish_reason == "error"
    assert result.text == "" and asked.chunks[-1].is_last and asked.chunks[-1].finish_reason == "error"
    assert "\n" not in result.error
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(result.error)
    assert wait_until(lambda: live.model.status.last_error == result.error, WAIT_S)


def assert_alive(live: Any) -> None:
    result = live.model.ask(QUESTION, image_source=Goal.IMAGE_LATEST).wait(WAIT_S)
    assert result.status == msg.GenerateResult.STATUS_SUCCEEDED, result.error
    assert result.text.startswith("I see ")


@pytest.mark.parametrize("case", BAD_GOALS)
def test_a_bad_goal_fails_with_one_line_and_the_next_is_answered(live: Any, case: str) -> None:
    assert_fails(live, *BAD_GOALS[case])
    assert_alive(live)


def test_a_png_of_20000_by_20000_pixels(live: Any, png: Callable[[Any], Any]) -> None:
    bomb = png(PilImage.new("1", (20_000, 20_000)))
    assert len(bomb.data) < 1_000_000
    goal = {"image_source": Goal.IMAGE_COMPRESSED, "compressed_images": [bomb]}
    assert_fails(live, QUESTION, goal, "too many pixels|20000x20000")
    assert_alive(live)


def test_the_node_has_neither_crashed_nor_written_a_traceback(live: Any) -> None:
    live.process.check()
    assert "Traceback" not in live.process.log.read_text()


def test_cameras_that_are_missing_broken_or_stale(
    start_model: Callable[..., Any], connection: Connection, tiny_engine: Path, png: Callable[[Any], Any]
) -> None:
    lonely = start_model("lonely", engine_dir=tiny_engine, autostart=True, **{"image.max_age": 0.5})
    lonely.model.wait(WAIT_S)
    latest = {"image_source": Goal.IMAGE_LATEST}
    no_image = "no image has arrived on /lonely/image or /lonely/image/compressed; start a camera or remap"
    assert_fails(lonely, QUESTION, latest, no_image)

    prompt = connection.node.create_publisher(String, "/lonely/prompt", 10)
    assert wait_until(lambda: prompt.get_subscription_count() > 0, WAIT_S)
    aborted = lonely.model.status.aborted
    prompt.publish(String(data=QUESTION))
    assert wait_until(lambda: lonely.model.status.aborted == aborted + 1, WAIT_S)
    assert lonely.model.status.last_error.startswith("no image has arrived")

    def show(topic: str, image: Any) -> None:
        publisher = connection.node.create_publisher(type(image), topic, 1)
        received = lonely.model.status.images_received

        def arrived() -> bool:
            image.header.stamp = connection.node.get_clock().now().to_msg()
            publisher.publish(image)
            return wait_until(lambda: lonely.model.status.images_received > received, 1.5)

        assert wait_until(arrived, WAIT_S)
        connection.node.destroy_publisher(publisher)

    show("/lonely/image", Image(height=2, width=2, encoding="rgb9", step=6, data=array.array("B", bytes(12))))
    assert_fails(lonely, QUESTION, {**latest, "max_image_age": 60.0}, "encoding 'rgb9'")
    show("/lonely/image", to_message(FRAME))
    time.sleep(0.6)
    assert_fails(lonely, QUESTION, latest, r"is \d+\.\d s old, more than the 0\.5 s allowed")
    recent = {**latest, "max_image_age": 60.0}
    assert lonely.model.ask(QUESTION, **recent).wait(WAIT_S).text == "I see nothing."
    show("/lonely/image/compressed", png(FRAME))
    assert lonely.model.ask(QUESTION, **recent).wait(WAIT_S).text == "I see nothing."
    assert lonely.process.stop() == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "sampling.top_p:=0.0"], "parameter sampling.top_p is 0.0; expected more than 0"),
        (["-p", "max_queue:=many"], "max_queue"),
    ],
)
def test_a_start_parameter_that_is_not_allowed_is_one_line(children: Any, arguments: list[str], words: str) -> None:
    child = children.start("bad_parameter", "edgellm_ros.vlm_node", "--ros-args", *arguments)
    assert child.process.wait(WAIT_S) == 1
    (line,) = child.log.read_text().strip().splitlines()
    assert line.startswith("error: ") and words in line


def test_without_an_engine_the_node_says_so_and_lives(start_model: Callable[..., Any]) -> None:
    empty = start_model("empty", autostart=True)
    assert wait_until(lambda: empty.model.status.last_error, WAIT_S)
    assert empty.model.status.last_error.startswith("parameter engine_dir is empty; set it to")
    empty.process.check()
    assert empty.process.stop() == 0
