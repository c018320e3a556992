"""The model node under use: streams, results, topics, several clients, cancelling, a full queue, parameters."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from std_msgs.msg import String

from edgellm_ros import msg
from edgellm_ros.client import Answer, ClientError, Connection, Goal
from edgellm_ros.convert import to_message
from edgellm_ros.processes import wait_until
from edgellm_ros.scenes import Noun, Query, Scene, render, sample_scene, scene_from_dict, scene_rng
from edgellm_ros.scenes import answer as true_answer

WAIT_S = 30.0
WHAT = "What do you see?"
Result = msg.GenerateResult
# Goes on until it is cancelled or the KV cache is full.
ENDLESS = msg.SamplingParams(max_tokens=100_000, ignore_eos=True)


class Heard:
    """Everything that a node publishes about its answers, and the camera's account of its frames."""

    def __init__(self, connection: Connection, namespace: str) -> None:
        self.chunks: list[msg.TokenChunk] = []
        self.responses: list[msg.GenerateResult] = []
        self.texts: list[str] = []
        self.truths: dict[tuple[int, int], dict[str, Any]] = {}
        node, name = connection.node, f"/{namespace}/vlm_node"
        self._subscriptions = [
            node.create_subscription(msg.TokenChunk, f"{name}/tokens", self.chunks.append, 1000),
            node.create_subscription(msg.GenerateResult, f"{name}/response", self.responses.append, 100),
            node.create_subscription(String, f"{name}/text", lambda m: self.texts.append(m.data), 100),
            node.create_subscription(String, f"/{namespace}/ground_truth", self._on_truth, 30),
        ]

    def _on_truth(self, message: String) -> None:
        truth = json.loads(message.data)
        self.truths[(truth["stamp"]["sec"], truth["stamp"]["nanosec"])] = truth

    def of(self, request_id: str) -> list[msg.TokenChunk]:
        """The chunks of one request that have arrived."""
        return [chunk for chunk in self.chunks if chunk.request_id == request_id]

    def response(self, request_id: str) -> msg.GenerateResult:
        """The response to a request, once."""
        assert wait_until(lambda: any(r.request_id == request_id for r in self.responses), WAIT_S)
        (response,) = [r for r in self.responses if r.request_id == request_id]
        return response

    def scene(self, result: msg.GenerateResult) -> Scene:
        """The scene that an answer was made from."""
        stamp = (result.image_stamps[0].sec, result.image_stamps[0].nanosec)
        assert wait_until(lambda: stamp in self.truths, WAIT_S)
        return scene_from_dict(self.truths[stamp])

    def connected(self, live: Any) -> bool:
        """Whether a request's traces arrive on every topic: discovery takes its time."""
        live.model.ask(WHAT, image_source=Goal.IMAGE_LATEST).wait(WAIT_S)
        return bool(self.chunks and self.responses and self.texts and self.truths)


@pytest.fixture(scope="module")
def listener(live: Any, connection: Connection) -> Heard:
    listening = Heard(connection, live.namespace)
    assert wait_until(lambda: listening.connected(live), WAIT_S)
    return listening


@pytest.fixture
def heard(listener: Heard) -> Heard:
    for memory in (listener.chunks, listener.responses, listener.texts):
        memory.clear()
    return listener


def assert_whole_stream(arriving: Callable[[], list[msg.TokenChunk]], result: msg.GenerateResult) -> None:
    """No hole, one end, and the same text and number of tokens as the result, which may overtake the last chunks."""
    assert wait_until(lambda: any(c.is_last for c in arriving()), WAIT_S)
    chunks = arriving()
    assert [c.seq for c in chunks] == list(range(len(chunks)))
    assert [c.is_last for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert "".join(c.text for c in chunks) == result.text
    assert sum(len(c.token_ids) for c in chunks) == result.usage.completion_tokens
    assert chunks[-1].finish_reason == result.finish_reason
    assert {c.request_id for c in chunks} == {result.request_id}
    assert all(c.header == result.header for c in chunks)


def test_an_action_goal_streams_a_true_answer(live: Any, heard: Heard) -> None:
    pieces: list[str] = []
    asked = live.model.ask(WHAT, image_source=Goal.IMAGE_LATEST, on_text=pieces.append)
    result = asked.wait(WAIT_S)
    assert result.status == Result.STATUS_SUCCEEDED and result.error == "" and result.finish_reason == "stop"
    assert result.request_id == asked.goal_id
    assert "".join(pieces) == result.text
    assert result.text == true_answer(heard.scene(result), Query("what"))
    assert_whole_stream(lambda: asked.chunks, result)
    assert_whole_stream(lambda: heard.of(asked.goal_id), result)
    assert heard.response(asked.goal_id) == result


def test_the_result_accounts_for_image_usage_and_time(live: Any) -> None:
    live.model.ask(WHAT, image_source=Goal.IMAGE_LATEST).wait(WAIT_S)
    time.sleep(0.5)
    asked = live.model.ask(WHAT, image_source=Goal.IMAGE_LATEST)
    result = asked.wait(WAIT_S)
    took_s = time.time() - asked.asked_at
    assert result.header.frame_id == "camera" and result.header.stamp == result.image_stamps[0]
    assert len(result.image_stamps) == 1
    assert 0.0 < result.image_age < 1.0 + took_s
    assert result.frames_skipped >= 3  # half a second of a 30 Hz camera, on a busy machine
    assert result.usage.prompt_tokens > 64 and result.usage.completion_tokens > 3  # an image takes at least 64 tokens
    timing = result.timing
    assert 0.0 < timing.vision_s < timing.ttft_s and 0.0 < timing.prefill_s < timing.ttft_s
    steps_s = timing.queue_s + timing.prepare_s + timing.vision_s + timing.prefill_s
    assert timing.prepare_s > 0.0 and steps_s == pytest.approx(timing.ttft_s, abs=0.01)
    assert timing.ttft_s + timing.decode_s <= took_s and timing.tokens_per_s > 0.0


def test_without_stream_only_the_result_comes(live: Any, heard: Heard) -> None:
    asked = live.model.ask(WHAT, image_source=Goal.IMAGE_LATEST, stream=False)
    result = asked.wait(WAIT_S)
    assert result.status == Result.STATUS_SUCCEEDED and result.text
    assert heard.response(asked.goal_id) == result  # whatever came before it on ~/tokens is here by now
    assert asked.chunks == [] and heard.of(asked.goal_id) == []


def test_a_text_on_the_prompt_topic_is_answered_on_topics(live: Any, heard: Heard, connection: Connection) -> None:
    prompt = connection.node.create_publisher(String, f"/{live.namespace}/prompt", 10)
    assert wait_until(lambda: prompt.get_subscription_count() > 0, WAIT_S)
    prompt.publish(String(data=WHAT))
    assert wait_until(lambda: heard.responses and heard.texts, WAIT_S)
    (result,) = heard.responses
    assert result.status == Result.STATUS_SUCCEEDED
    assert heard.texts == [result.text] == [true_answer(heard.scene(result), Query("what"))]
    assert_whole_stream(lambda: heard.chunks, result)
    connection.node.destroy_publisher(prompt)


def known_scene() -> tuple[Scene, np.ndarray]:
    scene = sample_scene(scene_rng("test", 3))
    frame: np.ndarray = render([scene], (320, 256))[0].numpy()
    return scene, frame


def test_inline_images(live: Any) -> None:
    scene, frame = known_scene()
    image = to_message(frame)
    image.header.frame_id, image.header.stamp.sec = "left_eye", 5
    result = live.model.ask(WHAT, image_source=Goal.IMAGE_INLINE, images=[image]).wait(WAIT_S)
    assert result.text == true_answer(scene, Query("what"))
    assert result.header.frame_id == "left_eye" and [s.sec for s in result.image_stamps] == [5]
    assert result.image_age > 1e6 and result.frames_skipped == 0


def test_compressed_images(live: Any, png: Callable[[np.ndarray], Any]) -> None:
    scene, frame = known_scene()
    result = live.model.ask(WHAT, image_source=Goal.IMAGE_COMPRESSED, compressed_images=[png(frame)]).wait(WAIT_S)
    assert result.text == true_answer(scene, Query("what")) and len(result.image_stamps) == 1


def test_a_conversation_with_an_image_in_an_earlier_turn(live: Any) -> None:
    scene, frame = known_scene()
    what, count = true_answer(scene, Query("what")), true_answer(scene, Query("count", Noun()))
    messages = [
        msg.ChatMessage(role="user", text=WHAT, num_images=1),
        msg.ChatMessage(role="assistant", text=what),
        msg.ChatMessage(role="user", text="How many objects are there?"),
    ]
    result = live.model.ask(messages, image_source=Goal.IMAGE_INLINE, images=[to_message(frame)]).wait(WAIT_S)
    assert result.text == count


def test_text_only(live: Any) -> None:
    before = time.time()
    result = live.model.ask("Hello robot", sampling=msg.SamplingParams(max_tokens=5)).wait(WAIT_S)
    assert result.status == Result.STATUS_SUCCEEDED and result.finish_reason in ("stop", "length")
    assert result.image_stamps == [] and result.image_age == 0.0 and result.header.frame_id == ""
    assert before - 1 <= result.header.stamp.sec <= time.time()


def test_sampling_parameters_reach_the_engine(live: Any) -> None:
    def ask(**fields: Any) -> msg.GenerateResult:
        sampling = msg.SamplingParams(**fields)
        return live.model.ask(WHAT, image_source=Goal.IMAGE_INLINE, images=[image], sampling=sampling).wait(WAIT_S)

    image = to_message(known_scene()[1])
    three = ask(max_tokens=3)
    assert three.usage.completion_tokens == 3 and three.finish_reason == "length"
    hot = {"temperature": 5.0, "max_tokens": 24, "ignore_eos": True}
    assert ask(seed=1, **hot).text == ask(seed=1, **hot).text != ask(seed=2, **hot).text
    whole = ask().text
    word = whole.split()[2]
    assert ask(stop=[word]).text == whole[: whole.index(word)]


def test_two_clients_in_two_processes_do_not_mix(live: Any, heard: Heard) -> None:
    chat = subprocess.Popen(
        [sys.executable, "-m", "edgellm_ros.chat", "--node", f"/{live.namespace}/vlm_node"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert chat.stdin is not None
    chat.stdin.write(f"{WHAT}\n" * 5)
    chat.stdin.close()
    mine: list[Answer] = []
    while chat.poll() is None:
        asked = live.model.ask("How many objects are there?", image_source=Goal.IMAGE_LATEST)
        result = asked.wait(WAIT_S)
        assert result.text.startswith("There ")
        assert_whole_stream(lambda a=asked: a.chunks, result)
        mine.append(asked)
    assert chat.stdout is not None
    said = [line for line in chat.stdout.read().splitlines() if line.startswith("I see ")]
    assert chat.returncode == 0 and len(said) == 5 and mine
    others = {r.request_id for r in heard.responses} - {asked.goal_id for asked in mine}
    assert len(others) == 5
    for request_id in others:
        assert_whole_stream(lambda r=request_id: heard.of(r), heard.response(request_id))


@contextmanager
def full_node(live: Any) -> Iterator[list[Answer]]:
    """Endless requests in every batch slot and every place of the queue; cancelled at the end."""
    status = live.model.status
    assert wait_until(lambda: live.model.status.running == live.model.status.queued == 0, WAIT_S)
    assert status is not None
    endless: list[Answer] = []
    try:
        for _ in range(32):
            endless.append(live.model.ask("Hello", sampling=ENDLESS))
            assert wait_until(lambda a=endless[-1]: a.done() or a.accepted, WAIT_S)
            if endless[-1].done():
                break
        yield endless
    finally:
        for answer in endless:
            answer.cancel()
        for answer in endless[:-1]:
            answer.wait(WAIT_S)


def test_a_full_queue_rejects_at_once_and_says_why(live: Any) -> None:
    with full_node(live) as endless:
        asked_at = time.monotonic()
        with pytest.raises(ClientError, match=r"the queue is full \(\d+ running, \d+ waiting\)"):
            endless[-1].wait(WAIT_S)
        assert time.monotonic() - asked_at < 5.0
    assert live.model.status.max_queue == 2
    assert live.model.ask(WHAT, image_source=Goal.IMAGE_LATEST).wait(WAIT_S).status == Result.STATUS_SUCCEEDED


@pytest.mark.parametrize("point", ["at once", "accepted", "first token", "many tokens"])
def test_cancel_while_it_runs(live: Any, point: str) -> None:
    asked = live.model.ask("Hello", sampling=ENDLESS)
    reached = {
        "at once": lambda: True,
        "accepted": lambda: asked.accepted,
        "first token": lambda: len(asked.chunks) > 0,
        "many tokens": lambda: len(asked.chunks) > 40,
    }
    assert wait_until(reached[point], WAIT_S)
    asked.cancel()
    result = asked.wait(5.0)
    assert result.status == Result.STATUS_CANCELED and result.finish_reason == "cancelled" and result.error == ""
    assert result.text.startswith("".join(chunk.text for chunk in asked.chunks))
    if point == "many tokens":
        assert result.usage.completion_tokens > 40 and result.text
    assert wait_until(lambda: live.model.status.running == 0, WAIT_S)


def test_cancel_in_the_queue(live: Any) -> None:
    with full_node(live) as endless:
        waiting = endless[-2]
        waiting.cancel()
        result = waiting.wait(5.0)
        assert result.status == Result.STATUS_CANCELED and result.text == "" and result.usage.completion_tokens == 0
        assert not endless[0].done()


def test_cancel_after_the_end_changes_nothing(live: Any) -> None:
    asked = live.model.ask("Hello", sampling=msg.SamplingParams(max_tokens=2))
    result = asked.wait(WAIT_S)
    live.model.call_soon(asked.handle.cancel_goal_async)
    assert live.model.ask("Hello", sampling=msg.SamplingParams(max_tokens=2)).wait(WAIT_S).text == result.text


def test_cancel_at_the_last_token_ends_either_way(live: Any) -> None:
    for _ in range(5):
        asked = live.model.ask("Hello", sampling=msg.SamplingParams(max_tokens=8, ignore_eos=True))
        assert wait_until(lambda a=asked: len(a.chunks) >= 6, WAIT_S)
        asked.cancel()
        assert asked.wait(5.0).status in (Result.STATUS_CANCELED, Result.STATUS_SUCCEEDED)


def set_parameter(connection: Connection, live: Any, name: str, value: ParameterValue) -> Any:
    client = connection.node.create_client(SetParameters, f"/{live.namespace}/vlm_node/set_parameters")
    assert client.wait_for_service(WAIT_S)
    future = client.call_async(SetParameters.Request(parameters=[Parameter(name=name, value=value)]))
    assert wait_until(future.done, WAIT_S)
    connection.node.destroy_client(client)
    return future.result().results[0]


def test_dynamic_parameters_count_from_the_next_request(live: Any, connection: Connection) -> None:
    def integer(value: int) -> ParameterValue:
        return ParameterValue(type=ParameterType.PARAMETER_INTEGER, integer_value=value)

    assert set_parameter(connection, live, "sampling.max_tokens", integer(2)).successful
    try:
        assert live.model.ask("Hello").wait(WAIT_S).usage.completion_tokens == 2
    finally:
        assert set_parameter(connection, live, "sampling.max_tokens", integer(256)).successful


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("engine_dir", ParameterValue(type=ParameterType.PARAMETER_STRING, string_value="/elsewhere")),
        ("sampling.max_tokens", ParameterValue(type=ParameterType.PARAMETER_INTEGER, integer_value=0)),
        ("sampling.top_p", ParameterValue(type=ParameterType.PARAMETER_DOUBLE, double_value=0.0)),
        ("sampling.temperature", ParameterValue(type=ParameterType.PARAMETER_DOUBLE, double_value=-1.0)),
        ("sampling.temperature", ParameterValue(type=ParameterType.PARAMETER_STRING, string_value="hot")),
        ("prompt_image", ParameterValue(type=ParameterType.PARAMETER_STRING, string_value="oldest")),
    ],
)
def test_parameters_that_are_not_allowed_are_refused(
    live: Any, connection: Connection, name: str, value: ParameterValue
) -> None:
    refused = set_parameter(connection, live, name, value)
    assert not refused.successful and refused.reason
