"""The engine's thread: admits requests, runs prefill and decode steps, samples, and hands out what was generated.

In every iteration at most one waiting request is prefilled, then all running requests decode one token together, so a
stream never waits for more than one prompt.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from edgellm.errors import EdgeLLMError, EngineError
from edgellm.runtime.model_runner import ModelRunner
from edgellm.runtime.request import Request
from edgellm.runtime.sampling import RowParams, sample
from edgellm.runtime.scheduler import Scheduler


@dataclass(frozen=True)
class _Ending:
    """How a request ends, with the text and token of its last step."""

    finish_reason: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    stop_reason: str | int | None = None


log = logging.getLogger(__name__)


class EngineLoop:
    """Everything that happens on the engine's thread; `run` is the thread's body."""

    def __init__(self, scheduler: Scheduler, runner: ModelRunner, eos_token_ids: frozenset[int]) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._eos_token_ids = eos_token_ids
        self._rows: RowParams | None = None

    def run(self) -> None:
        """Work until the scheduler is stopped; then every open request ends as cancelled."""
        while self._scheduler.wait():
            self._end_cancelled()
            request = self._scheduler.admit()
            if request is not None:
                self._rows = None
                self._guarded([request], self._prefill)
            if self._scheduler.running:
                self._guarded(list(self._scheduler.running), self._decode)
        for request in (*self._scheduler.take_waiting(), *list(self._scheduler.running)):
            self._end(request, _Ending("cancelled"))

    def _end_cancelled(self) -> None:
        for request in (*self._scheduler.take_cancelled(), *[r for r in self._scheduler.running if r.cancelled]):
            self._end(request, _Ending("cancelled"))

    def _guarded(self, requests: list[Request], step: Callable[[list[Request]], None]) -> None:
        """Run a step; what it raises fails the requests it ran for, and no others."""
        try:
            step(requests)
        except EdgeLLMError as e:
            error = e
        except Exception as e:
            # A fault in a step must not take the other requests, or the robot's process, with it.
            log.exception("step for %s failed", ", ".join(r.request_id for r in requests))
            error = EngineError(f"the engine failed on this request: {type(e).__name__}: {e}".splitlines()[0])
        else:
            return
        for request in requests:
            if request in self._scheduler.running:
                self._end(request, _Ending("error"), error)

    def _prefill(self, requests: list[Request]) -> None:
        (request,) = requests
        request.started_at = time.perf_counter()
        features = self._runner.encode_images(request)
        logits = self._runner.prefill(self._scheduler.running.index(request), request, features)
        rows = RowParams.from_params([request.params], [request.seed], logits.device)
        self._accept(requests, sample(logits, rows, torch.zeros(1, dtype=torch.int64, device=logits.device)))

    def _decode(self, requests: list[Request]) -> None:
        logits = self._runner.decode([r.output_ids[-1] for r in requests], [r.cached_tokens for r in requests])
        if self._rows is None:
            seeds = [r.seed for r in requests]
            self._rows = RowParams.from_params([r.params for r in requests], seeds, logits.device)
        steps = torch.tensor([len(r.output_ids) for r in requests], device=logits.device)
        self._accept(requests, sample(logits, self._rows, steps))

    def _accept(self, requests: list[Request], tokens: torch.Tensor) -> None:
        """Give each request its sampled token; those that are complete end after all have theirs, since slots move."""
        now = time.perf_counter()
        complete = []
        for request, token in zip(requests, tokens.tolist(), strict=True):
            request.first_token_at = request.first_token_at or now
            request.last_token_at = now
            ending = self._add_token(request, token)
            if ending is not None:
                complete.append((request, ending))
        for request, ending in complete:
            self._end(request, ending)

    def _add_token(self, request: Request, token: int) -> _Ending | None:
        """Append the token and send its text, or say how the request ends."""
        if token in self._eos_token_ids and not request.params.ignore_eos:
            return _Ending("stop")
        if token in (request.params.stop_token_ids or ()):
            return _Ending("stop", stop_reason=token)
        request.output_ids.append(token)
        text, stopped_by = "", None
        if request.detokenizer is not None:
            delta = request.detokenizer.push([token])
            text, stopped_by = delta.text, delta.stopped_by
        if stopped_by is not None:
            return _Ending("stop", text, (token,), stopped_by)
        if len(request.output_ids) >= request.max_new_tokens:
            return _Ending("length", text, (token,))
        request.handle.push(request.increment(text, (token,), None, request.last_token_at))
        return None

    def _end(self, request: Request, ending: _Ending, error: EdgeLLMError | None = None) -> None:
        """Free the request's slot and deliver its last increment and outcome."""
        if request in self._scheduler.running:
            moved = self._scheduler.leave(request)
            self._rows = None
            if moved is not None:
                source, target = moved
                self._runner.move_slot(source, target, self._scheduler.running[target].cached_tokens)
        text, whole = ending.text, ""
        if request.detokenizer is not None:
            # a stop string has taken what was held back with it
            text += "" if isinstance(ending.stop_reason, str) else request.detokenizer.finish().text
            whole = request.detokenizer.text
        now = request.last_token_at or time.perf_counter()
        last = request.increment(text, ending.token_ids, ending.finish_reason, now)
        request.handle.push(last, error or request.output(whole, ending.finish_reason, ending.stop_reason))
