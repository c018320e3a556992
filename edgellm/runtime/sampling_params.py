"""`SamplingParams`: how a request's tokens are drawn and when its answer ends, with every value checked.

Nothing here touches a tensor; `sampling.py` turns the parameters of a batch into tensors and draws. The texts of `bad`
become token ids by `resolved`, which the runtime calls once with its tokenizer; `check_vocabulary` then holds every
token id against the model's vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from edgellm.errors import RequestError

if TYPE_CHECKING:
    import torch

LogitsProcessor: TypeAlias = "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]"
"""A caller's own step for one row: (token ids of prompt and answer so far [T] int64, logits [V] fp32) -> logits [V].

It runs on the engine's thread after the built-in processors and before temperature; it may change the logits in place.
"""

EarlyStopping: TypeAlias = 'bool | Literal["never"]'

GREEDY_BELOW = 1e-5
"""A temperature below this counts as 0: the most likely token always wins."""

MAX_SEED = 2**63 - 1
MAX_TOP_K = 2**31 - 1
MAX_TEMPERATURE = 100.0
MAX_PENALTY = 2.0
MAX_REPETITION_PENALTY = 100.0
MAX_LOGIT_BIAS = 100.0
MAX_LENGTH_PENALTY = 10.0
MAX_BIASED_TOKENS = 300
MAX_STOP_STRINGS = 16
MAX_STOP_TOKENS = 256
MAX_BAD_WORDS = 300
MAX_BAD_SEQUENCES = 1000
MAX_WORD_BYTES = 1024
MAX_WORD_TOKENS = 64
MAX_ANSWERS = 16
MAX_BEAMS = 16
MAX_LOGPROBS = 20
MAX_LOGITS_PROCESSORS = 16


@dataclass(frozen=True)
class SamplingParams:
    """How to draw and when to stop; every value is checked, and a bad one is a RequestError that names its range.

    Drawing: `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off. `seed` None draws a fresh one.

    Ending: `stop` (one string or several) and `stop_token_ids` end the answer and are not part of its text. With
    `ignore_eos` only `max_tokens` and the stops end it. The first `min_tokens` tokens are none that end it, and a stop
    string ends it only after them.

    Changing probabilities: `repetition_penalty` (1 is off) divides what the prompt and the answer hold already,
    `presence_penalty` and `frequency_penalty` (0 is off) count the answer only; `logit_bias` {token id: amount} adds to
    logits; `bad` texts and `bad_token_ids` (ids, or sequences of ids) are never completed; `logits_processors` are the
    caller's own (see LogitsProcessor; such a batch waits for them at every step).

    Several answers: the best `n` of `best_of` (None: of n), by the sum of their log probabilities; or the best `n` of
    a beam search with `beam_width` beams, `length_penalty` and `early_stopping` meaning what they do in transformers.

    Reporting: `logprobs` k gives each token's log probability and those of the k most likely ones, `prompt_logprobs`
    the same for the prompt. They are the model's own: before every change, mask and temperature.

    After construction every sequence is a tuple, `bad_token_ids` a tuple of tuples and `logit_bias` a tuple of pairs.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = None
    bad: str | Sequence[str] | None = None
    bad_token_ids: Sequence[int | Sequence[int]] | None = None
    n: int = 1
    best_of: int | None = None
    beam_width: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logits_processors: Sequence[LogitsProcessor] | None = None

    def __post_init__(self) -> None:
        self._check_draw()
        self._check_changes()
        self._check_reports()
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos is {self.ignore_eos!r}; it must be true or false")
        # Frozen for its users; here the fields get their normal forms.
        normal: dict[str, Any] = {
            "stop": _texts("stop", self.stop, MAX_STOP_STRINGS),
            "stop_token_ids": _token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKENS),
            "logit_bias": _biases(self.logit_bias),
            "bad": _texts("bad", self.bad, MAX_BAD_WORDS),
            "bad_token_ids": _sequences(self.bad_token_ids),
            "logits_processors": _processors(self.logits_processors),
        }
        for name, value in normal.items():
            object.__setattr__(self, name, value)
        self._check_answers()

    def _check_draw(self) -> None:
        _check_int("max_tokens", self.max_tokens, 1, None)
        _check_int("min_tokens", self.min_tokens, 0, None)
        _check_int("top_k", self.top_k, 0, MAX_TOP_K)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, MAX_SEED)
        _check_number("temperature", self.temperature, f"0 (greedy) to {MAX_TEMPERATURE:g}", (0.0, MAX_TEMPERATURE))
        _check_number("top_p", self.top_p, "above 0 and at most 1", (0.0, 1.0), open_low=True)
        _check_number("min_p", self.min_p, "0 to 1", (0.0, 1.0))
        if self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}; it must be a whole number from 0 to max_tokens, {self.max_tokens}"
            )

    def _check_changes(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            _check_number(
                name, getattr(self, name), f"-{MAX_PENALTY:g} to {MAX_PENALTY:g}", (-MAX_PENALTY, MAX_PENALTY)
            )
        valid = f"above 0 and at most {MAX_REPETITION_PENALTY:g}"
        limits = (0.0, MAX_REPETITION_PENALTY)
        _check_number("repetition_penalty", self.repetition_penalty, valid, limits, open_low=True)

    def _check_reports(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, MAX_LOGPROBS)

    def _check_answers(self) -> None:
        """How many answers, and that what draws them can give so many different ones."""
        _check_int("n", self.n, 1, MAX_ANSWERS)
        _check_int("beam_width", self.beam_width, 1, MAX_BEAMS)
        valid, limits = f"-{MAX_LENGTH_PENALTY:g} to {MAX_LENGTH_PENALTY:g}", (-MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY)
        _check_number("length_penalty", self.length_penalty, valid, limits)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise RequestError(f'early_stopping is {self.early_stopping!r}; it must be true, false or "never"')
        if self.best_of is not None:
            _check_int("best_of", self.best_of, self.n, MAX_ANSWERS)
        if self.beam_width == 1:
            if self.is_greedy and self.num_answers > 1:
                name = "n" if self.best_of is None else "best_of"
                raise RequestError(
                    f"{name} is {self.num_answers}; it must be 1 where temperature is 0, as greedy answers are all the "
                    "same; set a temperature or a beam_width"
                )
            return
        if not self.is_greedy:
            raise RequestError(
                f"beam_width is {self.beam_width}; it must be 1 where temperature is {self.temperature:g}, as a beam "
                "search does not draw; set temperature to 0"
            )
        if self.n > self.beam_width:
            raise RequestError(f"n is {self.n}; it must be a whole number from 1 to beam_width, {self.beam_width}")
        for name in ("best_of", "stop"):
            if getattr(self, name):
                raise RequestError(
                    f"{name} is {getattr(self, name)!r}; it must be left out where beam_width is above 1"
                )

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken every time."""
        return self.temperature < GREEDY_BELOW

    @property
    def num_answers(self) -> int:
        """How many answers are drawn, of which the best `n` are given. A beam search counts as one."""
        return self.n if self.best_of is None else self.best_of

    @property
    def needs_logprobs(self) -> bool:
        """Whether the log probabilities of the answer's tokens are reported, or needed to find the best answers."""
        return self.logprobs is not None or self.num_answers > self.n

    @property
    def needs_history(self) -> bool:
        """Whether the next token depends on the tokens before it in another way than through the model."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or any(len(ids) > 1 for ids in self.bad_sequences)
            or bool(self.logits_processors)
        )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as it is after construction."""
        return tuple(self.stop or ())

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as it is after construction."""
        pairs = self.logit_bias or ()
        return tuple(pairs.items() if isinstance(pairs, Mapping) else pairs)

    @property
    def bad_sequences(self) -> tuple[tuple[int, ...], ...]:
        """`bad_token_ids` as it is after construction."""
        return tuple((x,) if isinstance(x, int) else tuple(x) for x in self.bad_token_ids or ())

    def resolved_seed(self) -> int:
        """`seed`, or a fresh random one."""
        return secrets.randbelow(MAX_SEED) if self.seed is None else self.seed

    def resolved(self, encode: Callable[[str], list[int]] | None) -> SamplingParams:
        """These parameters with the texts of `bad` turned into `bad_token_ids`.

        A word has other tokens at the beginning of a text than after a space, so both are forbidden. `encode` gives the
        ids of a text without special tokens; None, where there is no tokenizer, raises RequestError if it is needed.
        """
        if not self.bad:
            return self
        if encode is None:
            raise RequestError(f"bad is {self.bad!r}; without a tokenizer it must be left out: use bad_token_ids")
        found = list(self.bad_sequences)
        for word in self.bad:
            for text in (word, " " + word.lstrip()):
                ids = tuple(encode(text))
                if not ids or len(ids) > MAX_WORD_TOKENS:
                    raise RequestError(
                        f"bad holds {word!r}, {len(ids)} tokens; a text must have 1 to {MAX_WORD_TOKENS}"
                    )
                found.append(ids)
        return dataclasses.replace(self, bad=None, bad_token_ids=tuple(dict.fromkeys(found)))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise RequestError for a token id that the model does not have: on a GPU it would end the process."""
        used: dict[str, Sequence[int]] = {
            "stop_token_ids": self.stop_token_ids or (),
            "logit_bias": [token for token, _ in self.biases],
            "bad_token_ids": [token for ids in self.bad_sequences for token in ids],
        }
        for name, ids in used.items():
            bad = next((i for i in ids if i >= vocab_size), None)
            if bad is not None:
                raise RequestError(f"{name} holds token id {bad}; the model's vocabulary has 0 to {vocab_size - 1}")


def answer_seed(seed: int, index: int) -> int:
    """The seed of answer `index` of a request with this seed; answer 0 has the request's own."""
    return (seed + index * 0x9E3779B97F4A7C15) & MAX_SEED


def _real(value: object) -> float:
    """`value` as a float; NaN for what is no number, which fails every range."""
    return math.nan if isinstance(value, bool) or not isinstance(value, numbers.Real) else float(value)


def _check_number(name: str, value: object, valid: str, limits: tuple[float, float], *, open_low: bool = False) -> None:
    low, high = limits
    number = _real(value)
    if not low <= number <= high or (open_low and number == low):
        raise RequestError(f"{name} is {value!r}; it must be a number, {valid}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_int(name: str, value: object, low: int, high: int | None) -> None:
    if not isinstance(value, int) or not _is_int(value) or value < low or (high is not None and value > high):
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise RequestError(f"{name} is {value!r}; it must be a whole number {limits}")


def _check_count(name: str, count: int, limit: int, things: str) -> None:
    if count > limit:
        raise RequestError(f"{name} has {count} {things}; it must have at most {limit}")


def _texts(name: str, value: object, limit: int) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else () if value is None else value
    if not isinstance(texts, (list, tuple)) or any(not isinstance(s, str) or not s for s in texts):
        raise RequestError(f"{name} is {value!r}; it must be a string or a list of strings, none of them empty")
    _check_count(name, len(texts), limit, "strings")
    for i, text in enumerate(texts):
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise RequestError(f"{name}[{i}] is {text!r}; it must be text that UTF-8 can hold") from None
        if size > MAX_WORD_BYTES:
            raise RequestError(f"{name}[{i}] has {size} bytes; it must have at most {MAX_WORD_BYTES}")
    return tuple(texts)


def _token_ids(name: str, ids: object, limit: int) -> tuple[int, ...]:
    if ids is None:
        return ()
    if not isinstance(ids, (list, tuple)) or any(not _is_int(i) or i < 0 for i in ids):
        raise RequestError(f"{name} is {ids!r}; it must be a list of token ids, whole numbers of at least 0")
    _check_count(name, len(ids), limit, "token ids")
    return tuple(ids)


def _sequences(value: object) -> tuple[tuple[int, ...], ...]:
    name, out = "bad_token_ids", []
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise RequestError(f"{name} is {value!r}; it must be a list of token ids or of lists of token ids")
    _check_count(name, len(value), MAX_BAD_SEQUENCES, "sequences")
    for i, item in enumerate(value):
        ids = _token_ids(f"{name}[{i}]", [item] if isinstance(item, int) else item, MAX_WORD_TOKENS)
        if not ids:
            raise RequestError(f"{name}[{i}] is {item!r}; it must hold at least one token id")
        out.append(ids)
    return tuple(out)


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    pairs = value.items() if isinstance(value, Mapping) else () if value is None else value
    try:
        biases = dict(pairs)
    except (TypeError, ValueError):
        raise RequestError(f"logit_bias is {value!r}; it must be a mapping of token ids to numbers") from None
    _check_count("logit_bias", len(biases), MAX_BIASED_TOKENS, "tokens")
    for token, bias in biases.items():
        if not _is_int(token) or token < 0:
            raise RequestError(f"logit_bias holds {token!r}; a token id is a whole number of at least 0")
        limits = (-MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
        _check_number(f"logit_bias[{token}]", bias, f"{limits[0]:g} to {limits[1]:g}", limits)
    return tuple(sorted((token, float(bias)) for token, bias in biases.items()))


def _processors(value: object) -> tuple[LogitsProcessor, ...]:
    name = "logits_processors"
    processors = (value,) if callable(value) else () if value is None else value
    if not isinstance(processors, (list, tuple)) or not all(callable(p) for p in processors):
        raise RequestError(f"{name} is {value!r}; it must be a list of functions (token_ids, logits) -> logits")
    _check_count(name, len(processors), MAX_LOGITS_PROCESSORS, "functions")
    return tuple(processors)
