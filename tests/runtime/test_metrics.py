"""Metrics from hand-made sequences of events on a hand-driven clock."""

from __future__ import annotations

import json
import random
import sys
import threading
import time

import pytest

from edgellm.runtime import metrics as module
from edgellm.runtime.metrics import Distribution, KVUse, Metrics, process_memory_bytes


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def add(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(clock: Clock) -> Metrics:
    return Metrics(clock)


def test_one_request(metrics: Metrics, clock: Clock) -> None:
    metrics.submitted("a", 50)
    clock.add(0.25)
    assert (metrics.snapshot().waiting, metrics.snapshot().running) == (1, 0)
    metrics.started("a", reused_tokens=20)
    assert (metrics.snapshot().waiting, metrics.snapshot().running) == (0, 1)
    clock.add(0.5)
    metrics.token("a")
    for gap in (0.01, 0.02, 0.03, 0.04):
        clock.add(gap)
        metrics.token("a")
    clock.add(0.15)
    metrics.ended("a", "stop")

    snapshot = metrics.snapshot(KVUse(tokens=70, capacity_tokens=4096, nbytes=1 << 20))
    (request,) = snapshot.recent
    assert request.request_id == "a"
    assert request.outcome == "stop"
    assert (request.prompt_tokens, request.reused_tokens, request.completion_tokens) == (50, 20, 5)
    assert request.queue_s == pytest.approx(0.25)
    assert request.ttft_s == pytest.approx(0.75)
    assert request.total_s == pytest.approx(1.0)
    assert request.tokens_per_s == pytest.approx(4 / 0.1)
    assert request.inter_token_s is not None
    assert request.inter_token_s.count == 4
    assert request.inter_token_s.p50 == pytest.approx(0.02)
    assert request.inter_token_s.p99 == request.inter_token_s.max == pytest.approx(0.04)

    assert (snapshot.submitted, snapshot.waiting, snapshot.running) == (1, 0, 0)
    assert snapshot.ended == {"stop": 1}
    assert (snapshot.prompt_tokens, snapshot.reused_tokens, snapshot.completion_tokens) == (50, 20, 5)
    assert snapshot.uptime_s == pytest.approx(1.0)
    assert snapshot.tokens_per_s == pytest.approx(5.0)
    assert snapshot.ttft_s == Distribution.of([request.ttft_s])
    assert snapshot.queue_s == Distribution.of([request.queue_s])
    assert snapshot.inter_token_s == request.inter_token_s
    assert (snapshot.kv_tokens, snapshot.kv_capacity_tokens, snapshot.kv_bytes) == (70, 4096, 1 << 20)


def test_what_did_not_happen_is_none(metrics: Metrics, clock: Clock) -> None:
    empty = metrics.snapshot()
    assert (empty.ttft_s, empty.inter_token_s, empty.queue_s, empty.request_tokens_per_s) == (None,) * 4
    assert empty.tokens_per_s == 0.0
    metrics.submitted("queued", 5)
    metrics.submitted("in prefill", 7)
    metrics.submitted("one token", 9)
    metrics.started("in prefill")
    metrics.started("one token")
    metrics.token("one token")
    clock.add(1)
    for request_id in ("queued", "in prefill", "one token"):
        metrics.ended(request_id, "cancelled")
    snapshot = metrics.snapshot()
    queued, in_prefill, one_token = snapshot.recent
    assert (queued.queue_s, queued.ttft_s, queued.tokens_per_s) == (None, None, None)
    assert (in_prefill.queue_s, in_prefill.ttft_s) == (0.0, None)
    assert (one_token.ttft_s, one_token.tokens_per_s, one_token.inter_token_s) == (0.0, None, None)
    assert snapshot.ended == {"cancelled": 3}
    assert snapshot.prompt_tokens == 16  # the queued one was never read


def test_preemption_keeps_the_first_start(metrics: Metrics, clock: Clock) -> None:
    metrics.submitted("a", 5)
    clock.add(1)
    metrics.started("a")
    clock.add(5)
    metrics.started("a")
    metrics.ended("a", "stop")
    assert metrics.snapshot().recent[0].queue_s == pytest.approx(1.0)


def test_refused_requests_are_not_submitted(metrics: Metrics) -> None:
    metrics.submitted("a", 5)
    metrics.submitted("b", 5)
    metrics.refused("b")
    snapshot = metrics.snapshot()
    assert (snapshot.submitted, snapshot.refused, snapshot.waiting) == (1, 1, 1)


def test_events_about_unknown_requests_are_ignored(metrics: Metrics) -> None:
    metrics.refused("x")
    metrics.started("x")
    metrics.token("x")
    metrics.ended("x", "stop")
    assert metrics.snapshot().ended == {}
    assert metrics.snapshot().completion_tokens == 0


def test_several_tokens_in_one_step(metrics: Metrics, clock: Clock) -> None:
    metrics.submitted("a", 1)
    metrics.started("a")
    metrics.token("a")
    clock.add(0.1)
    metrics.token("a", count=4)
    metrics.ended("a", "length")
    (request,) = metrics.snapshot().recent
    assert request.completion_tokens == 5
    assert request.tokens_per_s == pytest.approx(40)
    assert request.inter_token_s is not None
    assert request.inter_token_s.count == 1


def test_old_samples_leave_the_window(metrics: Metrics, clock: Clock) -> None:
    metrics.submitted("a", 1)
    metrics.started("a")
    metrics.token("a")
    clock.add(1)
    metrics.token("a")
    clock.add(module.WINDOW_S - 0.5)
    assert metrics.snapshot().ttft_s is None
    assert metrics.snapshot().inter_token_s is not None
    assert metrics.snapshot().tokens_per_s == pytest.approx(1 / module.WINDOW_S)
    clock.add(1)
    assert metrics.snapshot().inter_token_s is None
    assert metrics.snapshot().tokens_per_s == 0.0
    assert metrics.snapshot().completion_tokens == 2


def test_throughput_of_a_window_with_more_samples_than_are_kept(metrics: Metrics, clock: Clock) -> None:
    metrics.submitted("a", 1)
    for _ in range(module.MAX_SAMPLES * 2):
        clock.add(0.001)
        metrics.token("a")
    assert metrics.snapshot().tokens_per_s == pytest.approx(1000, rel=1e-3)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 99, 100, 101, 1000])
def test_percentiles_are_nearest_ranks(count: int) -> None:
    samples = [random.Random(count).random() for _ in range(count)]
    got = Distribution.of(samples)
    assert got is not None
    for percent, value in ((50, got.p50), (95, got.p95), (99, got.p99)):
        assert value in samples
        assert sum(s <= value for s in samples) * 100 >= percent * count
        assert sum(s < value for s in samples) * 100 < percent * count
    assert got.max == max(samples)
    assert got.mean == pytest.approx(sum(samples) / count)


def test_memory_is_bounded(metrics: Metrics, clock: Clock) -> None:
    for i in range(3):
        for j in range(3 * module.RECENT_REQUESTS):
            metrics.submitted(f"{i}-{j}", 1)
            metrics.started(f"{i}-{j}")
            metrics.token(f"{i}-{j}")
            metrics.ended(f"{i}-{j}", "stop")
    metrics.submitted("long", 1)
    for _ in range(3 * module.MAX_SAMPLES):
        clock.add(0.001)
        metrics.token("long")
    assert len(metrics._open) == 1
    assert len(metrics._open["long"].gaps) <= module.MAX_GAPS
    assert len(metrics.snapshot().recent) == module.RECENT_REQUESTS
    assert len(metrics._gaps._items) == module.MAX_SAMPLES


def test_a_snapshot_is_json(metrics: Metrics, clock: Clock) -> None:
    metrics.submitted("a", 5)
    metrics.started("a")
    for _ in range(3):
        clock.add(0.1)
        metrics.token("a")
    metrics.ended("a", "stop")
    values = json.loads(json.dumps(metrics.snapshot().to_dict(), allow_nan=False))
    assert values["recent"][0]["inter_token_s"]["count"] == 2
    assert values["ttft_s"]["p99"] == pytest.approx(0.1)
    assert values["ended"] == {"stop": 1}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_process_memory() -> None:
    before = process_memory_bytes()
    block = bytearray(64 << 20)
    after = process_memory_bytes()
    assert before is not None
    assert after is not None
    assert 60 << 20 < after - before < 80 << 20
    assert len(block) == 64 << 20


def test_events_from_many_threads(metrics: Metrics) -> None:
    def work(thread: int) -> None:
        for i in range(200):
            name = f"{thread}-{i}"
            metrics.submitted(name, 2)
            metrics.started(name)
            for _ in range(5):
                metrics.token(name)
            metrics.ended(name, "stop")

    threads = [threading.Thread(target=work, args=(t,)) for t in range(6)]
    for thread in threads:
        thread.start()
    while any(t.is_alive() for t in threads):
        metrics.snapshot()
    for thread in threads:
        thread.join()
    snapshot = metrics.snapshot()
    assert (snapshot.submitted, snapshot.completion_tokens, snapshot.prompt_tokens) == (1200, 6000, 2400)
    assert snapshot.ended == {"stop": 1200}
    assert (snapshot.waiting, snapshot.running) == (0, 0)


def test_an_event_is_cheap() -> None:
    metrics = Metrics()
    metrics.submitted("a", 1)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(500):
            metrics.token("a")
        best = min(best, (time.perf_counter() - start) / 500)
    assert best < 20e-6  # measured: about 1e-6
