"""Structured log lines: fields in text and in JSON."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator

import pytest

from edgellm.runtime import logs

log = logging.getLogger("edgellm.test")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root = logging.getLogger("edgellm")
    before = (list(root.handlers), root.level, root.propagate)
    yield
    root.handlers[:], root.propagate = before[0], before[2]
    root.setLevel(before[1])


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    logs.show("text")
    logs.event(log, logging.INFO, "ended", request_id="a b", outcome="stop", ttft_ms=1.23456, queue_ms=None)
    (line,) = capsys.readouterr().err.splitlines()
    stamp, rest = line.split(" ", 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", stamp)
    assert rest == 'INFO edgellm.test: ended request_id="a b" outcome=stop ttft_ms=1.235'


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    logs.show("json", logging.DEBUG)
    logs.event(log, logging.DEBUG, "ended", request_id='say "é"\n', tokens=5)
    try:
        raise ValueError("cause")
    except ValueError:
        log.exception("step for %s failed", "request-1")
    ended, failed = map(json.loads, capsys.readouterr().err.splitlines())
    assert (ended["event"], ended["request_id"], ended["tokens"], ended["level"]) == ("ended", 'say "é"\n', 5, "DEBUG")
    assert failed["event"] == "step for request-1 failed"
    assert "ValueError: cause" in failed["exception"]


def test_levels_and_repeated_calls(capsys: pytest.CaptureFixture[str]) -> None:
    logs.show("json")
    logs.show("text", logging.WARNING)
    logs.event(log, logging.INFO, "started", request_id="a")
    logs.event(log, logging.WARNING, "ended", request_id="a")
    assert len(capsys.readouterr().err.splitlines()) == 1
