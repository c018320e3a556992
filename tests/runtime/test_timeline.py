"""The timeline's record, and its picture at the places where a colour must be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgellm.errors import RequestError
from edgellm.runtime import timeline as module
from edgellm.runtime.timeline import COLORS, Timeline

WIDTH = module._WIDTH


def recorded() -> Timeline:
    """One request with every kind of span, 1 s each, and one that waits; then idle to 8 s."""
    timeline = Timeline()
    timeline.add("queued", 100.0, 101.0, ["a"])
    timeline.add("encode", 101.0, 102.0, ["a"], 64)
    timeline.add("prefill", 102.0, 103.0, ["a"], 100)
    for start in (103.0, 104.0):
        timeline.add("decode", start, start + 1, ["a"], 1)
    timeline.add("queued", 102.0, 107.0, ["b"])
    timeline.ended("a", 105.0, "stop", 3)
    timeline.ended("b", 108.0, "cancelled", 0)
    return timeline


def test_the_record_is_json_that_counts_from_the_first_span() -> None:
    values = json.loads(json.dumps(recorded().to_dict()))
    assert values["spans"][0] == {"kind": "queued", "start": 0.0, "end": 1.0, "request_ids": ["a"], "tokens": 0}
    assert [s["start"] for s in values["spans"]] == sorted(s["start"] for s in values["spans"])
    assert values["ends"][0] == {"request_id": "a", "at": 5.0, "outcome": "stop", "tokens": 3}


def test_the_record_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SPANS", 10)
    timeline = Timeline()
    for i in range(30):
        timeline.add("decode", i, i + 1, ["a"], 1)
    assert [s.start for s in timeline.spans()] == list(range(20, 30))


def test_colours_stand_where_the_spans_are(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    recorded().draw(path, "test")
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] == WIDTH
    left, right = module._MARGIN + module._LABEL, WIDTH - module._MARGIN - module._RESULT
    step = module._LANE_HEIGHT + module._LANE_GAP
    engine = module._HEADER + module._LANE_HEIGHT // 2
    first = module._HEADER + step + module._CHART + module._LANE_HEIGHT // 2

    def color(second: float, y: int) -> tuple[int, ...]:
        return tuple(pixels[y, round(left + (right - left) * second / 8)].tolist())

    for second, kind in ((0.5, "queued"), (1.5, "encode"), (2.5, "prefill"), (3.5, "decode"), (4.5, "decode")):
        assert color(second, first) == COLORS[kind]
    assert color(4.5, first + step) == COLORS["queued"]
    assert color(5.5, first) == module._LANE
    for second, kind in ((1.5, "encode"), (2.5, "prefill"), (4.5, "decode")):
        assert color(second, engine) == COLORS[kind]
    assert color(0.5, engine) == module._LANE


@pytest.mark.parametrize("requests", [0, 1, 100])
def test_any_number_of_requests_can_be_drawn(tmp_path: Path, requests: int) -> None:
    timeline = Timeline()
    for i in range(requests):
        timeline.add("prefill", i * 1e-4, (i + 1) * 1e-4, [f"request-{i}" * 20])
    timeline.draw(tmp_path / "plot.png", "many")
    with Image.open(tmp_path / "plot.png") as image:
        lanes = 1 + min(requests, module.MAX_LANES)
        assert image.height > lanes * module._LANE_HEIGHT
        assert image.height < 2000


def test_first_token_ends_the_last_prefill_chunk_before_decode() -> None:
    timeline = Timeline()
    for start, kind in ((0, "prefill"), (1, "prefill"), (3, "decode"), (4, "prefill"), (5, "decode")):
        timeline.add(kind, start, start + 0.5, ["a"])
    assert module._first_token(timeline.spans()) == 1.5


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be written to .*missing"):
        recorded().draw(tmp_path / "missing" / "plot.png", "test")


@pytest.mark.parametrize(("least", "step"), [(0.0011, 0.002), (0.002, 0.002), (0.3, 0.5), (7, 10), (1, 1)])
def test_round_steps(least: float, step: float) -> None:
    assert module._round_step(least) == pytest.approx(step)
