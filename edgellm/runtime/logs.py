"""Structured logs: an event, and fields such as request_id, in one line of text or of JSON.

The runtime only emits (logger names begin with `edgellm.`); a program that wants to see the lines calls `show`, or adds
a handler of its own, which finds the fields in the record's `fields`.
"""

from __future__ import annotations

import json
import logging
import time
from typing import Any

FORMATS = ("text", "json")

_LINE = "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s"
_TIME = "%Y-%m-%dT%H:%M:%S"


def event(log: logging.Logger, level: int, name: str, /, **fields: Any) -> None:
    """Log `name` with fields; a field that is None is left out. Costs next to nothing when the level is off."""
    if not log.isEnabledFor(level):
        return
    known = {key: _rounded(value) for key, value in fields.items() if value is not None}
    text = " ".join(f"{key}={_text(value)}" for key, value in known.items())
    log.log(level, "%s %s", name, text, extra={"event": name, "fields": known})


def show(form: str = "text", level: int = logging.INFO) -> None:
    """Write the log lines of edgellm to stderr, as one of FORMATS."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines() if form == "json" else _TextLines(_LINE, _TIME))
    root = logging.getLogger("edgellm")
    for old in [h for h in root.handlers if isinstance(h.formatter, (_JsonLines, _TextLines))]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    root.propagate = False


def _rounded(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value


def _text(value: Any) -> str:
    """A value without blanks stands as it is, any other in JSON's quotes: the line splits at its blanks."""
    text = str(value)
    return text if text and not any(c.isspace() or c in '"=' for c in text) else json.dumps(text, ensure_ascii=False)


class _TextLines(logging.Formatter):
    """Text, its time in UTC."""

    converter = staticmethod(time.gmtime)


class _JsonLines(logging.Formatter):
    """One JSON object per record: time, level, logger, event and its fields; for other records the message."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime(_TIME, time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "event": getattr(record, "event", None) or record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)
