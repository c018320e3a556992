"""`vlm_node`: a language or vision-language model as a lifecycle node.

configure loads the engine, activate accepts requests, deactivate drains, cleanup frees. Requests come as goals of the
action `~/generate` or as texts on `prompt`; answers stream on `~/tokens` and as action feedback. The executor's thread
only shuffles messages: loading, image conversion, tokenizing and inference have threads of their own, and tokens are
published by the engine's thread at the moment they are sampled.
"""

from __future__ import annotations

import gc
import sys
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from lifecycle_msgs.msg import State
from rclpy.action import ActionServer, CancelResponse, GoalResponse
from rclpy.action.server import ServerGoalHandle
from rclpy.executors import Executor
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.task import Future
from std_msgs.msg import String

from edgellm import LLM, SamplingParams
from edgellm.config import KvCacheConfig
from edgellm.errors import ConfigError, EdgeLLMError, RequestError
from edgellm_ros import msg, params
from edgellm_ros.action import Generate
from edgellm_ros.camera import Camera
from edgellm_ros.lifecycle import AsyncLifecycleNode, Completion, in_thread
from edgellm_ros.node_main import run_node
from edgellm_ros.request import ActiveRequest
from edgellm_ros.status import Status
from edgellm_ros.worker import Worker

TOKENS_QOS = QoSProfile(depth=200)
RELIABLE_QOS = QoSProfile(depth=10)
RESULT_TIMEOUT_S = 60
WARM_UP_IMAGE = np.zeros((256, 320, 3), np.uint8)


class VlmNode(AsyncLifecycleNode):
    """The node. Raises ConfigError for a parameter that is not allowed."""

    def __init__(self) -> None:
        super().__init__("vlm_node")
        params.declare(self)
        self._worker: Worker | None = None
        self._llm: LLM | None = None
        self._requests: dict[str, ActiveRequest] = {}
        self.tokens = self.create_publisher(msg.TokenChunk, "~/tokens", TOKENS_QOS)
        self._text = self.create_publisher(String, "~/text", RELIABLE_QOS)
        self._response = self.create_publisher(msg.GenerateResult, "~/response", RELIABLE_QOS)
        self.camera = Camera(self, self.reentrant)
        self._status = Status(
            self,
            self.reentrant,
            self._live_status,
            message="not configured",
            engine_dir=self.parameter("engine_dir"),
            max_queue=self.parameter("max_queue"),
        )
        self.create_subscription(String, "prompt", self._on_prompt, RELIABLE_QOS, callback_group=self.reentrant)
        self._action = ActionServer(
            self,
            Generate,
            "~/generate",
            self._on_goal_accepted,
            goal_callback=self._on_goal,
            cancel_callback=self._on_cancel,
            callback_group=self.reentrant,
            feedback_pub_qos_profile=TOKENS_QOS,
            result_timeout=RESULT_TIMEOUT_S,
        )
        self._status.publish()

    def parameter(self, name: str) -> Any:
        """The present value of a parameter."""
        return self.get_parameter(name).value

    # Lifecycle

    async def configure(self) -> None:
        """Load and warm up the engine in a thread of its own."""
        engine_dir = self.parameter("engine_dir")
        if not engine_dir:
            raise ConfigError("parameter engine_dir is empty; set it to an engine directory made by `edgellm build`")
        threads, cache_bytes = self.parameter("num_threads") or None, self.parameter("prompt_cache_mb") * 2**20
        self._status.publish(message=f"loading {engine_dir}")
        llm: LLM = await in_thread(self.executor, lambda: load(engine_dir, threads, cache_bytes))
        self._llm = llm
        config = llm.config
        self._worker = Worker(llm, config.limits.max_batch_size, self.parameter("max_queue"), self._status.changed)
        # What is loaded stays; without this the garbage collector would look through all of it while answers stream.
        gc.collect()
        gc.freeze()
        self._status.publish(
            message=f"loaded {engine_dir}",
            model_type=config.model_type,
            backend=config.backend,
            accepts_images=config.vision is not None,
            last_error="",
        )
        self.get_logger().info(f"loaded {engine_dir}: {config.model_type} on {config.backend}")

    async def activate(self) -> None:
        """From now on requests are accepted (the state itself is the switch)."""
        self._status.publish(message="ready")

    async def deactivate(self) -> None:
        """No new requests (the state says so); accepted ones get `drain_timeout` seconds, then they are cancelled."""
        worker, timeout = self._worker, self.parameter("drain_timeout")
        assert worker is not None
        self._status.publish(message="waiting for accepted requests")
        await in_thread(self.executor, lambda: worker.drain(timeout))
        self._status.publish(message="loaded, not active")

    async def cleanup(self) -> None:
        """Free the engine."""
        worker, llm = self._worker, self._llm
        assert worker is not None and llm is not None
        self._worker = self._llm = None

        def free() -> None:
            worker.close()
            llm.close()

        await in_thread(self.executor, free)
        gc.unfreeze()
        gc.collect()
        self._status.publish(message="not configured", model_type="", backend="", accepts_images=False)

    def state_changed(self) -> None:
        """Tell everyone."""
        self._status.publish()

    def step_failed(self, name: str, error: EdgeLLMError) -> None:
        """Say why on the log and on `~/status`."""
        self.get_logger().error(f"{name} failed: {error}")
        self._status.error(str(error), message=f"{name} failed: {error}")

    async def stop(self) -> None:
        """Cancel what is running and free the engine: the process ends."""
        if self._worker is not None:
            for request in list(self._requests.values()):
                self._worker.cancel(request.job)
            worker, llm = self._worker, self._llm
            assert llm is not None
            await in_thread(self.executor, worker.close)
            await in_thread(self.executor, llm.close)

    def _live_status(self) -> dict[str, Any]:
        worker = self._worker
        return {
            "state": self.state,
            "running": worker.running if worker else 0,
            "queued": worker.queued if worker else 0,
            "images_received": self.camera.received,
        }

    # Requests

    def _refusal(self) -> str | None:
        """Why a request that comes now would be rejected; None if it would not."""
        if self.state != State.PRIMARY_STATE_ACTIVE or self._worker is None:
            return f"the node is not active ({self._status.message.message}); configure and activate it"
        if self._worker.full:
            return f"the queue is full ({self._worker.running} running, {self._worker.queued} waiting); try again later"
        return None

    def _reject(self, what: str, reason: str) -> None:
        self.get_logger().warning(f"{what} rejected: {reason}")
        self._status.rejection(reason)

    def _on_prompt(self, message: String) -> None:
        refusal = self._refusal()
        if refusal:
            self._reject("prompt", refusal)
            return
        goal = Generate.Goal(messages=[msg.ChatMessage(role=msg.ChatMessage.ROLE_USER, text=message.data)])
        if self._status.message.accepts_images and self.parameter("prompt_image") == "latest":
            goal.image_source = Generate.Goal.IMAGE_LATEST
        self._submit(uuid.uuid4().hex, goal, None, lambda result: None)

    def _on_goal(self, goal: Generate.Goal) -> GoalResponse:
        refusal = self._refusal()
        if refusal:
            self._reject("goal", refusal)
            return GoalResponse.REJECT
        return GoalResponse.ACCEPT

    def _on_cancel(self, handle: ServerGoalHandle) -> CancelResponse:
        request = self._requests.get(request_id_of(handle))
        if request is not None and self._worker is not None:
            request.cancelled_by_client = True
            self._worker.cancel(request.job)
        return CancelResponse.ACCEPT

    async def _on_goal_accepted(self, handle: ServerGoalHandle) -> Generate.Result:
        completion: Completion[msg.GenerateResult] = Completion(self.executor)

        def feedback(chunk: msg.TokenChunk) -> None:
            handle.publish_feedback(Generate.Feedback(chunk=chunk))

        request = self._submit(request_id_of(handle), handle.request, feedback, completion.set_result)
        if request is not None and handle.is_cancel_requested:  # between its acceptance and now
            self._on_cancel(handle)
        result: msg.GenerateResult = await completion.future
        if result.status == msg.GenerateResult.STATUS_SUCCEEDED:
            handle.succeed()
        elif result.status == msg.GenerateResult.STATUS_CANCELED:
            handle.canceled()
        else:
            handle.abort()
        return Generate.Result(result=result)

    def _submit(
        self,
        request_id: str,
        goal: Generate.Goal,
        feedback: Callable[[msg.TokenChunk], None] | None,
        on_result: Callable[[msg.GenerateResult], None],
    ) -> ActiveRequest | None:
        """Hand a request to the worker; `on_result` is called once, from any thread."""

        def finish(result: msg.GenerateResult) -> None:
            self._requests.pop(request_id, None)
            self._publish_result(result)
            on_result(result)

        request = ActiveRequest(self, request_id, goal, feedback, finish)
        self._requests[request_id] = request
        worker = self._worker
        try:
            if worker is None or self.state != State.PRIMARY_STATE_ACTIVE:  # changed since the goal was accepted
                raise RequestError("the node was deactivated before the request began; ask again")
            worker.submit(request.job)
        except RequestError as error:
            request.fail(str(error))
            return None
        self._status.changed()
        return request

    def _publish_result(self, result: msg.GenerateResult) -> None:
        self._response.publish(result)
        if result.status == msg.GenerateResult.STATUS_SUCCEEDED:
            self._text.publish(String(data=result.text))
            self._status.count("succeeded")
        elif result.status == msg.GenerateResult.STATUS_CANCELED:
            self._status.count("canceled")
        else:
            self.get_logger().error(f"request {result.request_id[:8]} failed: {result.error}")
            self._status.count("aborted")
            self._status.error(result.error)


def load(engine_dir: str, num_threads: int | None, prompt_cache_bytes: int) -> LLM:
    """Load an engine and answer one request with it: what is used for the first time takes many times as long.

    Raises EngineDirError, and RequestError for a model that cannot be talked to in chat messages.
    """
    llm = LLM(engine_dir, num_threads=num_threads, kv_cache_config=KvCacheConfig(prompt_cache_bytes))
    content: list[dict[str, Any]] = [{"type": "text", "text": "Hello"}]
    if llm.config.vision is not None:
        content.insert(0, {"type": "image", "image": WARM_UP_IMAGE})
    llm.generate([{"role": "user", "content": content}], SamplingParams(max_tokens=2, ignore_eos=True))
    return llm


def request_id_of(handle: ServerGoalHandle) -> str:
    """A goal's id as 32 hexadecimal digits: the request_id in every message about it."""
    return bytes(handle.goal_id.uuid).hex()


def main(args: Sequence[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM; 0, or 1 after a one-line error."""

    def start(node: Node, executor: Executor) -> None:
        assert isinstance(node, VlmNode)
        if node.parameter("autostart"):
            executor.create_task(node.start)

    def stop(node: Node, executor: Executor) -> Future:
        assert isinstance(node, VlmNode)
        return executor.create_task(node.stop)

    return run_node(VlmNode, args, start, stop)


if __name__ == "__main__":
    sys.exit(main())
