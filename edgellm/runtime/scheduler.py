"""Which request runs when. No tensors here: the engine's thread does what this says.

Requests wait in a bounded queue: higher priority first; within a priority the client that has been served least, then
the order of arrival. At most one admitted request is being prefilled, chunk by chunk, while all others decode together.
A waiting request of higher priority than a running one displaces it when there is no free slot; the displaced request
waits again, with its KV saved, and goes on where it was. LoRA adapters of a batch share a limit: a request whose
adapter does not fit to those that run waits, or displaces one of lower priority that is in its way.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from edgellm.errors import EngineError, QueueFullError
from edgellm.runtime.lora import LoraAdapter
from edgellm.runtime.request import Request, State


@dataclass(frozen=True)
class Move:
    """The KV of slot `source` goes to slot `target`."""

    source: int
    target: int


class Scheduler:
    """Thread safe for `submit`, `stop`, `wait` and `poke`; the rest is for the engine's thread.

    Invariants: `decoding[i]` occupies slot i; `prefilling`, if any, occupies `prefill_slot` ≥ len(decoding); no more
    than `max_batch_size` slots are in use.
    """

    def __init__(
        self,
        max_batch_size: int,
        max_queue: int,
        lora_fits: Callable[[Iterable[LoraAdapter | None], LoraAdapter | None], bool] = lambda running, new: True,
    ) -> None:
        self._lora_fits = lora_fits
        self.max_batch_size = max_batch_size
        self.max_queue = max_queue
        self.decoding: list[Request] = []
        self.prefilling: Request | None = None
        self.prefill_slot = 0
        self._waiting: list[Request] = []
        self._served: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._stopped = False

    # Any thread

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

    def poke(self) -> None:
        """Wake `wait`: there is something to do besides requests."""
        with self._changed:
            self._changed.notify()

    def wait(self, other_work: threading.Event) -> bool:
        """Block until there is work, or `other_work` is set; False once stopped."""
        with self._changed:
            while not (self._stopped or self._waiting or self.running or other_work.is_set()):
                self._changed.wait()
            return not self._stopped

    @property
    def queue_depth(self) -> int:
        """Requests waiting for a slot."""
        return len(self._waiting)

    # The engine's thread

    @property
    def running(self) -> list[Request]:
        """Requests that occupy a slot."""
        return [*self.decoding, *([self.prefilling] if self.prefilling is not None else [])]

    def slot_of(self, request: Request) -> int:
        """The slot of a running request."""
        return self.prefill_slot if request is self.prefilling else self.decoding.index(request)

    def displaced(self) -> Request | None:
        """The running request that must give way to a waiting one of higher priority; None if none must."""
        with self._changed:
            first = self._next()
        if first is None:
            return None
        fits = self._fits(first)
        if fits and self.prefilling is None and len(self.decoding) < self.max_batch_size:
            return None
        if self.prefilling is not None and self.prefilling.priority < first.priority:
            return self.prefilling
        if fits and len(self.running) < self.max_batch_size:
            return None  # a slot is free, but the prefill in progress is no less urgent
        in_the_way = self.running if fits else [r for r in self.running if r.lora not in (None, first.lora)]
        victim = min(in_the_way, key=lambda r: (r.priority, -r.started_at))
        return victim if victim.priority < first.priority else None

    def requeue(self, request: Request) -> Move | None:
        """A displaced request waits again; returns what `leave` does. The queue's bound does not apply to it."""
        move = self.leave(request)
        request.state = State.QUEUED
        with self._changed:
            self._waiting.append(request)
        return move

    def admit(self) -> Request | None:
        """Give the next waiting request a free slot, as `prefilling`; None if nothing waits or nothing is free."""
        with self._changed:
            first = self._next()
            if first is None or self.prefilling is not None or len(self.decoding) >= self.max_batch_size:
                return None
            if not self._fits(first):
                return None
            self._waiting.remove(first)
            if self._waiting:
                self._served[first.client] += len(first.token_ids)
            else:
                self._served.clear()  # fairness is about those that wait together
        first.state = State.RUNNING
        self.prefilling, self.prefill_slot = first, len(self.decoding)
        return first

    def promote(self) -> Move | None:
        """The prefilled request decodes from now on; returns the move of its KV, None if it is in place."""
        request = self.prefilling
        assert request is not None
        self.prefilling = None
        self.decoding.append(request)
        target = len(self.decoding) - 1
        return None if target == self.prefill_slot else Move(self.prefill_slot, target)

    def leave(self, request: Request) -> Move | None:
        """Free a running request's slot; the last decoding request moves into it. Returns that move, or None."""
        request.state = State.FINISHED
        if request is self.prefilling:
            self.prefilling = None
            return None
        slot, last = self.decoding.index(request), len(self.decoding) - 1
        moved = self.decoding.pop()
        if slot == last:
            return None
        self.decoding[slot] = moved
        return Move(last, slot)

    def take_over(self) -> list[Request]:
        """Remove and return the waiting requests that were cancelled or are past their deadline."""
        now = time.perf_counter()
        with self._changed:
            over = [r for r in self._waiting if r.cancelled or r.deadline_at < now]
            if over:
                self._waiting = [r for r in self._waiting if r not in over]
        return over

    def take_waiting(self) -> list[Request]:
        """Remove and return every waiting request."""
        with self._changed:
            waiting, self._waiting = self._waiting, []
        return waiting

    def _fits(self, request: Request) -> bool:
        return self._lora_fits([r.lora for r in self.running], request.lora)

    def _next(self) -> Request | None:
        """The waiting request whose turn it is; min() keeps the order of arrival among equals."""
        return min(self._waiting, key=lambda r: (-r.priority, self._served[r.client]), default=None)
