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

from edgellm.errors import EdgeLLMError, EngineError, RequestError
from edgellm.runtime import logs
from edgellm.runtime.guided import MaskWorker, apply_bitmask
from edgellm.runtime.metrics import Metrics
from edgellm.runtime.model_runner import ModelRunner
from edgellm.runtime.prompt_cache import Entry, PromptCache
from edgellm.runtime.request import Request
from edgellm.runtime.sampling import Logprob, RowParams, Sampled, SamplerState, row_errors, sample
from edgellm.runtime.scheduler import Move, Scheduler
from edgellm.runtime.timeline import Timeline

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
        metrics: Metrics,
        timeline: Timeline | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._prompt_cache = prompt_cache
        self._eos_token_ids = eos_token_ids
        self._prefill_chunk = prefill_chunk
        self._metrics = metrics
        self._timeline = timeline
        self._rows: RowParams | None = None
        self._history = SamplerState.empty(scheduler.max_batch_size, runner.capacity, runner.device)
        self._masks = MaskWorker(scheduler.max_batch_size, runner.vocab_size, runner.device)
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
        self._masks.close()
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
            victim.displaced_at = time.perf_counter()
            logs.event(log, logging.DEBUG, "displaced", request_id=victim.request_id)
            victim.saved = self._runner.kv_cache.save(self._scheduler.slot_of(victim), victim.cached_tokens)
            self._follow(self._scheduler.requeue(victim))

    def _follow(self, move: Move | None) -> None:
        """Move KV after the scheduler; the batch has changed."""
        self._rows = None
        if move is not None:
            moved = self._scheduler.decoding[move.target]
            self._runner.move_slot(move.source, move.target, moved.cached_tokens)
            self._history.move_slot(move.source, move.target)

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
        waited_since = request.displaced_at or request.submitted_at
        self._record("queued", waited_since, [request])
        request.started_at = request.started_at or time.perf_counter()
        self._runner.begin(slot, request)
        if request.saved is not None:
            self._runner.kv_cache.restore(slot, request.saved, request.saved.length)
            request.saved = None
            if request.output_ids:
                self._follow(self._scheduler.promote())
                self._history.set_slot(self._scheduler.slot_of(request), request.token_ids, request.output_ids)
            return
        entry, shared = self._prompt_cache.lookup(request.key, request.adapter)
        shared = min(shared, len(request.key) - 1)  # the last token is always computed: its logits are wanted
        if entry is not None and shared > 0:
            self._runner.kv_cache.restore(slot, entry.slot, shared)
            request.prefilled = request.reused = shared
        self._metrics.started(request.request_id, request.reused)
        logs.event(log, logging.DEBUG, "started", request_id=request.request_id, reused_tokens=request.reused)

    def _prefill(self, requests: list[Request]) -> None:
        (request,) = requests
        start = time.perf_counter()
        encoded_before = request.vision_s
        self._runner.encode_images(request)
        if request.vision_s > encoded_before:
            self._record("encode", start, requests)
        start = time.perf_counter()
        end = min(len(request.token_ids), request.prefilled + self._prefill_chunk)
        if end == len(request.token_ids):
            self._masks.start([request.guided])
        logits = self._runner.prefill(self._scheduler.slot_of(request), request, end)
        self._record("prefill", start, requests, end - request.prefilled)
        request.prefilled = end
        if end < len(request.token_ids):
            return
        request.features = []
        if request.pin_as is not None:
            self._pin(request)
            return
        self._follow(self._scheduler.promote())
        slot = self._scheduler.slot_of(request)
        self._history.set_slot(slot, request.token_ids)
        rows = self._row_params(requests, logits.device)
        failures = self._mask(logits)
        sampled = self._sample(logits, rows, requests, slot)
        self._accept(requests, sampled, failures)

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
        start = time.perf_counter()
        self._masks.start([r.guided for r in requests])
        logits = self._runner.decode([r.output_ids[-1] for r in requests], [r.cached_tokens for r in requests])
        if self._rows is None:
            self._rows = self._row_params(requests, logits.device)
        failures = self._mask(logits)
        sampled = self._sample(logits, self._rows, requests, 0)
        self._record("decode", start, requests, len(requests))
        self._accept(requests, sampled, failures)

    def _row_params(self, requests: list[Request], device: torch.device) -> RowParams:
        eos = sorted(self._eos_token_ids)
        params, seeds = [r.params for r in requests], [r.seed for r in requests]
        return RowParams.from_params(params, seeds, device, eos_token_ids=eos)

    def _sample(self, logits: torch.Tensor, rows: RowParams, requests: list[Request], first_slot: int) -> Sampled:
        """The next token of each row; the rows are those of the slots from `first_slot` on."""
        steps = torch.tensor([len(r.output_ids) for r in requests], device=logits.device)
        if not rows.needs_history:
            return sample(logits, rows, steps)
        history = self._history.view(first_slot, len(requests))
        sampled = sample(logits, rows, steps, history)
        history.append(sampled.tokens)
        return sampled

    def _record(self, kind: str, start: float, requests: list[Request], tokens: int = 0) -> None:
        """Something that has just ended goes into the timeline, if there is one."""
        if self._timeline is not None:
            self._timeline.add(kind, start, time.perf_counter(), [r.request_id for r in requests], tokens)

    def _mask(self, logits: torch.Tensor) -> dict[int, RequestError]:
        """Apply the masks of guided requests, computed during the step; returns, by row, why one cannot go on."""
        bitmask, failures = self._masks.finish()
        if bitmask is not None:
            apply_bitmask(logits, bitmask)
        return failures

    def _accept(self, requests: list[Request], sampled: Sampled, masked: dict[int, RequestError]) -> None:
        """Give each request its sampled token; those that are complete end after all have theirs, since slots move."""
        failures: dict[int, EdgeLLMError] = row_errors(sampled) | masked
        tokens = sampled.tokens.tolist()
        reported = self._logprobs(requests, sampled, tokens)
        now = time.perf_counter()
        complete: list[tuple[Request, _Ending, EdgeLLMError | None]] = []
        for row, (request, token) in enumerate(zip(requests, tokens, strict=True)):
            if row in failures:
                complete.append((request, _Ending("error"), failures[row]))
                continue
            request.first_token_at = request.first_token_at or now
            request.last_token_at = now
            ending = self._add_token(request, token, reported.get(row))
            if ending is not None:
                complete.append((request, ending, None))
        for request, ending, error in complete:
            self._end(request, ending, error)

    def _logprobs(self, requests: list[Request], sampled: Sampled, tokens: list[int]) -> dict[int, dict[int, Logprob]]:
        """By row, the log probabilities that its request wants to see."""
        rows = [i for i, r in enumerate(requests) if r.params.needs_logprobs]
        if sampled.logprobs is None:
            return {}
        counts = [requests[i].params.logprobs or 0 for i in rows]
        return dict(zip(rows, sampled.logprobs.dicts([tokens[i] for i in rows], counts), strict=True))

    def _add_token(self, request: Request, token: int, logprobs: dict[int, Logprob] | None) -> _Ending | None:
        """Append the token and send its text, or say how the request ends."""
        guided = request.guided
        if token in self._eos_token_ids and (guided is not None or not request.params.ignore_eos):
            return _Ending("stop")
        if token in (request.params.stop_token_ids or ()):
            return _Ending("stop", stop_reason=token)
        request.output_ids.append(token)
        if logprobs is not None:
            request.logprobs.append(logprobs)
        self._metrics.token(request.request_id)
        text, stopped_by = "", None
        if request.detokenizer is not None:
            delta = request.detokenizer.push([token])
            text, stopped_by = delta.text, delta.stopped_by
        if stopped_by is not None:
            return _Ending("stop", text, (token,), stopped_by)
        if guided is not None:
            if not guided.accept(token):
                raise EngineError(f"token {token} was drawn though the mask of guided output excludes it")
            if guided.is_terminated:
                return _Ending("stop", text, (token,))
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
        self._report(request, ending.finish_reason, error)
        last = request.increment(text, ending.token_ids, ending.finish_reason, now)
        request.handle.push(last, error or request.output(whole, ending.finish_reason, ending.stop_reason))

    def _report(self, request: Request, outcome: str, error: EdgeLLMError | None) -> None:
        """The end of a request in the metrics, the timeline and the log."""
        ended = self._metrics.ended(request.request_id, outcome)
        if self._timeline is not None:
            self._timeline.ended(request.request_id, time.perf_counter(), outcome, len(request.output_ids))
        figures = ended.log_fields() if ended is not None else {}
        level = logging.WARNING if error is not None else logging.INFO
        logs.event(log, level, "ended", request_id=request.request_id, outcome=outcome, **figures, error=error)

    def _keep(self, request: Request) -> None:
        """Copy the request's KV into the prompt cache, for a next turn, if it fits and is worth more than is there."""
        length, cache = request.cached_tokens, self._prompt_cache
        if not 0 < length * self._runner.kv_cache.bytes_per_token <= cache.max_bytes:
            return
        key = request.cached_key
        if not cache.covers(key, request.adapter):
            saved = self._runner.kv_cache.save(self._scheduler.slot_of(request), length)
            cache.insert(Entry(key, request.adapter, saved))
