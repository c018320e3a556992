"""The engine's thread: admits requests, runs prefill and decode steps, samples, and hands out what was generated.

In every iteration at most one chunk of one prompt is prefilled, then all other running requests decode one token
together: a long prompt delays a stream by no more than one chunk.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import torch

from edgellm.errors import EdgeLLMError, EngineError
from edgellm.runtime.model_runner import ModelRunner
from edgellm.runtime.prompt_cache import Entry, PromptCache
from edgellm.runtime.request import Request
from edgellm.runtime.sampling import RowParams, sample
from edgellm.runtime.scheduler import Move, Scheduler

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class _Ending:
    """How a request ends, with the text and token of its last step."""

    finish_reason: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    stop_reason: str | int | None = None


class EngineLoop:
    """Everything that happens on the engine's thread; `run` is the thread's body."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        prompt_cache: PromptCache,
        eos_token_ids: frozenset[int],
        prefill_chunk: int,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._prompt_cache = prompt_cache
        self._eos_token_ids = eos_token_ids
        self._prefill_chunk = prefill_chunk
        self._rows: RowParams | None = None
        self._calls: list[Callable[[], None]] = []
        self._calls_lock = threading.Lock()
        self._called = threading.Event()
        self._over = False

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` on the engine's thread between two steps; from any other thread."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as e:  # noqa: BLE001  (raised again where the future is awaited)
                future.set_exception(e)

        with self._calls_lock:
            if self._over:
                raise EngineError("the engine has been closed; load it again")
            self._calls.append(run)
            self._called.set()
        self._scheduler.poke()
        return future

    def run(self) -> None:
        """Work until the scheduler is stopped; then every open request ends as cancelled."""
        while self._scheduler.wait(self._called):
            self.step()
        for request in (*self._scheduler.take_waiting(), *self._scheduler.running):
            self._end(request, _Ending("cancelled"))
        with self._calls_lock:
            self._over = True
        self._answer_calls()

    def step(self) -> None:
        """One iteration."""
        self._answer_calls()
        self._end_what_is_over()
        self._displace()
        request = self._scheduler.admit()
        if request is not None:
            self._guarded([request], self._start)
        if self._scheduler.prefilling is not None:
            self._guarded([self._scheduler.prefilling], self._prefill)
        if self._scheduler.decoding:
            self._guarded(list(self._scheduler.decoding), self._decode)

    def _answer_calls(self) -> None:
        with self._calls_lock:
            calls, self._calls = self._calls, []
            self._called.clear()
        for call in calls:
            call()

    def _end_what_is_over(self) -> None:
        now = time.perf_counter()
        over = [r for r in self._scheduler.running if r.cancelled or r.deadline_at < now]
        for request in (*self._scheduler.take_over(), *over):
            self._end(request, _Ending("cancelled" if request.cancelled else "deadline"))

    def _displace(self) -> None:
        """Make room for a more urgent request; the displaced one keeps a copy of its KV."""
        victim = self._scheduler.displaced()
        if victim is not None:
            victim.saved = self._runner.kv_cache.save(self._scheduler.slot_of(victim), victim.cached_tokens)
            self._follow(self._scheduler.requeue(victim))

    def _follow(self, move: Move | None) -> None:
        """Move KV after the scheduler; the batch has changed."""
        self._rows = None
        if move is not None:
            moved = self._scheduler.decoding[move.target]
            self._runner.move_slot(move.source, move.target, moved.cached_tokens)

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

    def _start(self, requests: list[Request]) -> None:
        """Put what is known of the request's KV into its slot: its own, or a prefix from the prompt cache."""
        (request,) = requests
        slot = self._scheduler.slot_of(request)
        request.started_at = request.started_at or time.perf_counter()
        self._runner.begin(slot, request)
        if request.saved is not None:
            self._runner.kv_cache.restore(slot, request.saved, request.saved.length)
            request.saved = None
            if request.output_ids:
                self._follow(self._scheduler.promote())
            return
        entry, shared = self._prompt_cache.lookup(request.key, request.adapter)
        shared = min(shared, len(request.key) - 1)  # the last token is always computed: its logits are wanted
        if entry is not None and shared > 0:
            self._runner.kv_cache.restore(slot, entry.slot, shared)
            request.prefilled = request.reused = shared

    def _prefill(self, requests: list[Request]) -> None:
        (request,) = requests
        self._runner.encode_images(request)
        end = min(len(request.token_ids), request.prefilled + self._prefill_chunk)
        logits = self._runner.prefill(self._scheduler.slot_of(request), request, end)
        request.prefilled = end
        if end < len(request.token_ids):
            return
        request.features = []
        if request.pin_as is not None:
            self._pin(request)
            return
        rows = RowParams.from_params([request.params], [request.seed])
        token = sample(logits, rows, torch.zeros(1, dtype=torch.int64))
        self._follow(self._scheduler.promote())
        self._accept(requests, token)

    def _pin(self, request: Request) -> None:
        assert request.pin_as is not None
        saved = self._runner.kv_cache.save(self._scheduler.slot_of(request), request.prefilled)
        self._prompt_cache.drop(request.pin_as)
        if not self._prompt_cache.insert(Entry(request.key, request.adapter, saved, request.pin_as)):
            raise EngineError(
                f"system prompt {request.pin_as!r} takes {saved.nbytes} bytes, more than is left of the prompt cache's "
                f"{self._prompt_cache.max_bytes}; drop another or raise prompt_cache_bytes"
            )
        self._end(request, _Ending("stop"))

    def _decode(self, requests: list[Request]) -> None:
        if self._rows is None:
            self._rows = RowParams.from_params([r.params for r in requests], [r.seed for r in requests])
        logits = self._runner.decode(
            [r.output_ids[-1] for r in requests], [r.cached_tokens for r in requests], [r.lora for r in requests]
        )
        steps = torch.tensor([len(r.output_ids) for r in requests])
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
            if error is None and request.pin_as is None:
                self._keep(request)
            self._follow(self._scheduler.leave(request))
        request.saved, request.features = None, []
        text, whole = ending.text, ""
        if request.detokenizer is not None:
            # a stop string has taken what was held back with it
            text += "" if isinstance(ending.stop_reason, str) else request.detokenizer.finish().text
            whole = request.detokenizer.text
        now = request.last_token_at or time.perf_counter()
        last = request.increment(text, ending.token_ids, ending.finish_reason, now)
        request.handle.push(last, error or request.output(whole, ending.finish_reason, ending.stop_reason))

    def _keep(self, request: Request) -> None:
        """Copy the request's KV into the prompt cache, for a next turn, if it fits and is worth more than is there."""
        length, cache = request.cached_tokens, self._prompt_cache
        if not 0 < length * self._runner.kv_cache.bytes_per_token <= cache.max_bytes:
            return
        key = request.cached_key
        if not cache.covers(key, request.adapter):
            saved = self._runner.kv_cache.save(self._scheduler.slot_of(request), length)
            cache.insert(Entry(key, request.adapter, saved))
