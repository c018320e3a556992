"""What the runtime measures about itself: per request and over the last minute, as plain objects and as JSON.

The runtime reports events (submitted, started, token, ended); `snapshot` sums them up. An event costs about a
microsecond, memory is bounded, and every method may be called from every thread. Times are seconds.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WINDOW_S = 60.0
"""Rolling figures are about this much time."""

MAX_SAMPLES = 8192
"""Most samples that a rolling figure keeps; a busier window is then shorter."""

MAX_GAPS = 4096
"""Most gaps between tokens that one request keeps for its own percentiles: the latest."""

RECENT_REQUESTS = 64
"""How many ended requests a snapshot lists."""


@dataclass(frozen=True)
class Distribution:
    """Mean, percentiles (nearest rank) and largest of `count` samples."""

    count: int
    mean: float
    p50: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, samples: Iterable[float]) -> Distribution | None:
        """The samples' distribution; None if there are none."""
        ordered = sorted(samples)
        if not ordered:
            return None
        n = len(ordered)

        def rank(percent: int) -> float:
            return ordered[-(-n * percent // 100) - 1]

        return cls(n, sum(ordered) / n, rank(50), rank(95), rank(99), ordered[-1])


@dataclass(frozen=True)
class RequestMetrics:
    """One ended request. `outcome` is its finish reason; `ttft_s` from submission; None for what did not happen."""

    request_id: str
    outcome: str
    prompt_tokens: int
    reused_tokens: int
    completion_tokens: int
    queue_s: float | None
    ttft_s: float | None
    inter_token_s: Distribution | None
    tokens_per_s: float | None
    total_s: float

    def log_fields(self) -> dict[str, float | None]:
        """What the log says about the request, times in milliseconds."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "completion_tokens": self.completion_tokens,
            "queue_ms": _milliseconds(self.queue_s),
            "ttft_ms": _milliseconds(self.ttft_s),
            "total_ms": _milliseconds(self.total_s),
            "tokens_per_s": self.tokens_per_s,
        }


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


@dataclass(frozen=True)
class MetricsSnapshot:
    """The runtime's state at one moment. Counters are since the start, distributions over the last WINDOW_S.

    `ended` counts by finish reason; `refused` never came into the queue. `tokens_per_s` is the throughput of all
    requests together over the window, `request_tokens_per_s` the rate of each that ended in it. `kv_tokens` of
    `kv_capacity_tokens` are in use. `memory_bytes` is the process's resident memory, None where it cannot be read.
    """

    uptime_s: float
    submitted: int
    refused: int
    waiting: int
    running: int
    ended: dict[str, int]
    prompt_tokens: int
    reused_tokens: int
    completion_tokens: int
    tokens_per_s: float
    request_tokens_per_s: Distribution | None
    ttft_s: Distribution | None
    inter_token_s: Distribution | None
    queue_s: Distribution | None
    kv_tokens: int
    kv_capacity_tokens: int
    kv_bytes: int
    memory_bytes: int | None
    recent: tuple[RequestMetrics, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class KVUse:
    """How full the KV cache is: tokens in use, tokens it can hold, and its bytes."""

    tokens: int = 0
    capacity_tokens: int = 0
    nbytes: int = 0


class _Samples:
    """Values with their times, of the last WINDOW_S and at most MAX_SAMPLES."""

    def __init__(self) -> None:
        self._items: deque[tuple[float, float]] = deque(maxlen=MAX_SAMPLES)

    def add(self, now: float, value: float) -> None:
        self._items.append((now, value))

    def latest(self, now: float) -> list[float]:
        """Values of the window."""
        while self._items and self._items[0][0] < now - WINDOW_S:
            self._items.popleft()
        return [value for _, value in self._items]

    def per_second(self, now: float, start: float) -> float:
        """Sum of the window's values by its time; a full store covers less time than the window."""
        total = sum(self.latest(now))
        full = len(self._items) == MAX_SAMPLES
        begin = self._items[0][0] if full else max(start, now - WINDOW_S)
        return total / (now - begin) if now > begin else 0.0


@dataclass(eq=False)
class _Open:
    """A request that has not ended."""

    submitted_at: float
    prompt_tokens: int
    gaps: array[float]
    reused_tokens: int = 0
    started_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    tokens: int = 0


class Metrics:
    """Collects events. An event about a request that is not open is ignored: a late one must not fail a step."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._start = clock()
        self._open: dict[str, _Open] = {}
        self._recent: deque[RequestMetrics] = deque(maxlen=RECENT_REQUESTS)
        self._ended: dict[str, int] = {}
        self._submitted = self._refused = 0
        self._prompt_tokens = self._reused_tokens = self._completion_tokens = 0
        self._ttft, self._gaps, self._queue = _Samples(), _Samples(), _Samples()
        self._rates, self._produced = _Samples(), _Samples()

    def submitted(self, request_id: str, prompt_tokens: int, at: float | None = None) -> None:
        """A request is about to enter the queue; its times count from `at`, by default now."""
        at = self._clock() if at is None else at
        with self._lock:
            self._submitted += 1
            self._open[request_id] = _Open(at, prompt_tokens, array("d"))

    def refused(self, request_id: str) -> None:
        """The queue did not take a submitted request."""
        with self._lock:
            if self._open.pop(request_id, None) is not None:
                self._submitted -= 1
                self._refused += 1

    def started(self, request_id: str, reused_tokens: int = 0) -> None:
        """A request got its place in the batch; `reused_tokens` of its prompt come from a cache.

        After a preemption it starts again: its time in the queue stays the first one.
        """
        now = self._clock()
        with self._lock:
            request = self._open.get(request_id)
            if request is None or request.started_at is not None:
                return
            request.started_at, request.reused_tokens = now, reused_tokens
            self._queue.add(now, now - request.submitted_at)

    def token(self, request_id: str, count: int = 1) -> None:
        """A step gave a request `count` tokens; the gap before them is one sample."""
        now = self._clock()
        with self._lock:
            request = self._open.get(request_id)
            if request is None:
                return
            if request.last_token_at is None:
                request.first_token_at = now
                self._ttft.add(now, now - request.submitted_at)
            else:
                gap = now - request.last_token_at
                self._gaps.add(now, gap)
                if len(request.gaps) == MAX_GAPS:
                    del request.gaps[: MAX_GAPS // 2]
                request.gaps.append(gap)
            request.last_token_at = now
            request.tokens += count
            self._completion_tokens += count
            self._produced.add(now, count)

    def ended(self, request_id: str, outcome: str) -> RequestMetrics | None:
        """A request ended; `outcome` is its finish reason ("stop", "length", "cancelled", …). Returns its figures."""
        now = self._clock()
        with self._lock:
            request = self._open.pop(request_id, None)
            if request is None:
                return None
            self._ended[outcome] = self._ended.get(outcome, 0) + 1
            if request.started_at is not None:
                self._prompt_tokens += request.prompt_tokens
                self._reused_tokens += request.reused_tokens
            self._recent.append(metrics := _of_request(request_id, outcome, request, now))
            if metrics.tokens_per_s is not None:
                self._rates.add(now, metrics.tokens_per_s)
        return metrics

    def snapshot(self, kv: KVUse | None = None) -> MetricsSnapshot:
        """Everything at this moment; `kv` is what the caller knows about the KV cache."""
        kv = kv or KVUse()
        now = self._clock()
        with self._lock:
            ttft, gaps, queue = self._ttft.latest(now), self._gaps.latest(now), self._queue.latest(now)
            rates, throughput = self._rates.latest(now), self._produced.per_second(now, self._start)
            running = sum(r.started_at is not None for r in self._open.values())
            counters: dict[str, Any] = {
                "submitted": self._submitted,
                "refused": self._refused,
                "waiting": len(self._open) - running,
                "running": running,
                "ended": dict(self._ended),
                "prompt_tokens": self._prompt_tokens,
                "reused_tokens": self._reused_tokens,
                "completion_tokens": self._completion_tokens,
                "recent": tuple(self._recent),
            }
        return MetricsSnapshot(
            uptime_s=now - self._start,
            **counters,
            tokens_per_s=throughput,
            request_tokens_per_s=Distribution.of(rates),
            ttft_s=Distribution.of(ttft),
            inter_token_s=Distribution.of(gaps),
            queue_s=Distribution.of(queue),
            kv_tokens=kv.tokens,
            kv_capacity_tokens=kv.capacity_tokens,
            kv_bytes=kv.nbytes,
            memory_bytes=process_memory_bytes(),
        )


def _of_request(request_id: str, outcome: str, request: _Open, now: float) -> RequestMetrics:
    queue_s, ttft_s, rate = None, None, None
    if request.started_at is not None:
        queue_s = request.started_at - request.submitted_at
    if request.first_token_at is not None and request.last_token_at is not None:
        ttft_s = request.first_token_at - request.submitted_at
        decode_s = request.last_token_at - request.first_token_at
        rate = (request.tokens - 1) / decode_s if decode_s > 0 else None
    return RequestMetrics(
        request_id=request_id,
        outcome=outcome,
        prompt_tokens=request.prompt_tokens,
        reused_tokens=request.reused_tokens,
        completion_tokens=request.tokens,
        queue_s=queue_s,
        ttft_s=ttft_s,
        inter_token_s=Distribution.of(request.gaps),
        tokens_per_s=rate,
        total_s=now - request.submitted_at,
    )


def process_memory_bytes() -> int | None:
    """Resident memory of this process, from Linux's /proc; None elsewhere."""
    try:
        fields = Path("/proc/self/statm").read_text().split()
    except OSError:
        return None
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
