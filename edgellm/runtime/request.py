"""A request's life: what was asked, how far it is, and the handle through which its caller follows it."""

from __future__ import annotations

import asyncio
import enum
import functools
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch

from edgellm.errors import EdgeLLMError
from edgellm.runtime.detokenizer import Detokenizer
from edgellm.runtime.kv_cache import SavedSlot
from edgellm.runtime.lora import LoraAdapter
from edgellm.runtime.prompt_cache import Key
from edgellm.runtime.sampling import SamplingParams
from edgellm.vision.base import PreparedImage, VisualFeatures

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Increment:
    """What one step added to an answer; the last one has `finished` set.

    `text` is whole UTF-8 and may be empty; `sampled_at` is `time.perf_counter()` when the token was sampled.
    `finish_reason`: "stop", "length", "cancelled", "deadline" or "error"; None before the end.
    """

    request_id: str
    seq: int
    text: str
    token_ids: tuple[int, ...]
    finished: bool
    finish_reason: str | None
    sampled_at: float


@dataclass(frozen=True)
class CompletionOutput:
    """One answer. `stop_reason` is the stop string or stop token id that ended it, if one did."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None


@dataclass(frozen=True)
class Usage:
    """Token counts; `reused_tokens` of the prompt came from a cache."""

    prompt_tokens: int
    completion_tokens: int
    reused_tokens: int


@dataclass(frozen=True)
class Timing:
    """Seconds: waiting in the queue, visual encoder, prefill, from submission to the first token, decode after it."""

    queue_s: float
    vision_s: float
    prefill_s: float
    ttft_s: float
    decode_s: float
    tokens_per_s: float


@dataclass(frozen=True)
class RequestOutput:
    """The outcome of a request. `prompt` is its text, None if it came as token ids; `error` the reason of a failure."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    usage: Usage
    timing: Timing
    error: str | None = None

    @property
    def text(self) -> str:
        """Text of the first answer."""
        return self.outputs[0].text


class State(enum.Enum):
    """Where a request is; it only moves forward."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """A prepared request. `token_ids` are the prompt with image tokens expanded; `positions_3S` [3, S] for images.

    After prefill a slot of the KV cache holds the prompt; every decode step adds the last sampled token.

    `deadline_at` is in `time.perf_counter()` seconds. `key` identifies the prompt in the prompt cache. A request with
    `pin_as` only fills the prompt cache, under that name. `prefilled` tokens of the prompt are in the slot, `reused` of
    them came from the prompt cache; `saved` is the KV of a displaced request.
    """

    request_id: str
    prompt: str | None
    token_ids: list[int]
    key: Key
    images: list[PreparedImage]
    image_token_id: int
    positions_3S: torch.Tensor | None
    next_position: int
    params: SamplingParams
    seed: int
    max_new_tokens: int
    detokenizer: Detokenizer | None
    handle: RequestHandle
    priority: int = 0
    client: str = ""
    deadline_at: float = math.inf
    lora: LoraAdapter | None = None
    pin_as: str | None = None
    state: State = State.QUEUED
    prefilled: int = 0
    reused: int = 0
    features: list[VisualFeatures | None] = field(default_factory=list)
    saved: SavedSlot | None = None
    output_ids: list[int] = field(default_factory=list)
    seq: int = 0
    cancelled: bool = False
    submitted_at: float = field(default_factory=time.perf_counter)
    started_at: float = 0.0
    vision_s: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0

    @functools.cached_property
    def image_spans(self) -> list[tuple[int, int]]:
        """Where each image's tokens stand in the prompt: first and one past the last."""
        spans, position = [], 0
        for image in self.images:
            first = self.token_ids.index(self.image_token_id, position)
            position = first + image.num_tokens
            spans.append((first, position))
        return spans

    @property
    def adapter(self) -> str | None:
        """The prompt cache's name of the adapter: its weights' digest, since a name may come to mean other weights."""
        return self.lora.digest if self.lora is not None else None

    @property
    def cached_tokens(self) -> int:
        """Tokens in the KV cache: what is prefilled of the prompt, and all sampled tokens but the last."""
        return self.prefilled + max(0, len(self.output_ids) - 1)

    @property
    def cached_key(self) -> Key:
        """The prompt cache's key of the tokens in the KV cache."""
        return np.concatenate((self.key[: self.prefilled], np.asarray(self.output_ids[:-1], dtype=np.int64)))

    def increment(
        self, text: str, token_ids: tuple[int, ...], finish_reason: str | None, sampled_at: float
    ) -> Increment:
        """The next increment of this request."""
        seq, self.seq = self.seq, self.seq + 1
        finished = finish_reason is not None
        return Increment(self.request_id, seq, text, token_ids, finished, finish_reason, sampled_at)

    def output(self, text: str, finish_reason: str, stop_reason: str | int | None) -> RequestOutput:
        """The outcome, with timings up to now."""
        tokens = len(self.output_ids)
        started = self.started_at or time.perf_counter()
        decode_s = self.last_token_at - self.first_token_at
        timing = Timing(
            queue_s=started - self.submitted_at,
            vision_s=self.vision_s,
            prefill_s=max(0.0, self.first_token_at - started - self.vision_s),
            ttft_s=max(0.0, self.first_token_at - self.submitted_at),
            decode_s=decode_s,
            tokens_per_s=(tokens - 1) / decode_s if decode_s > 0 else 0.0,
        )
        usage = Usage(len(self.token_ids), tokens, self.reused)
        completion = CompletionOutput(0, text, list(self.output_ids), finish_reason, stop_reason)
        return RequestOutput(self.request_id, self.prompt, list(self.token_ids), [completion], usage, timing)


class RequestHandle:
    """What `generate_async` returns: an iterator and async iterator of increments, a future, and `cancel()`.

    `on_increment` is called on the engine's thread, the last time before the result is there; if it raises, that is
    logged and it is not called again.
    """

    def __init__(
        self, request_id: str, on_increment: Callable[[Increment], None] | None, cancel: Callable[[], None]
    ) -> None:
        self.request_id = request_id
        self._on_increment = on_increment
        self._cancel = cancel
        self._future: Future[RequestOutput] = Future()
        self._increments: list[Increment] = []
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []

    def cancel(self) -> None:
        """End the request at the next step; its result is the text so far. No effect on a finished request."""
        self._cancel()

    def done(self) -> bool:
        """Whether the result is there."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait for the outcome; raises the request's EdgeLLMError if it failed, TimeoutError after `timeout` s."""
        return self._future.result(timeout)

    async def aresult(self) -> RequestOutput:
        """Await the outcome; raises as `result` does."""
        return await asyncio.wrap_future(self._future)

    def add_done_callback(self, callback: Callable[[RequestHandle], None]) -> None:
        """Call `callback(handle)` once the result is there (on the engine's thread, or at once)."""
        self._future.add_done_callback(lambda _: callback(self))

    def __iter__(self) -> Iterator[Increment]:
        seen, finished = 0, False
        while not finished:
            with self._changed:
                while not (new := self._increments[seen:]):
                    self._changed.wait()
            seen, finished = seen + len(new), new[-1].finished
            yield from new
        self._raise_failure()

    async def __aiter__(self) -> AsyncIterator[Increment]:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            loop.call_soon_threadsafe(ready.set)

        with self._changed:
            self._listeners.append(notify)
        try:
            seen, finished = 0, False
            while not finished:
                ready.clear()
                with self._changed:
                    new = self._increments[seen:]
                for increment in new:
                    yield increment
                if new:
                    seen, finished = seen + len(new), new[-1].finished
                else:
                    await ready.wait()
        finally:
            with self._changed:
                self._listeners.remove(notify)
        self._raise_failure()

    def push(self, increment: Increment, outcome: RequestOutput | EdgeLLMError | None = None) -> None:
        """Engine side: add an increment; with the last one comes the outcome, an error being what `result` raises."""
        if self._on_increment is not None:
            try:
                self._on_increment(increment)
            except Exception:
                # The caller's mistake must not reach the engine's thread, where it would fail other requests.
                log.exception("on_increment of %s raised; it is not called again", self.request_id)
                self._on_increment = None
        with self._changed:
            self._increments.append(increment)
            if isinstance(outcome, EdgeLLMError):
                self._future.set_exception(outcome)
            elif outcome is not None:
                self._future.set_result(outcome)
            self._changed.notify_all()
            for listener in self._listeners:
                listener()

    def _raise_failure(self) -> None:
        """An iteration whose request failed raises its error after the last increment."""
        error = self._future.exception()
        if error is not None:
            raise error
