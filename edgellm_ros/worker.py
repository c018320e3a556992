"""The queue between ROS callbacks and the engine; knows no ROS.

As many slot threads as the engine has batch slots take jobs in order of arrival. A job's input is put together when a
slot takes it up, not when it is submitted: a request that asks about the newest camera frame gets the frame that is
newest when the engine can look at it. Nothing here blocks the caller.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from edgellm import LLM, Increment, RequestOutput, SamplingParams
from edgellm.errors import EdgeLLMError, QueueFullError
from edgellm.runtime.request import RequestHandle

log = logging.getLogger(__name__)
SHUTDOWN_WAIT_S = 10.0
LAST_INCREMENT_WAIT_S = 1.0


@dataclass(frozen=True)
class Outcome:
    """How a job ended. Either `output` or `error` is set, or neither: cancelled before it reached the engine."""

    output: RequestOutput | None = None
    error: str = ""
    waited_s: float = 0.0  # from submission until a slot took the job up (or it ended without)
    prepare_s: float = 0.0  # from then until the engine had the job's input
    engine_at: float = 0.0  # time.monotonic() at that moment


@dataclass(eq=False)
class Job:
    """One request. `prepare` runs on a slot thread and gives what the engine gets, (messages, sampling parameters); it
    may raise EdgeLLMError. `on_increment` runs on the engine's thread, `on_done` once, on some thread, at the end."""

    request_id: str
    prepare: Callable[[], tuple[list[dict[str, Any]], SamplingParams]]
    on_increment: Callable[[Increment], None]
    on_done: Callable[[Outcome], None]
    submitted_at: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    handle: RequestHandle | None = None  # once the engine has the request


class Worker:
    """Runs jobs on one LLM, `slots` at a time, with at most `max_queue` more waiting."""

    def __init__(self, llm: LLM, slots: int, max_queue: int, on_change: Callable[[], None]) -> None:
        self.max_queue = max_queue
        self._llm = llm
        self._on_change = on_change
        self._queue: deque[Job] = deque()
        self._running: set[Job] = set()
        self._condition = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._serve, name=f"slot-{i}", daemon=True) for i in range(slots)]
        for thread in self._threads:
            thread.start()

    @property
    def running(self) -> int:
        """Jobs that a slot works on."""
        return len(self._running)

    @property
    def queued(self) -> int:
        """Jobs that wait."""
        return len(self._queue)

    @property
    def full(self) -> bool:
        """Whether `submit` would refuse a job now."""
        with self._condition:
            return self._free_places() <= 0

    def submit(self, job: Job) -> None:
        """Queue a job. Raises QueueFullError."""
        with self._condition:
            if self._free_places() <= 0:
                raise QueueFullError(
                    f"the queue is full ({len(self._running)} running, {len(self._queue)} waiting); try again later"
                )
            self._queue.append(job)
            self._condition.notify()

    def _free_places(self) -> int:
        return len(self._threads) + self.max_queue - len(self._running) - len(self._queue)

    def cancel(self, job: Job) -> None:
        """End a job as soon as possible, wherever it is; its `on_done` says what there was until then."""
        with self._condition:
            job.cancelled = True
            waiting = job in self._queue
            if waiting:
                self._queue.remove(job)
            handle = job.handle
        if waiting:
            job.on_done(Outcome(waited_s=time.monotonic() - job.submitted_at))
            self._on_change()
        elif handle is not None:
            handle.cancel()

    def _is_cancelled(self, job: Job) -> bool:
        with self._condition:
            return job.cancelled

    def drain(self, timeout_s: float) -> None:
        """Wait until all jobs have ended; cancel those that have not after `timeout_s`. The caller submits none now."""
        if self._wait_idle(timeout_s):
            return
        with self._condition:
            jobs = [*self._queue, *self._running]
        for job in jobs:
            self.cancel(job)
        self._wait_idle(SHUTDOWN_WAIT_S)

    def _wait_idle(self, timeout_s: float) -> bool:
        with self._condition:
            return self._condition.wait_for(lambda: not self._queue and not self._running, timeout_s)

    def close(self) -> None:
        """Cancel everything and end the slot threads."""
        self.drain(0.0)
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        for thread in self._threads:
            thread.join(SHUTDOWN_WAIT_S)

    def _serve(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                job = self._queue.popleft()
                self._running.add(job)
            self._on_change()
            job.on_done(self._run(job))
            with self._condition:
                self._running.discard(job)
                self._condition.notify_all()
            self._on_change()

    def _run(self, job: Job) -> Outcome:
        started = time.monotonic()
        waited = started - job.submitted_at
        last_seen = threading.Event()

        def on_increment(increment: Increment) -> None:
            job.on_increment(increment)
            if increment.finished:
                last_seen.set()

        try:
            messages, sampling = job.prepare()
            if self._is_cancelled(job):
                return Outcome(waited_s=waited)
            handle = self._llm.generate_async(messages, sampling, on_increment=on_increment, request_id=job.request_id)
        except EdgeLLMError as error:
            return Outcome(error=str(error), waited_s=waited)
        except Exception as error:
            # A fault on one request must not take the slot with it: its client, and later ones, would wait for ever.
            log.exception("request %s failed", job.request_id)
            problem = " ".join(f"internal error: {type(error).__name__}: {error}".split())
            return Outcome(error=problem, waited_s=waited)
        engine_at = time.monotonic()
        with self._condition:
            job.handle = handle
        if self._is_cancelled(job):
            handle.cancel()
        output, problem = None, ""
        try:
            output = handle.result()
        except EdgeLLMError as error:
            problem = str(error)
        # The result can be there a moment before the engine's thread has handed out the last increment.
        last_seen.wait(LAST_INCREMENT_WAIT_S)
        return Outcome(output, problem, waited, engine_at - started, engine_at)
