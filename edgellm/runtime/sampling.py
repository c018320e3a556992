"""Sampling parameters of a request, and the pure functions that draw one token per row of a batch.

Each row has its own parameters and its own random stream: the number drawn for a token depends only on the request's
seed and the token's index in the answer, so the same seed gives the same text whatever else is in the batch. Shape
legend: B rows of the batch, R rows that sample, V vocabulary.
"""

from __future__ import annotations

import math
import numbers
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from edgellm.errors import EngineError, RequestError

GREEDY_BELOW = 1e-5
"""A temperature below this counts as 0: the most likely token always wins."""

MAX_SEED = 2**63 - 1
MAX_TOP_K = 2**31 - 1
MAX_TEMPERATURE = 100.0


@dataclass(frozen=True)
class SamplingParams:
    """How to draw and when to stop; every value is checked, and a bad one is a RequestError that names its range.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off. `seed` None draws a fresh one per request.
    `stop` (one string or several) and `stop_token_ids` end the answer and are not part of its text. With `ignore_eos`
    only `max_tokens` and the stops end it. After construction `stop` and `stop_token_ids` are tuples.
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

    def __post_init__(self) -> None:
        _check_int("max_tokens", self.max_tokens, 1, None)
        _check_int("top_k", self.top_k, 0, MAX_TOP_K)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, MAX_SEED)
        _check_number(
            "temperature",
            self.temperature,
            f"0 (greedy) to {MAX_TEMPERATURE:g}",
            0.0 <= _real(self.temperature) <= MAX_TEMPERATURE,
        )
        _check_number("top_p", self.top_p, "above 0 and at most 1", 0.0 < _real(self.top_p) <= 1.0)
        _check_number("min_p", self.min_p, "0 to 1", 0.0 <= _real(self.min_p) <= 1.0)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos is {self.ignore_eos!r}; it must be true or false")
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _stop_ids(self.stop_token_ids))

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken every time."""
        return self.temperature < GREEDY_BELOW

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as it is after construction."""
        return tuple(self.stop or ())

    def resolved_seed(self) -> int:
        """`seed`, or a fresh random one."""
        return secrets.randbelow(MAX_SEED) if self.seed is None else self.seed


def _real(value: object) -> float:
    """`value` as a float; NaN for what is no number, which fails every range."""
    return math.nan if isinstance(value, bool) or not isinstance(value, numbers.Real) else float(value)


def _check_number(name: str, value: object, valid: str, ok: bool) -> None:
    if not ok:
        raise RequestError(f"{name} is {value!r}; it must be a number, {valid}")


def _check_int(name: str, value: object, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise RequestError(f"{name} is {value!r}; it must be a whole number {limits}")


def _stop_strings(stop: object) -> tuple[str, ...]:
    stops = (
        (stop,) if isinstance(stop, str) else stop if isinstance(stop, (list, tuple)) else () if stop is None else None
    )
    if stops is None or any(not isinstance(s, str) or not s for s in stops):
        raise RequestError(f"stop is {stop!r}; it must be a string or a list of strings, none of them empty")
    return tuple(stops)


def _stop_ids(ids: object) -> tuple[int, ...]:
    if ids is None:
        return ()
    if not isinstance(ids, (list, tuple)) or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise RequestError(f"stop_token_ids is {ids!r}; it must be a list of token ids, whole numbers of at least 0")
    return tuple(ids)


@dataclass(frozen=True, eq=False)
class RowParams:
    """The sampling parameters of a batch as tensors on the logits' device; rebuild it when a row joins or leaves.

    `sampled` [R] int64 are the rows that do not decode greedily; every other tensor is [R] too, in that order.
    `sort_width` is how many of the largest logits top-k and top-p must see; 0 where neither is on.
    """

    batch_size: int
    sampled: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    sort_width: int

    @classmethod
    def from_params(
        cls, params: Sequence[SamplingParams], seeds: Sequence[int], device: torch.device | str = "cpu"
    ) -> RowParams:
        """From each row's parameters and resolved seed (see `SamplingParams.resolved_seed`)."""
        rows = [i for i, p in enumerate(params) if not p.is_greedy]
        chosen = [params[i] for i in rows]

        def tensor(values: list[int] | list[float], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return cls(
            batch_size=len(params),
            sampled=tensor(rows, torch.int64),
            temperature=tensor([float(p.temperature) for p in chosen], torch.float32),
            top_k=tensor([p.top_k for p in chosen], torch.int64),
            top_p=tensor([float(p.top_p) for p in chosen], torch.float64),
            min_p=tensor([float(p.min_p) for p in chosen], torch.float32),
            seed=tensor([seeds[i] for i in rows], torch.int64),
            sort_width=max((_sort_width(p) for p in chosen), default=0),
        )


def _sort_width(params: SamplingParams) -> int:
    return params.top_k or (MAX_TOP_K if params.top_p < 1.0 else 0)


def sample(logits_BV: torch.Tensor, rows: RowParams, steps_B: torch.Tensor) -> torch.Tensor:
    """The next token of each row, [B] int64.

    `steps_B` int64 is the index, within its answer, of the token that each row draws now. Greedy rows take the first
    of the largest logits. Raises EngineError when a row's logits hold NaN or +inf.
    """
    best_B, tokens_B = logits_BV.max(dim=-1)
    if not bool(torch.isfinite(best_B).all()):
        bad = int((~torch.isfinite(best_B)).nonzero()[0])
        raise EngineError(f"the engine returned NaN or infinite logits for row {bad} of the batch; rebuild the engine")
    if rows.sampled.numel() == 0:
        return tokens_B
    scaled_RV = filter_logits(logits_BV.index_select(0, rows.sampled).float(), rows)
    uniform_R = uniform(rows.seed, steps_B.index_select(0, rows.sampled))
    return tokens_B.index_copy(0, rows.sampled, draw(scaled_RV, uniform_R))


def filter_logits(logits_RV: torch.Tensor, rows: RowParams) -> torch.Tensor:
    """Logits after temperature, top-k, top-p and min-p in this order, less their row's maximum; -inf is filtered out.

    The order and the meaning of each are those of transformers' warpers, except that equal logits stay or go together,
    so that no sorting order can show.
    """
    shifted = (
        logits_RV - logits_RV.max(dim=-1, keepdim=True).values
    )  # before dividing: a tiny temperature cannot overflow
    scaled = shifted / rows.temperature[:, None]
    floor_R1 = torch.log(rows.min_p)[:, None]  # in logits, as the largest one is 0 now; -inf where off
    if rows.sort_width:
        floor_R1 = torch.maximum(floor_R1, _top_k_top_p_floor(scaled, rows))
    return scaled.masked_fill(scaled < floor_R1, -math.inf)


def _top_k_top_p_floor(scaled_RV: torch.Tensor, rows: RowParams) -> torch.Tensor:
    """The smallest logit [R, 1] that top-k and top-p leave in each row."""
    width = min(rows.sort_width, scaled_RV.shape[-1])
    descending = _largest(scaled_RV, width)
    last = torch.where(rows.top_k == 0, width, rows.top_k.clamp(max=width))[:, None] - 1
    in_top_k = torch.arange(width, device=scaled_RV.device) <= last
    # A token stays while the tokens before it hold less than top_p of the probability; the first one always stays.
    probs = torch.exp(descending) * in_top_k
    mass = probs.cumsum(dim=-1, dtype=torch.float64)
    in_top_p = ((mass - probs) < rows.top_p[:, None] * mass[:, -1:]) | (rows.top_p[:, None] == 1.0)
    count = (in_top_k & in_top_p).sum(dim=-1, keepdim=True).clamp(min=1)  # 0 where top_p * mass underflows
    return descending.gather(1, count - 1)


def _largest(x_RV: torch.Tensor, width: int) -> torch.Tensor:
    """The `width` largest values in descending order.

    NumPy's vectorized sort is some forty times quicker than torch's on a CPU.
    """
    if x_RV.device.type == "cpu":
        return torch.from_numpy(np.sort(x_RV.numpy(), axis=-1)[:, ::-1][:, :width].copy())
    return x_RV.topk(width, dim=-1).values


def draw(scaled_RV: torch.Tensor, uniform_R: torch.Tensor) -> torch.Tensor:
    """One token per row, [R] int64, from unnormalized log probabilities and a number in [0, 1) by the inverse CDF."""
    cdf = torch.exp(scaled_RV).cumsum(dim=-1, dtype=torch.float64)
    target = uniform_R[:, None] * cdf[:, -1:]
    # right=True finds the first entry above the target, whose own probability is therefore not 0.
    return torch.searchsorted(cdf, target, right=True)[:, 0]


def uniform(seeds_R: torch.Tensor, steps_R: torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1), float64 with 53 random bits, that depend on (seed, step) alone: two rounds of SplitMix64.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).
    """
    bits = _mix64(_mix64(seeds_R) + (steps_R + 1) * _signed(0x9E3779B97F4A7C15))
    return _shift_right(bits, 11).double() * 2.0**-53


def _mix64(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer; int64 products wrap around, as its unsigned ones do."""
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift; torch's own on int64 repeats the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that has it."""
    return value - (1 << 64) if value >= 1 << 63 else value
