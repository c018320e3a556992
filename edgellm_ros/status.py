"""`~/status`: what the node is doing, for late listeners too."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from rclpy.callback_groups import CallbackGroup
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile

from edgellm_ros import msg

STATUS_QOS = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
CHANGE_PERIOD_S = 0.1
ALIVE_PERIOD_S = 1.0


class Status:
    """The node's NodeStatus message. Safe to use from any thread.

    `publish` is for what a client may wait for; what changes with every request goes through `changed` and `count`,
    which cost nothing: a timer publishes it soon, so that a busy node is not busy with its status.
    """

    def __init__(self, node: Node, group: CallbackGroup, live: Callable[[], Mapping[str, Any]], **fields: Any) -> None:
        """`live` gives the fields to look up whenever the message goes out; `fields` are start values."""
        self.message = msg.NodeStatus(**fields)
        self._node = node
        self._live = live
        self._lock = threading.Lock()
        self._dirty = False
        self._published_at = 0.0
        self._publisher = node.create_publisher(msg.NodeStatus, "~/status", STATUS_QOS)
        node.create_timer(CHANGE_PERIOD_S, self._on_timer, callback_group=group)

    def publish(self, **changes: Any) -> None:
        """Change fields, and publish at once."""
        live = self._live()
        with self._lock:
            for field, value in {**live, **changes}.items():
                setattr(self.message, field, value)
            self.message.header.stamp = self._node.get_clock().now().to_msg()
            self._dirty, self._published_at = False, time.monotonic()
            self._publisher.publish(self.message)

    def error(self, reason: str, **changes: Any) -> None:
        """Publish an error as the last one."""
        self.publish(last_error=reason, last_error_stamp=self._node.get_clock().now().to_msg(), **changes)

    def rejection(self, reason: str) -> None:
        """Count a rejection and publish its reason."""
        self.count("rejected")
        self.publish(last_rejection=reason, last_rejection_stamp=self._node.get_clock().now().to_msg())

    def count(self, counter: str) -> None:
        """One more in a counter field; published soon."""
        with self._lock:
            setattr(self.message, counter, getattr(self.message, counter) + 1)
            self._dirty = True

    def changed(self) -> None:
        """Something that `live` tells is another now; published soon."""
        self._dirty = True

    def _on_timer(self) -> None:
        active = self.message.state == msg.NodeStatus.STATE_ACTIVE
        if self._dirty or (active and time.monotonic() - self._published_at >= ALIVE_PERIOD_S):
            self.publish()
