"""Transitions: a failed load and another try, answers to queries while it loads, draining, starting again, the end."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState

from edgellm_ros import msg
from edgellm_ros.client import ClientError, Connection
from edgellm_ros.processes import wait_until

WAIT_S = 60.0
QUERY_S = 2.0  # a blocked executor would take as long as the transition
HELLO = msg.SamplingParams(max_tokens=3)
ENDLESS = msg.SamplingParams(max_tokens=100_000, ignore_eos=True)


class Manager:
    """What a lifecycle manager does: asks for transitions and states."""

    def __init__(self, connection: Connection, namespace: str) -> None:
        name = f"/{namespace}/vlm_node"
        self._change = connection.node.create_client(ChangeState, f"{name}/change_state")
        self._get = connection.node.create_client(GetState, f"{name}/get_state")
        assert self._change.wait_for_service(WAIT_S) and self._get.wait_for_service(WAIT_S)

    def begin(self, transition: int) -> Any:
        """Ask for a transition; returns the future."""
        return self._change.call_async(ChangeState.Request(transition=Transition(id=transition)))

    def change(self, transition: int) -> bool:
        """Ask for a transition and wait until it is through."""
        future = self.begin(transition)
        assert wait_until(future.done, WAIT_S)
        return bool(future.result().success)

    def state(self) -> int:
        """The present state, answered promptly."""
        future = self._get.call_async(GetState.Request())
        assert wait_until(future.done, QUERY_S), "the executor is blocked"
        return int(future.result().current_state.id)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the engine will be; nothing is there yet."""
    return tmp_path_factory.mktemp("lifecycle") / "engine"


@pytest.fixture(scope="module")
def managed(start_model: Callable[..., Any], engine: Path) -> Any:
    """A node that waits for a lifecycle manager."""
    return start_model("managed", engine_dir=engine, drain_timeout=1.0)


@pytest.fixture(scope="module")
def manager(managed: Any, connection: Connection) -> Manager:
    return Manager(connection, managed.namespace)


def assert_rejects(node: Any) -> None:
    with pytest.raises(ClientError, match="rejected the request: the node is not active"):
        node.model.ask("Hello", sampling=HELLO).wait(WAIT_S)


def assert_answers(node: Any) -> None:
    result = node.model.ask("Hello", sampling=HELLO).wait(WAIT_S)
    assert result.status == msg.GenerateResult.STATUS_SUCCEEDED, result.error


def test_an_unconfigured_node_rejects_and_says_why(managed: Any, manager: Manager) -> None:
    assert manager.state() == State.PRIMARY_STATE_UNCONFIGURED
    assert_rejects(managed)
    assert not manager.change(Transition.TRANSITION_ACTIVATE)
    assert manager.state() == State.PRIMARY_STATE_UNCONFIGURED


def test_a_failed_load_leaves_it_unconfigured_and_able_to_try_again(
    managed: Any, manager: Manager, engine: Path, tiny_engine: Path
) -> None:
    assert not manager.change(Transition.TRANSITION_CONFIGURE)
    assert manager.state() == State.PRIMARY_STATE_UNCONFIGURED
    assert wait_until(lambda: "does not exist" in managed.model.status.last_error, WAIT_S)
    assert str(engine) in managed.model.status.message and "\n" not in managed.model.status.message
    shutil.copytree(tiny_engine, engine)
    damaged = next(engine.glob("*.onnx"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert not manager.change(Transition.TRANSITION_CONFIGURE)
    assert wait_until(lambda: damaged.name in managed.model.status.last_error, WAIT_S)
    shutil.copy(tiny_engine / damaged.name, damaged)
    assert manager.change(Transition.TRANSITION_CONFIGURE)
    assert manager.state() == State.PRIMARY_STATE_INACTIVE
    assert wait_until(lambda: managed.model.status.model_type == "qwen3_vl", WAIT_S)
    assert managed.model.status.last_error == "" and managed.model.status.accepts_images
    assert_rejects(managed)
    assert manager.change(Transition.TRANSITION_ACTIVATE)
    assert_answers(managed)


def test_queries_are_answered_while_it_loads(managed: Any, manager: Manager) -> None:
    assert manager.change(Transition.TRANSITION_DEACTIVATE)
    assert manager.change(Transition.TRANSITION_CLEANUP)
    assert wait_until(lambda: managed.model.status.model_type == "", WAIT_S)
    loading = manager.begin(Transition.TRANSITION_CONFIGURE)
    seen = []
    while not loading.done():
        seen.append(manager.state())
    assert loading.result().success
    assert State.TRANSITION_STATE_CONFIGURING in seen
    assert not manager.change(Transition.TRANSITION_CONFIGURE)  # it is already
    assert manager.change(Transition.TRANSITION_ACTIVATE)
    assert_answers(managed)


def test_deactivate_drains_what_ends_in_time(managed: Any, manager: Manager) -> None:
    short = managed.model.ask("Hello", sampling=msg.SamplingParams(max_tokens=100, ignore_eos=True))
    assert wait_until(lambda: short.accepted, WAIT_S)
    assert manager.change(Transition.TRANSITION_DEACTIVATE)
    result = short.wait(WAIT_S)
    assert result.usage.completion_tokens == 100
    assert_rejects(managed)
    assert manager.change(Transition.TRANSITION_ACTIVATE)


def test_deactivate_cancels_what_does_not(managed: Any, manager: Manager) -> None:
    endless = [managed.model.ask("Hello", sampling=ENDLESS) for _ in range(6)]
    assert wait_until(lambda: all(a.accepted for a in endless), WAIT_S)
    begun = time.monotonic()
    assert manager.change(Transition.TRANSITION_DEACTIVATE)
    assert 0.9 < time.monotonic() - begun < 10.0  # drain_timeout is 1 s
    for answer in endless:
        result = answer.wait(WAIT_S)
        assert result.status == msg.GenerateResult.STATUS_ABORTED and "deactivated" in result.error
    assert manager.change(Transition.TRANSITION_ACTIVATE)
    assert_answers(managed)


def test_a_signal_ends_it_cleanly_and_leaves_nobody_waiting(managed: Any, manager: Manager) -> None:
    endless = managed.model.ask("Hello", sampling=ENDLESS)
    assert wait_until(lambda: len(endless.chunks) > 3, WAIT_S)
    for _ in range(2):  # as Ctrl-C comes under ros2 launch: from the terminal, and from launch
        managed.process.process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    result = endless.wait(WAIT_S)
    assert result.status == msg.GenerateResult.STATUS_ABORTED and result.text
    assert managed.process.process.wait(WAIT_S) == 0
    assert "Traceback" not in managed.process.log.read_text()
