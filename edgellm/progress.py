"""Progress bars on the terminal: they appear when something takes over two seconds, and never in a file or a pipe."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

DELAY_S = 2.0
"""Seconds until a bar appears."""

TICK_S = 0.5
"""A bar of steps is redrawn this often, so that its clock runs during a long step."""


def amount(total: int, description: str, unit: str = "B") -> tqdm[Any]:
    """A bar over a known amount, of bytes unless `unit` says otherwise; call `update(n)`."""
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=unit == "B",
        delay=DELAY_S,
        leave=False,
        disable=None,  # that is: where stderr is no terminal
    )


class Steps:
    """A bar over named steps of unknown length; `start` ends the step before."""

    def __init__(self, bar: tqdm[Any], description: str) -> None:
        self._bar = bar
        self._description = description
        self._started = 0

    def start(self, name: str) -> None:
        """Begin the step `name`."""
        self._bar.update(self._started - self._bar.n)
        self._started += 1
        self._bar.set_description_str(f"{self._description}: {name}", refresh=False)


@contextlib.contextmanager
def steps(total: int, description: str) -> Iterator[Steps]:
    """A bar over `total` named steps."""
    layout = "{desc} |{bar}| {n_fmt}/{total_fmt} [{elapsed}]"
    bar = tqdm(total=total, bar_format=layout, delay=DELAY_S, leave=False, disable=None)
    over = threading.Event()

    def tick() -> None:
        wait = DELAY_S
        while not over.wait(wait):
            bar.refresh()
            wait = TICK_S

    ticker = threading.Thread(target=tick, name="edgellm-progress", daemon=True)
    ticker.start()
    try:
        yield Steps(bar, description)
    finally:
        over.set()
        ticker.join()
        bar.close()
