"""Guided output: keeps an answer to a JSON schema, a regular expression, a list of choices or a grammar.

Before each token is drawn, a mask of the tokens that may come next is applied to the logits. The masks come from the
library llguidance. It was chosen over xgrammar because it compiles a schema in about a millisecond where xgrammar takes
seconds with a vocabulary of 150,000 (benchmarks/guided.py), needs no other package where xgrammar imports transformers,
says which keyword of a schema it cannot hold to where xgrammar ignores it, and has one wheel for every Python.

Bitmask format: int32 [B, W], W = ceil(V / 32) words; bit i % 32 of word i // 32 is set where token i may come next.
Shape letters: B rows of the batch, V vocabulary, W words of a mask.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from edgellm.errors import ConfigError, RequestError
from edgellm.runtime.tokenizer import Tokenizer

KINDS = ("json_schema", "json_object", "regex", "choice", "ebnf")
MAX_BYTES = 100_000
"""Longest schema, regular expression, grammar or list of choices, in UTF-8."""

MAX_CHOICES = 1000
CACHED_GRAMMARS = 32

_JSON_WHITESPACE = r" |\n[ \t]{0,40}"
"""What may stand once between JSON tokens: enough for any style, not enough for a model to be lost in it."""

_LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
_NOTHING_MATCHES = "no text matches it"
_REASON_LENGTH = 200


@dataclass(frozen=True)
class GuidedDecodingParams:
    """What the answer must be; exactly one is given. A bad value is a RequestError that says why.

    `json_schema`: JSON text that is valid for the schema, given as an object or as its JSON text. A keyword that
    cannot be held to (such as uniqueItems) is refused, not ignored. `json_object`: any JSON object. `regex`: matches
    as a whole; Rust's syntax, no look-around. `choice`: one of these strings. `ebnf`: a grammar in GBNF (llama.cpp;
    starts at `root ::=`) or in llguidance's Lark dialect (starts at `start:`; may name special tokens, `<tool_call>`).

    An answer that `max_tokens` ends is the beginning of such a text; its finish_reason is "length".
    After construction `json_schema` is JSON text and `choice` a tuple, so that equal parameters share one grammar.
    """

    json_schema: str | Mapping[str, object] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    ebnf: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool):
            raise RequestError(f"json_object is {self.json_object!r}; it must be true or false")
        given = [kind for kind in KINDS if getattr(self, kind) not in (None, False)]
        if len(given) != 1:
            raise RequestError(f"guided output takes exactly one of {', '.join(KINDS)}; got {' and '.join(given) or 0}")
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _schema_text(self.json_schema))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        for name in ("json_schema", "regex", "ebnf"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise RequestError(f"{name} is {_shown(value)}; it must be a text of at least one character")
        _check_size(self.kind, self._text)

    @property
    def kind(self) -> str:
        """Which one is given, one of KINDS."""
        return next(kind for kind in KINDS if getattr(self, kind) not in (None, False))

    @property
    def _text(self) -> str:
        if self.choice is not None:
            return " | ".join(json.dumps(c, ensure_ascii=False) for c in self.choice)
        return str(self.json_schema or self.regex or self.ebnf or '{"type":"object"}')

    def grammar(self) -> str:
        """The grammar as llguidance takes it; raises RequestError for a GBNF grammar that cannot be translated."""
        if self.kind == "regex":
            return str(grammar_from("regex", self._text))
        if self.kind == "choice":
            return str(grammar_from("lark", f"start: {self._text}"))
        if self.kind == "ebnf":
            try:
                return str(grammar_from("ebnf", self._text))
            except ValueError as e:
                raise RequestError(f"ebnf cannot be used: {_reason(str(e))}") from None
        options = {"whitespace_pattern": _JSON_WHITESPACE}
        return str(LLMatcher.grammar_from_json_schema(self._text, overrides=options))  # type: ignore[arg-type]


def _schema_text(schema: object) -> str:
    """A schema's canonical JSON text."""
    if isinstance(schema, str):
        _check_size("json_schema", schema)
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(value, Mapping):
            raise RequestError(
                f"json_schema is {_shown(value)}; it must be a JSON object, such as {{'type': 'object'}}"
            )
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        raise RequestError("json_schema is nested too deeply; flatten it, or use $ref") from None
    except (TypeError, ValueError) as e:
        raise RequestError(f"json_schema is not JSON: {_reason(str(e))}") from None


def _choices(choice: object) -> tuple[str, ...]:
    if not isinstance(choice, (list, tuple)) or not choice or any(not isinstance(c, str) or not c for c in choice):
        raise RequestError(f"choice is {_shown(choice)}; it must be a list of strings, none of them empty")
    if len(choice) > MAX_CHOICES:
        raise RequestError(f"choice has {len(choice)} entries; the most is {MAX_CHOICES}")
    return tuple(choice)


def _check_size(name: str, text: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise RequestError(f"{name} holds half of a surrogate pair; it must be Unicode text") from None
    if size > MAX_BYTES:
        raise RequestError(f"{name} has {size:,} bytes; the most is {MAX_BYTES:,}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _reason(message: str) -> str:
    """The library's reason in one line, without the copy of the input that some come with."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["no reason given"]
    reason = next((line[len("error: ") :] for line in lines if line.startswith("error: ")), lines[0])
    if reason.startswith("NoExtension"):
        return _NOTHING_MATCHES
    return reason if len(reason) <= _REASON_LENGTH else f"{reason[:_REASON_LENGTH]}…"


class GuidedDecoder:
    """Starts guided answers for one tokenizer. Thread safe; keeps the latest grammars compiled.

    Building it holds Python's lock for about a second with a vocabulary of 150,000: do it before serving.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """`vocab_size` is the model's. Raises ConfigError for a tokenizer whose tokens have no bytes of their own."""
        eos = sorted(tokenizer.eos_token_ids)
        if not eos:
            raise ConfigError("guided output needs a tokenizer with an end token; set eos_token_id")
        try:
            self._tokenizer = LLTokenizer(tokenizer.to_json(), n_vocab=vocab_size, eos_token=eos)
        except ValueError as e:
            raise ConfigError(f"guided output does not work with this tokenizer: {_reason(str(e))}") from None
        self._cache: OrderedDict[GuidedDecodingParams, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def start(self, params: GuidedDecodingParams) -> GuidedState:
        """The state of a new answer; raises RequestError with the reason when nothing can be generated for `params`.

        Compiles in the calling thread, about a millisecond for a schema of usual size, without Python's lock.
        """
        with self._lock:
            start = self._cache.pop(params, None)
        if start is None:
            start = self._compile(params)
        with self._lock:
            self._cache[params] = start
            while len(self._cache) > CACHED_GRAMMARS:
                self._cache.popitem(last=False)
        return GuidedState(start.deep_copy())

    def _compile(self, params: GuidedDecodingParams) -> LLMatcher:
        try:
            matcher = LLMatcher(self._tokenizer, params.grammar(), log_level=0, limits=_LIMITS)
            if not matcher.is_error():
                matcher.compute_bitmask()  # some mistakes show here, and later answers begin with a warm lexer
        except ValueError as e:
            raise RequestError(f"{params.kind} cannot be used: {_reason(str(e))}") from None
        reason = _reason(matcher.get_error()) if matcher.is_error() else _NOTHING_MATCHES
        if matcher.is_stopped():
            raise RequestError(f"{params.kind} cannot be used: {reason}")
        return matcher


class GuidedState:
    """How far one guided answer is. Used by one thread at a time."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher

    @property
    def is_terminated(self) -> bool:
        """Whether the answer is complete and nothing but its end may follow."""
        return bool(self.matcher.is_stopped()) and not self.matcher.is_error()

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end here, though more may follow."""
        return bool(self.matcher.is_accepting())

    def fill_mask(self, row_W: torch.Tensor) -> None:
        """Write the mask of the next token into `row_W`, int32 [W] on the CPU; runs without Python's lock.

        Raises RequestError when the grammar exceeds the limits of the library here.
        """
        self.matcher.unsafe_compute_mask_ptr(row_W.data_ptr(), row_W.numel() * row_W.element_size())
        error = self.failure()
        if error is not None:
            raise error

    def failure(self) -> RequestError | None:
        """Why the answer cannot go on, if it cannot."""
        if not self.matcher.is_error():
            return None
        return RequestError(f"guided output cannot go on: {_reason(self.matcher.get_error())}; simplify its grammar")

    def accept(self, token_id: int) -> bool:
        """Append a token; False, and no change, if it may not come next; nothing may once `is_terminated`."""
        return bool(self.matcher.try_consume_tokens([token_id]) == 1)

    def forced_tokens(self) -> list[int]:
        """The tokens that must come next, whatever the model says; often none. They are not appended."""
        return list(self.matcher.compute_ff_tokens())

    def copy(self) -> GuidedState:
        """An independent state at the same place, for a second answer that goes on from here."""
        return GuidedState(self.matcher.deep_copy())


def mask_words(vocab_size: int) -> int:
    """Words of one row's mask."""
    return (vocab_size + 31) // 32


def apply_bitmask(logits_BV: torch.Tensor, bitmask_BW: torch.Tensor) -> None:
    """Set the logits of tokens that may not come next to -inf, in place. Both on the same device."""
    vocab_size = logits_BV.shape[-1]
    if logits_BV.device.type == "cpu":
        # NumPy unpacks bits some ten times quicker than a shift per bit, and waits for no second core
        as_bytes = bitmask_BW.numpy().view(np.uint8)
        may = np.unpackbits(as_bytes, axis=-1, count=vocab_size, bitorder="little").view(np.bool_)
        np.copyto(logits_BV.numpy(), -np.inf, where=~may)
        return
    bits = torch.arange(32, dtype=torch.int32, device=bitmask_BW.device)
    allowed = (bitmask_BW[:, :, None] >> bits & 1).flatten(1)[:, :vocab_size]
    logits_BV.masked_fill_(allowed == 0, -torch.inf)


class MaskWorker:
    """Computes the masks of a batch on its own thread while the step of the engine runs.

    Call `start` before the step and `finish` after it. The thread starts with the first guided request.
    """

    def __init__(self, max_batch_size: int, vocab_size: int, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._masks_BW = torch.full(
            (max_batch_size, mask_words(vocab_size)), -1, dtype=torch.int32, pin_memory=self._device.type == "cuda"
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="edgellm-guided")
        self._pool: LLExecutor | None = None
        self._pending: Future[None] | None = None
        self._guided: list[tuple[int, GuidedState]] = []
        self._rows = 0

    def start(self, states: Sequence[GuidedState | None]) -> None:
        """Begin with the masks of rows 0 … B − 1; a row whose state is None is not guided."""
        if self._pending is not None:  # of a step that failed
            self._pending.exception()
        self._rows = len(states)
        self._guided = [(row, state) for row, state in enumerate(states) if state is not None]
        self._pending = self._thread.submit(self._compute) if self._guided else None

    def _compute(self) -> None:
        masks_BW = self._masks_BW[: self._rows]
        masks_BW.fill_(-1)
        row_bytes = masks_BW.shape[1] * masks_BW.element_size()
        if len(self._guided) == 1:
            row, state = self._guided[0]
            state.matcher.unsafe_compute_mask_ptr(masks_BW[row].data_ptr(), row_bytes)
            return
        # one call for all rows: it takes the cores that are free, and Python's lock once
        self._pool = self._pool or LLExecutor()
        matchers = [(state.matcher, row) for row, state in self._guided]
        self._pool.unsafe_compute_mask_ptr(matchers, masks_BW.data_ptr(), row_bytes, self._rows)

    def finish(self) -> tuple[torch.Tensor | None, dict[int, RequestError]]:
        """The bitmask [B, W] on the engine's device, valid until the next `start`; None if no row is guided.

        And, by row, why a request cannot go on; the mask of such a row is of no use.
        """
        if self._pending is None:
            return None, {}
        self._pending.result()
        self._pending = None
        failures = {row: error for row, state in self._guided if (error := state.failure()) is not None}
        for row in failures:
            self._masks_BW[row] = -1
        return self._masks_BW[: self._rows].to(self._device, non_blocking=True), failures

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()
