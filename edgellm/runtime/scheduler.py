"""Which request runs when: a bounded queue in front of a batch whose slots stay contiguous. No tensors here."""

from __future__ import annotations

import threading
from collections import deque

from edgellm.errors import EngineError, QueueFullError
from edgellm.runtime.request import Request, State


class Scheduler:
    """First come, first served. Thread safe for `submit`, `stop` and `wait`; the rest is for the engine's thread.

    Invariant: `running[i]` occupies slot i of the KV cache.
    """

    def __init__(self, max_batch_size: int, max_queue: int) -> None:
        self.max_batch_size = max_batch_size
        self.max_queue = max_queue
        self.running: list[Request] = []
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._stopped = False

    def submit(self, request: Request) -> None:
        """Queue a request; raises QueueFullError when the queue is full, EngineError after `stop`."""
        with self._changed:
            if self._stopped:
                raise EngineError("the engine has been closed; load it again")
            if len(self._waiting) >= self.max_queue:
                raise QueueFullError(
                    f"the queue is full ({self.max_queue} requests waiting); try again later or raise max_queue"
                )
            self._waiting.append(request)
            self._changed.notify()

    def stop(self) -> None:
        """Accept no more requests; `wait` returns False from now on."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def wait(self) -> bool:
        """Block until there is work; False once stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._waiting or self.running)
            return not self._stopped

    @property
    def queue_depth(self) -> int:
        """Requests waiting for a slot."""
        return len(self._waiting)

    def admit(self) -> Request | None:
        """Give the next waiting request the first free slot and return it; None if there is no slot or no request."""
        with self._changed:
            if not self._waiting or len(self.running) >= self.max_batch_size:
                return None
            request = self._waiting.popleft()
        request.state = State.RUNNING
        self.running.append(request)
        return request

    def take_cancelled(self) -> list[Request]:
        """Remove and return the waiting requests that were cancelled."""
        with self._changed:
            cancelled = [r for r in self._waiting if r.cancelled]
            if cancelled:
                self._waiting = deque(r for r in self._waiting if not r.cancelled)
        return cancelled

    def take_waiting(self) -> list[Request]:
        """Remove and return every waiting request."""
        with self._changed:
            waiting, self._waiting = list(self._waiting), deque()
        return waiting

    def leave(self, request: Request) -> tuple[int, int] | None:
        """Free a running request's slot; the last slot's request moves into it.

        Returns (source, target) of the move that the cache must follow, None if there is none.
        """
        slot, last = self.running.index(request), len(self.running) - 1
        request.state = State.FINISHED
        moved = self.running.pop()
        if slot == last:
            return None
        self.running[slot] = moved
        return last, slot
