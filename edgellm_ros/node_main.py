"""What every node's `main` does: middleware profile, rclpy, one executor, signals, an orderly end."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

import rclpy
from rclpy.executors import Executor, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from rclpy.task import Future

from edgellm.errors import EdgeLLMError
from edgellm_ros.paths import use_fastdds_profile

SPIN_S = 0.2
STOP_TIMEOUT_S = 15.0
INSIST_S = 2.0


def run_node(
    make: Callable[[], Node],
    args: Sequence[str] | None = None,
    start: Callable[[Node, Executor], None] = lambda node, executor: None,
    stop: Callable[[Node, Executor], Future | None] = lambda node, executor: None,
) -> int:
    """Make a node and spin it until SIGINT or SIGTERM; returns the process's exit code.

    `start` is called once the node has its executor. On a signal `stop` is called, and the executor goes on until the
    future it returns is done: rclpy is still whole then, so clients get their results. A later signal ends at once.
    An EdgeLLMError from `make` or `start` ends in one line on stderr.
    """
    stopping = _on_signals()
    use_fastdds_profile()
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    # A single thread: rclpy's MultiThreadedExecutor loses messages above some hundred per second.
    executor = SingleThreadedExecutor()
    node = None
    try:
        node = make()
        executor.add_node(node)
        start(node, executor)
        while rclpy.ok() and not stopping:
            executor.spin_once(timeout_sec=SPIN_S)
        ended = stop(node, executor)
        give_up = time.monotonic() + STOP_TIMEOUT_S
        while ended is not None and not ended.done() and rclpy.ok() and time.monotonic() < give_up:
            executor.spin_once(timeout_sec=SPIN_S)
    except EdgeLLMError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        # The interpreter gives handlers up when it ends; a repeated signal must not turn a clean end into a killed one.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        executor.shutdown(timeout_sec=1.0)
        if node is not None:
            node.destroy_node()
        rclpy.try_shutdown()
    return 0


def _on_signals() -> list[float]:
    """From now on the times of SIGINT and SIGTERM are appended to the returned list; one that comes well after the
    first ends the process. (Ctrl-C under `ros2 launch` arrives twice: from the terminal and from launch.)"""
    seen: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        seen.append(time.monotonic())
        if seen[-1] - seen[0] > INSIST_S:
            os._exit(128 + number)

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    return seen
