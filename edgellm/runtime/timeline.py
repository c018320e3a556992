"""A record of what the engine did when, and its picture: one lane for the engine, one for each request.

Recorded only when asked for (`edgellm run --profile-plot FILE.png`). Times are `time.perf_counter()` seconds.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from edgellm.errors import RequestError

MAX_SPANS = 50_000
MAX_LANES = 40

Color = tuple[int, int, int]
COLORS: Mapping[str, Color] = {
    "queued": (205, 209, 216),
    "encode": (214, 133, 28),
    "prefill": (38, 96, 178),
    "decode": (84, 168, 104),
}
"""What a span can be, in the order of a request's life, and how it is drawn."""

_TEXT, _FAINT, _GRID, _LANE = (32, 36, 44), (110, 116, 128), (228, 231, 236), (246, 247, 249)
_OUTCOMES: Mapping[str, Color] = {"error": (196, 48, 48), "cancelled": _FAINT}
# Everything below is in pixels.
_WIDTH, _MARGIN, _LABEL, _RESULT = 1600, 24, 168, 286
_COLUMNS = {"tokens": 58, "first": 128, "tokens/s": 198}  # right ends, from the lanes' end
_OUTCOME = 212
_LANE_HEIGHT, _LANE_GAP, _HEADER, _CHART = 26, 8, 74, 84
_SEPARATE = 5  # spans this wide are drawn with a gap between them


@dataclass(frozen=True)
class Span:
    """Something that took from `start` to `end` for these requests; `tokens` it read or wrote."""

    kind: str
    start: float
    end: float
    request_ids: tuple[str, ...]
    tokens: int


@dataclass(frozen=True)
class End:
    """When a request ended, its finish reason, and the tokens of its answer."""

    request_id: str
    at: float
    outcome: str
    tokens: int


class Timeline:
    """Collects spans; the oldest go when there are more than MAX_SPANS. Safe to use from every thread."""

    def __init__(self) -> None:
        self._spans: deque[Span] = deque(maxlen=MAX_SPANS)
        self._ends: deque[End] = deque(maxlen=MAX_SPANS)
        self._lock = threading.Lock()

    def add(self, kind: str, start: float, end: float, request_ids: Iterable[str], tokens: int = 0) -> None:
        """Record a span; `kind` is a key of COLORS."""
        span = Span(kind, start, end, tuple(request_ids), tokens)
        with self._lock:
            self._spans.append(span)

    def ended(self, request_id: str, at: float, outcome: str, tokens: int) -> None:
        """Record how a request ended."""
        with self._lock:
            self._ends.append(End(request_id, at, outcome, tokens))

    def spans(self) -> list[Span]:
        """The spans so far, by start."""
        with self._lock:
            spans = list(self._spans)
        return sorted(spans, key=lambda span: span.start)

    def ends(self) -> list[End]:
        """The ends so far."""
        with self._lock:
            return list(self._ends)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it; times count from the first span."""
        spans, ends = self.spans(), self.ends()
        zero = spans[0].start if spans else 0.0
        moved = (dataclasses.replace(s, start=s.start - zero, end=s.end - zero) for s in spans)
        return {
            "spans": [dataclasses.asdict(s) for s in moved],
            "ends": [dataclasses.asdict(dataclasses.replace(e, at=e.at - zero)) for e in ends],
        }

    def draw(self, path: Path, title: str) -> None:
        """Write the picture as a PNG; raises RequestError if the file cannot be written."""
        try:
            _Picture(self.spans(), self.ends(), title).image.save(path, format="PNG")
        except OSError as e:
            raise RequestError(f"the timeline cannot be written to {path}: {e.strerror or e}") from e


class _Picture:
    """One drawing: header and legend, the engine's lane, a chart of the decode batch, a lane per request, the axis."""

    def __init__(self, spans: Sequence[Span], ends: Sequence[End], title: str) -> None:
        self._spans = spans
        self._ends = {e.request_id: e for e in ends}
        order = list(dict.fromkeys(r for s in spans for r in s.request_ids))
        self._lanes, self._left_out = order[:MAX_LANES], max(0, len(order) - MAX_LANES)
        self._zero = spans[0].start if spans else 0.0
        last = max([s.end for s in spans] + [e.at for e in ends], default=self._zero)
        self._duration = max(last - self._zero, 1e-6)
        self._left, self._right = _MARGIN + _LABEL, _WIDTH - _MARGIN - _RESULT
        lanes = (1 + len(self._lanes)) * (_LANE_HEIGHT + _LANE_GAP)
        self._bottom = _HEADER + lanes + _CHART + 24
        self.image = Image.new("RGB", (_WIDTH, self._bottom + 48), "white")
        self._draw = ImageDraw.Draw(self.image)
        self._font, self._small = ImageFont.load_default(15), ImageFont.load_default(13)
        self._ticks: list[int] = []
        self._header(title)
        self._axis()
        y = self._engine(_HEADER)
        y = self._batch_chart(y)
        for request_id in self._lanes:
            y = self._request(request_id, y)

    def _x(self, at: float) -> int:
        return round(self._left + (at - self._zero) / self._duration * (self._right - self._left))

    def _header(self, title: str) -> None:
        draw = self._draw
        draw.text((_MARGIN, 14), title, fill=_TEXT, font=ImageFont.load_default(18))
        x = float(self._left)
        for kind, color in COLORS.items():
            draw.rectangle((x, 47, x + 16, 60), fill=color)
            draw.text((x + 22, 45), kind, fill=_TEXT, font=self._font)
            x += 22 + draw.textlength(kind, font=self._font) + 26
        if self._left_out:
            draw.text((x, 45), f"and {self._left_out} more requests, not drawn", fill=_FAINT, font=self._font)
        for name, offset in _COLUMNS.items():
            self._ending_at(self._right + offset, 45, name, _FAINT)

    def _axis(self) -> None:
        """Vertical lines at round times."""
        step = _round_step(self._duration / 8)
        digits = max(0, next((d for d in range(7) if round(step, d) == step), 6) - (3 if self._duration < 1 else 0))
        for i in range(int(self._duration / step) + 1):
            x = self._x(self._zero + i * step)
            self._draw.line((x, _HEADER - 4, x, self._bottom), fill=_GRID)
            self._ticks.append(x)
            value = i * step * (1000 if self._duration < 1 else 1)
            self._centred(x, self._bottom + 6, f"{value:.{digits}f}", _FAINT)
        unit = "ms" if self._duration < 1 else "s"
        self._draw.text((self._right + 14, self._bottom + 6), f"{unit} since the start", fill=_FAINT, font=self._small)

    def _centred(self, x: float, y: float, text: str, color: Color) -> None:
        self._draw.text((x - self._draw.textlength(text, font=self._small) / 2, y), text, fill=color, font=self._small)

    def _ending_at(self, x: float, y: float, text: str, color: Color) -> None:
        self._draw.text((x - self._draw.textlength(text, font=self._font), y), text, fill=color, font=self._font)

    def _lane(self, y: int, label: str) -> None:
        self._draw.rectangle((self._left, y, self._right, y + _LANE_HEIGHT), fill=_LANE)
        for x in self._ticks:
            self._draw.line((x, y, x, y + _LANE_HEIGHT), fill=_GRID)
        self._draw.text((_MARGIN, y + 4), _fit(self._draw, label, self._font, _LABEL - 12), fill=_TEXT, font=self._font)

    def _bar(self, span: Span, y: int) -> None:
        left, right = self._x(span.start), self._x(span.end)
        right = max(left, right - 2 if right - left >= _SEPARATE else right - 1)  # a rectangle includes its last pixel
        inset = 8 if span.kind == "queued" else 2
        self._draw.rectangle((left, y + inset, right, y + _LANE_HEIGHT - inset), fill=COLORS[span.kind])

    def _engine(self, y: int) -> int:
        self._lane(y, "engine")
        busy = 0.0
        for span in self._spans:
            if span.kind != "queued":
                self._bar(span, y)
                busy += span.end - span.start
        share = f"{100 * busy / self._duration:.0f} % busy"
        self._draw.text((self._right + 14, y + 4), share, fill=_TEXT, font=self._font)
        return y + _LANE_HEIGHT + _LANE_GAP

    def _batch_chart(self, y: int) -> int:
        """Requests per decode step over time."""
        steps = [s for s in self._spans if s.kind == "decode"]
        most = max((len(s.request_ids) for s in steps), default=1)
        base, top = y + _CHART - 16, y + 6
        self._draw.text((_MARGIN, y + 4), "decode batch", fill=_TEXT, font=self._font)
        self._draw.text((_MARGIN, y + 22), f"0 to {most} requests", fill=_FAINT, font=self._small)
        for span in steps:
            height = (base - top) * len(span.request_ids) / most
            box = (self._x(span.start), base - height, self._x(span.end), base)
            self._draw.rectangle(box, fill=COLORS["decode"])
        self._draw.line((self._left, base, self._right, base), fill=_FAINT)
        tokens = sum(len(s.request_ids) for s in steps)
        rate = f"{tokens / self._duration:.0f} tokens/s in all"
        self._draw.text((self._right + 14, y + 4), rate, fill=_TEXT, font=self._font)
        return y + _CHART

    def _request(self, request_id: str, y: int) -> int:
        self._lane(y, request_id)
        spans = [s for s in self._spans if request_id in s.request_ids]
        for span in spans:
            self._bar(span, y)
        end = self._ends.get(request_id)
        color = _OUTCOMES.get(end.outcome, _TEXT) if end is not None else _TEXT
        if end is not None:
            x = self._x(end.at)
            self._draw.line((x, y, x, y + _LANE_HEIGHT), fill=color, width=2)
        self._result(spans, end, color, y)
        return y + _LANE_HEIGHT + _LANE_GAP

    def _result(self, spans: Sequence[Span], end: End | None, color: Color, y: int) -> None:
        """Tokens, time to the first one, rate and finish reason, right of the lane."""
        first, steps = _first_token(spans), [s for s in spans if s.kind == "decode"]
        texts = dict.fromkeys(_COLUMNS, "-")
        if end is not None:
            texts["tokens"] = str(end.tokens)
        if first is not None:
            texts["first"] = _duration(first - spans[0].start)
            if steps and steps[-1].end > first:
                texts["tokens/s"] = f"{len(steps) / (steps[-1].end - first):.0f}"
        for name, offset in _COLUMNS.items():
            self._ending_at(self._right + offset, y + 4, texts[name], color)
        outcome = end.outcome if end is not None else "open"
        self._draw.text((self._right + _OUTCOME, y + 4), outcome, fill=color, font=self._font)


def _first_token(spans: Sequence[Span]) -> float | None:
    """When the last prefill chunk before the first decode step ended."""
    decode = next((s.start for s in spans if s.kind == "decode"), None)
    prefills = [s.end for s in spans if s.kind == "prefill" and (decode is None or s.start < decode)]
    return prefills[-1] if prefills else None


def _round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below `least`."""
    power = 1e-6
    while power * 10 <= least:
        power *= 10
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * 0.999)


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def _fit(draw: ImageDraw.ImageDraw, text: str, font: Any, width: float) -> str:
    """`text`, its middle left out if it is too long."""
    if draw.textlength(text, font=font) <= width:
        return text
    keep = len(text)
    while keep > 2 and draw.textlength(f"{text[: keep // 2]}…{text[-keep // 2 :]}", font=font) > width:
        keep -= 1
    return f"{text[: keep // 2]}…{text[-keep // 2 :]}"
