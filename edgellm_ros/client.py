"""Asking a `vlm_node` from Python: the part that the chat, the demo and the benchmarks have in common.

    with Connection("my_tool") as connection:
        model = ModelClient(connection.node)
        model.wait(10.0)
        answer = model.ask("What do you see?", image_source=Goal.IMAGE_LATEST, on_text=print).wait(30.0)

Callbacks run on the connection's thread; everything else may be called from any thread.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import rclpy
from action_msgs.msg import GoalStatus
from lifecycle_msgs.msg import State
from rclpy.action import ActionClient
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.signals import SignalHandlerOptions
from rclpy.task import Future
from unique_identifier_msgs.msg import UUID

from edgellm.errors import EdgeLLMError
from edgellm_ros import msg
from edgellm_ros.action import Generate
from edgellm_ros.paths import use_fastdds_profile

Goal = Generate.Goal
SPIN_S = 0.2
FEEDBACK_QOS = QoSProfile(depth=200)
STATUS_QOS = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
REJECTION_WAIT_S = 1.0
CHECK_PERIOD_S = 0.5
OVER = (GoalStatus.STATUS_SUCCEEDED, GoalStatus.STATUS_CANCELED, GoalStatus.STATUS_ABORTED)


class ClientError(EdgeLLMError):
    """The node is not there, not ready, or did not answer; one line."""


class Connection:
    """rclpy, one node and a thread that spins it. Signals stay the caller's: Ctrl-C is a KeyboardInterrupt."""

    def __init__(self, name: str, args: Sequence[str] | None = None) -> None:
        use_fastdds_profile()
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
        # Every entity makes each turn of the executor slower; nobody sets parameters here.
        self.node: Node = rclpy.create_node(name, start_parameter_services=False)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.node)
        self._closing = False
        self._thread = threading.Thread(target=self._spin, name="ros", daemon=True)
        self._thread.start()

    def _spin(self) -> None:
        while not self._closing:
            self._executor.spin_once(timeout_sec=SPIN_S)

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave ROS. Can be called twice."""
        if self._closing:
            return
        self._closing = True
        self._executor.wake()
        self._thread.join(5.0)
        self._executor.shutdown(timeout_sec=1.0)
        self.node.destroy_node()
        rclpy.try_shutdown()


class Answer:
    """An answer under way. `chunks` grows while it streams; times are time.time() seconds.

    rclpy drops the feedback of a goal from the moment that its result has come, and a result can overtake feedback. So
    the result is asked for when the last chunk is here or, should that be lost, when the node calls the goal over.
    """

    def __init__(self, client: ModelClient, goal: Generate.Goal, on_text: Callable[[str], None] | None) -> None:
        self.goal_id = uuid.uuid4().hex
        self.chunks: list[msg.TokenChunk] = []
        self.arrivals: list[float] = []
        self.asked_at = time.time()
        self.ended_at = math.inf
        self.handle: Any = None  # rclpy's goal handle, once the node has accepted
        self._client = client
        self._streams = goal.stream
        self._result_requested = False
        self._over_before = False
        self._rejected_before = client.status.rejected if client.status else 0
        self._on_text = on_text
        self._shown = 0
        self._lock = threading.Lock()
        self._accepted = threading.Event()
        self._ended = threading.Event()
        self._result: msg.GenerateResult | None = None
        self._error = ""
        client.call_soon(lambda: self._send(goal))

    def _send(self, goal: Generate.Goal) -> None:
        goal_id = UUID(uuid=list(bytes.fromhex(self.goal_id)))
        sent = self._client.action.send_goal_async(goal, feedback_callback=self._on_feedback, goal_uuid=goal_id)
        sent.add_done_callback(self._on_goal_response)

    @property
    def accepted(self) -> bool:
        """Whether the node has taken the request."""
        return self.handle is not None

    @property
    def first_token_s(self) -> float:
        """Seconds from asking until the first chunk arrived; without one, until the end."""
        return (self.arrivals[0] if self.arrivals else self.ended_at) - self.asked_at

    @property
    def text(self) -> str:
        """The text that has arrived."""
        return self._result.text if self._result else "".join(chunk.text for chunk in self.chunks)

    def cancel(self, timeout_s: float = 5.0) -> None:
        """Ask the node to stop; `wait` then returns what there was until then."""
        if self._accepted.wait(timeout_s) and self.handle is not None and not self._ended.is_set():
            self._client.call_soon(self.handle.cancel_goal_async)

    def wait(self, timeout_s: float) -> msg.GenerateResult:
        """The result, also of a failed or cancelled request (see its `status` and `error`).

        Raises ClientError when the node rejected the request or nothing came within `timeout_s`.
        """
        if not self._ended.wait(timeout_s):
            raise ClientError(f"{self._client.name} did not finish within {timeout_s:g} s; is it still running?")
        if self._result is None:
            raise ClientError(self._error)
        return self._result

    def done(self) -> bool:
        """Whether `wait` would return or raise at once."""
        return self._ended.is_set()

    def _on_feedback(self, feedback: Any) -> None:
        chunk = feedback.feedback.chunk
        with self._lock:
            self.arrivals.append(time.time())
            self.chunks.append(chunk)
            self._show(chunk.text)
        if chunk.is_last:
            self._request_result()

    def _show(self, text: str) -> None:
        self._shown += len(text)
        if text and self._on_text is not None:
            self._on_text(text)

    def _on_goal_response(self, future: Future) -> None:
        handle = future.result()
        if not handle.accepted:
            self._client.when_rejected(self._rejected_before, self._reject)
            return
        self.handle = handle
        self._accepted.set()
        if not self._streams or any(chunk.is_last for chunk in self.chunks):
            self._request_result()
        else:
            self._client.watch(self)

    def _request_result(self) -> None:
        if self.handle is not None and not self._result_requested:
            self._result_requested = True
            self.handle.get_result_async().add_done_callback(self._on_result)

    def check_over(self) -> bool:
        """Ask for the result if the goal was over the last time, too; whether this answer needs no more checks."""
        if self._over_before:
            self._request_result()
        self._over_before = self.handle.status in OVER
        return self._result_requested

    def _reject(self, reason: str) -> None:
        self._error = f"{self._client.name} rejected the request: {reason}"
        self._accepted.set()
        self._ended.set()

    def _on_result(self, future: Future) -> None:
        response = future.result()
        with self._lock:
            if response.status == GoalStatus.STATUS_UNKNOWN:
                self._error = f"{self._client.name} no longer knows the request; was it restarted?"
            else:
                self.ended_at = time.time()
                self._result = response.result.result
                self._show(self._result.text[self._shown :])
        self._ended.set()


class ModelClient:
    """Asks one model node. `name` is the node's name, relative to this process's namespace, or absolute."""

    def __init__(self, node: Node, name: str = "vlm_node") -> None:
        self.name = name
        self.status: msg.NodeStatus | None = None
        self._node = node
        self._changed = threading.Condition()
        self._watched: list[Answer] = []
        self._untold: list[tuple[int, Callable[[str], None]]] = []
        self.action = ActionClient(node, Generate, f"{name}/generate", feedback_sub_qos_profile=FEEDBACK_QOS)
        node.create_subscription(msg.NodeStatus, f"{name}/status", self._on_status, STATUS_QOS)
        node.create_timer(CHECK_PERIOD_S, self._check_watched)

    def wait(self, timeout_s: float) -> None:
        """Wait until the node is there and active. Raises ClientError that says which of the two it is not."""
        give_up = time.monotonic() + timeout_s
        if not self.action.wait_for_server(timeout_sec=timeout_s):
            raise ClientError(
                f"no node {self.name} found within {timeout_s:g} s; start it (python -m edgellm_ros.vlm_node) and "
                "check its name, namespace and ROS_DOMAIN_ID"
            )
        with self._changed:
            self._changed.wait_for(self._settled, max(0.1, give_up - time.monotonic()))
        if self.status is None:
            raise ClientError(f"node {self.name} is there but sends no status; is it another version?")
        if self.status.state != State.PRIMARY_STATE_ACTIVE:
            raise ClientError(f"node {self.name} is not active: {self.status.message}")

    @property
    def ready(self) -> bool:
        """Whether requests can be sent: the action is there, and the node says that it is active."""
        active = self.status is not None and self.status.state == State.PRIMARY_STATE_ACTIVE
        return active and self.action.server_is_ready()

    @property
    def sees_camera(self) -> bool:
        """Whether the node has received a camera frame."""
        return self.status is not None and self.status.images_received > 0

    def _settled(self) -> bool:
        """Active, or failed to get there; a node that loads its engine is worth waiting for."""
        status = self.status
        return status is not None and (status.state == State.PRIMARY_STATE_ACTIVE or bool(status.last_error))

    def ask(
        self,
        question: str | Sequence[msg.ChatMessage],
        *,
        image_source: int = Goal.IMAGE_NONE,
        on_text: Callable[[str], None] | None = None,
        **goal_fields: Any,
    ) -> Answer:
        """Send a question or a whole conversation; `on_text` gets the answer's text as it comes.

        `goal_fields` are further fields of the Generate goal.
        """
        messages = [msg.ChatMessage(role="user", text=question)] if isinstance(question, str) else list(question)
        return Answer(self, Goal(messages=messages, image_source=image_source, **goal_fields), on_text)

    def watch(self, answer: Answer) -> None:
        """Check from time to time whether an answer is over."""
        self._watched.append(answer)

    def _check_watched(self) -> None:
        self._watched = [answer for answer in self._watched if not answer.check_over()]

    def call_soon(self, function: Callable[[], object]) -> None:
        """Call `function` on the connection's thread. rclpy's action client loses an answer that comes back before the
        call that asked for it has returned, unless both happen on the executor's thread."""
        self._node.executor.create_task(function)

    def when_rejected(self, rejected_before: int, tell: Callable[[str], None]) -> None:
        """Call `tell` with the reason of a rejection; ROS transports none, so it comes with the node's next status,
        the first that counts more than `rejected_before` rejections."""
        with self._changed:
            status = self.status
            known = status is not None and status.rejected > rejected_before
            if not known:
                self._untold.append((rejected_before, tell))
        if status is not None and known:
            tell(status.last_rejection)
            return
        timer = threading.Timer(REJECTION_WAIT_S, self._tell_rejected, (True,))
        timer.daemon = True
        timer.start()

    def _tell_rejected(self, all_of_them: bool) -> None:
        with self._changed:
            reason, rejected = (self.status.last_rejection, self.status.rejected) if self.status else ("", 0)
            told = [entry for entry in self._untold if all_of_them or rejected > entry[0]]
            self._untold = [entry for entry in self._untold if entry not in told]
        for _, tell in told:
            tell(reason or "it gave no reason")

    def _on_status(self, status: msg.NodeStatus) -> None:
        with self._changed:
            self.status = status
            self._changed.notify_all()
        self._tell_rejected(False)
