"""A lifecycle node whose transitions do not stop the executor, and the bridge from threads back to it.

rclpy's LifecycleNode runs a transition inside the service callback: while a model loads, no other callback runs and no
signal is seen. Here transitions are coroutines, so that they can await work done in another thread.
All contact with rclpy's lifecycle internals (the same in Humble and Jazzy) stands in this file.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.executors import Executor
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.lifecycle.node import LifecycleNodeMixin
from rclpy.node import Node
from rclpy.task import Future

from edgellm.errors import EdgeLLMError

T = TypeVar("T")


class Completion(Generic[T]):
    """A result that another thread provides and a coroutine on the executor awaits: `await completion.future`."""

    def __init__(self, executor: Executor) -> None:
        self.future = Future(executor=executor)
        self._executor = executor

    def set_result(self, value: T) -> None:
        """May be called from any thread, once."""
        self.future.set_result(value)
        self._executor.wake()

    def set_exception(self, error: Exception) -> None:
        """May be called from any thread, once; the awaiting coroutine raises `error`."""
        self.future.set_exception(error)
        self._executor.wake()


def in_thread(executor: Executor, function: Callable[[], T]) -> Future:
    """Run `function` in a new thread; awaiting the future on `executor` gives what it returns or raises.

    The thread is a daemon: a process that is asked to end does not wait for a model to finish loading.
    """
    completion: Completion[T] = Completion(executor)

    def run() -> None:
        try:
            value = function()
        except Exception as error:  # noqa: BLE001  (raised again where the future is awaited)
            completion.set_exception(error)
        else:
            completion.set_result(value)

    threading.Thread(target=run, name=getattr(function, "__name__", "worker"), daemon=True).start()
    return completion.future


class AsyncLifecycleNode(LifecycleNodeMixin, Node):
    """Lifecycle node with coroutines for transitions: override `configure`, `activate`, `deactivate`, `cleanup`.

    A step fails by raising EdgeLLMError: the node goes back to the state it came from (from shutdown there is no way
    back) and `step_failed` gets the error. `state_changed` is called after every change of state.
    """

    def __init__(self, name: str) -> None:
        Node.__init__(self, name)
        # A coroutine occupies a mutually exclusive group until it ends; other requests have to be answered meanwhile.
        self.reentrant = ReentrantCallbackGroup()
        LifecycleNodeMixin.__init__(self, callback_group=self.reentrant)
        self._service_change_state.callback = self._on_change_state_request

    async def configure(self) -> None:
        """Acquire what the node needs."""

    async def activate(self) -> None:
        """Begin to accept work."""

    async def deactivate(self) -> None:
        """Accept no more work; finish or cancel what is at hand."""

    async def cleanup(self) -> None:
        """Give back what `configure` acquired."""

    def state_changed(self) -> None:
        """The lifecycle state is another one now."""

    def step_failed(self, name: str, error: EdgeLLMError) -> None:
        """The transition `name` raised `error`."""

    @property
    def state(self) -> int:
        """One of lifecycle_msgs/State's constants."""
        return int(self._state_machine.current_state[0])

    async def change_state(self, transition: int) -> bool:
        """Go through a transition (one of lifecycle_msgs/Transition's constants); False if it failed or is not possible
        in the present state."""
        start, label = self._state_machine.current_state
        if transition not in {possible[0] for possible in self._state_machine.available_transitions}:
            self.get_logger().warning(f"transition {transition} is not possible in state {label}; nothing changed")
            return False
        self._state_machine.trigger_transition_by_id(transition, True)
        self.state_changed()
        outcome = TransitionCallbackReturn.SUCCESS
        try:
            await self._run_steps(start)
        except EdgeLLMError as error:
            outcome = TransitionCallbackReturn.FAILURE
            self.step_failed(self._state_machine.current_state[1], error)
        self._state_machine.trigger_transition_by_label(outcome.to_label(), True)
        self.state_changed()
        return bool(outcome == TransitionCallbackReturn.SUCCESS)

    async def _run_steps(self, start: int) -> None:
        """What the transition state that has just been entered stands for; `start` is the state it was entered from."""
        now = self.state
        if now == State.TRANSITION_STATE_CONFIGURING:
            await self.configure()
        elif now == State.TRANSITION_STATE_ACTIVATING:
            await self.activate()
        elif now == State.TRANSITION_STATE_DEACTIVATING:
            await self.deactivate()
        elif now == State.TRANSITION_STATE_CLEANINGUP:
            await self.cleanup()
        elif now == State.TRANSITION_STATE_SHUTTINGDOWN:
            if start == State.PRIMARY_STATE_ACTIVE:
                await self.deactivate()
            if start != State.PRIMARY_STATE_UNCONFIGURED:
                await self.cleanup()

    async def _on_change_state_request(
        self, request: ChangeState.Request, response: ChangeState.Response
    ) -> ChangeState.Response:
        transition = request.transition.id
        if request.transition.label:
            try:
                transition = self._state_machine.get_transition_by_label(request.transition.label)
            except rclpy_implementation.RCLError:
                response.success = False
                return response
        response.success = await self.change_state(transition)
        return response

    async def start(self) -> bool:
        """Configure and activate, for a node that nobody else manages."""
        return await self.change_state(Transition.TRANSITION_CONFIGURE) and await self.change_state(
            Transition.TRANSITION_ACTIVATE
        )
