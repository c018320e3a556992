"""Temperature, top-k, top-p, min-p and the draw of one token per row, each row with its own random stream.

On a GPU all rows go through the same few kernels, without a wait for the device. On a CPU a vocabulary-wide pass is
what costs, so a row's candidates are found first and only they are looked at. Shape letters: R rows, V vocabulary, N of
the largest logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from edgellm.runtime.logits_processors import tensor
from edgellm.runtime.sampling_params import MAX_TOP_K, SamplingParams

BLOCK = 1024
"""A large vocabulary's CDF is built over blocks of so many tokens, then within one of them."""

PIECE = 16 * BLOCK
"""So many exponentials are taken at a time on a CPU."""

ONE_LEVEL = 8192
"""Up to so many tokens the CDF is built in one go."""

FEW = 1024
"""As many of the largest logits top-p looks at first on a CPU."""

BELOW_ONE = 1.0 - 2.0**-53
"""Times a positive float64 this is less than it, by one unit in the last place."""


Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


@dataclass(frozen=True, eq=False)
class DrawParams:
    """How R rows are drawn, as tensors [R]. `mixed_seed` is `mix64` of the seed.

    `sort_width` is how many of the largest logits top-k and top-p must see, 0 where neither is on.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    mixed_seed: torch.Tensor
    sort_width: int
    any_min_p: bool

    @classmethod
    def from_params(
        cls, params: Sequence[SamplingParams], seeds: Sequence[int], device: torch.device | str
    ) -> DrawParams:
        """Of rows that are not greedy."""
        return cls(
            temperature=tensor([float(p.temperature) for p in params], torch.float32, device),
            top_k=tensor([p.top_k for p in params], torch.int64, device),
            top_p=tensor([float(p.top_p) for p in params], torch.float64, device),
            min_p=tensor([float(p.min_p) for p in params], torch.float32, device),
            mixed_seed=tensor(mix64(torch.tensor(seeds, dtype=torch.int64)).tolist(), torch.int64, device),
            sort_width=max((p.top_k or (MAX_TOP_K if p.top_p < 1.0 else 0) for p in params), default=0),
            any_min_p=any(p.min_p > 0.0 for p in params),
        )


def draw_tokens(logits_RV: torch.Tensor, draws: DrawParams, steps_R: torch.Tensor) -> torch.Tensor:
    """One token per row, [R] int64; `steps_R` int64 is the token's index in its answer. Overwrites the logits."""
    scaled, floor_R1 = _scale_(logits_RV, draws)
    uniform_R = uniform(draws.mixed_seed, steps_R)
    if scaled.device.type == "cpu":
        return _draw_on_cpu(scaled, floor_R1, uniform_R)
    return _draw_by_kernels(_drop(scaled, floor_R1), uniform_R)


def filter_logits(logits_RV: torch.Tensor, draws: DrawParams) -> torch.Tensor:
    """Logits after temperature, top-k, top-p and min-p in this order, less their row's maximum; -inf is filtered out.

    The order and the meaning of each are those of transformers' warpers, except that equal logits stay or go together,
    so that no sorting order can show.
    """
    return _drop(*_scale_(logits_RV.clone(), draws))


def draw(scaled_RV: torch.Tensor, uniform_R: torch.Tensor) -> torch.Tensor:
    """One token per row, [R] int64, from unnormalized log probabilities and a number in [0, 1) by the inverse CDF.

    Where a row has no probability at all (broken logits) the token means nothing, but it exists.
    """
    if scaled_RV.device.type == "cpu":
        return _draw_on_cpu(scaled_RV, None, uniform_R)
    return _draw_by_kernels(scaled_RV, uniform_R)


def _scale_(logits_RV: torch.Tensor, draws: DrawParams) -> tuple[torch.Tensor, torch.Tensor | None]:
    """In place, the logits over the temperature, their row's largest being 0; and the least [R, 1] to be drawn."""
    # Shifted before it is divided: a tiny temperature cannot overflow.
    scaled = logits_RV.sub_(logits_RV.amax(dim=-1, keepdim=True)).div_(draws.temperature[:, None])
    if not draws.sort_width:
        return scaled, torch.log(draws.min_p)[:, None] if draws.any_min_p else None
    floor_R1 = _top_k_top_p_floor(scaled, draws)
    return scaled, torch.maximum(floor_R1, torch.log(draws.min_p)[:, None]) if draws.any_min_p else floor_R1


def _drop(scaled_RV: torch.Tensor, floor_R1: torch.Tensor | None) -> torch.Tensor:
    return scaled_RV if floor_R1 is None else scaled_RV.masked_fill(scaled_RV < floor_R1, -math.inf)


def _top_k_top_p_floor(scaled_RV: torch.Tensor, draws: DrawParams) -> torch.Tensor:
    """The smallest logit [R, 1] that top-k and top-p leave in each row; -inf where both are off."""
    vocab = scaled_RV.shape[-1]
    width = min(draws.sort_width, vocab)
    whole_R1 = None
    if draws.sort_width == MAX_TOP_K:  # top-p over all tokens
        whole_R1 = _sum_of_exp(scaled_RV)
    if scaled_RV.device.type == "cpu" and width > FEW:
        # Nearly always the few largest tokens are enough to know; looking whether they are costs nothing on a CPU.
        floor_R1, is_known_R1 = _floor_among(_largest(scaled_RV, FEW), whole_R1, vocab, draws)
        if bool(is_known_R1.all()):
            return floor_R1
    return _floor_among(_largest(scaled_RV, width), whole_R1, vocab, draws)[0]


def _sum_of_exp(scaled_RV: torch.Tensor) -> torch.Tensor:
    """[R, 1] float64."""
    if scaled_RV.device.type != "cpu":
        return torch.exp(scaled_RV).sum(dim=-1, keepdim=True, dtype=torch.float64)
    return torch.tensor([[float(_block_sums(scaled_V).sum())] for scaled_V in scaled_RV.numpy()], dtype=torch.float64)


def _floor_among(
    descending_RN: torch.Tensor, whole_R1: torch.Tensor | None, vocab: int, draws: DrawParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """The floor [R, 1] as far as the N largest logits tell, and whether they tell it, [R, 1] bool.

    `whole_R1` is the sum of exp of all logits. A row's own result does not depend on N, where it is known.
    """
    count = descending_RN.shape[-1]
    top_p_R1, top_k_R1 = draws.top_p[:, None], draws.top_k[:, None]
    has_top_k_R1 = top_k_R1 > 0
    is_off_R1 = ~has_top_k_R1 & (top_p_R1 == 1.0)
    probs = torch.exp(descending_RN)
    probs = probs.where((torch.arange(count, device=probs.device) < top_k_R1) | ~has_top_k_R1, 0.0)
    mass = probs.cumsum(dim=-1, dtype=torch.float64)
    all_R1 = mass[:, -1:] if whole_R1 is None else torch.where(has_top_k_R1, mass[:, -1:], whole_R1)
    # A token stays while the tokens before it hold less than top_p of the probability; the first one always stays.
    wanted_R1 = all_R1 * top_p_R1
    stays = (probs > 0) & (((mass - probs) < wanted_R1) | (top_p_R1 == 1.0))
    last_R1 = stays.sum(dim=-1, keepdim=True).clamp(min=1) - 1  # 0 where top_p * mass underflows
    floor_R1 = descending_RN.gather(1, last_R1).masked_fill(is_off_R1, -math.inf)
    is_known_R1 = torch.where(has_top_k_R1, top_k_R1.clamp(max=vocab) <= count, mass[:, -1:] >= wanted_R1)
    return floor_R1, is_off_R1 | is_known_R1


def _largest(x_RV: torch.Tensor, width: int) -> torch.Tensor:
    """The `width` largest values in descending order.

    NumPy's vectorized sort is some forty times quicker than torch's on a CPU.
    """
    if x_RV.device.type != "cpu":
        return x_RV.topk(width, dim=-1).values
    values = x_RV.numpy()
    if width < values.shape[-1]:
        values = np.partition(values, values.shape[-1] - width, axis=-1)[:, -width:]
    return torch.from_numpy(np.sort(values, axis=-1)[:, ::-1].copy())


def _draw_on_cpu(scaled_RV: torch.Tensor, floor_R1: torch.Tensor | None, uniform_R: torch.Tensor) -> torch.Tensor:
    """`draw` row by row, and where there is a filter only among the tokens that it leaves."""
    tokens = []
    for row, number in enumerate(uniform_R.tolist()):
        scaled_V = scaled_RV[row].numpy()
        if floor_R1 is None or math.isinf(floor := float(floor_R1[row])):
            tokens.append(_find(scaled_V, number))
        else:
            places = np.flatnonzero(scaled_V >= floor)
            tokens.append(int(places[_find(scaled_V[places], number)]) if places.size else 0)
    return torch.tensor(tokens, dtype=torch.int64)


def _find(scaled_N: Array, number: float) -> int:
    """The place whose probability the number, a share of them all, falls in; by blocks, then within one."""
    cdf = np.cumsum(_block_sums(scaled_N))
    target = number * cdf[-1]
    # side="right" finds the first entry above the target, whose own probability is therefore not 0.
    block = min(int(np.searchsorted(cdf, target, side="right")), cdf.size - 1)
    inner = np.cumsum(np.exp(scaled_N[block * BLOCK : (block + 1) * BLOCK]), dtype=np.float64)
    # The two sums are rounded differently: without the limit the rest could be just past the block's last token.
    rest = min(max(target - (cdf[block - 1] if block else 0.0), 0.0), inner[-1] * BELOW_ONE)
    return min(int(block * BLOCK + np.searchsorted(inner, rest, side="right")), scaled_N.size - 1)


def _block_sums(scaled_N: Array) -> Array:
    """Sums of exp over each BLOCK places, float64.

    A piece at a time, because a large temporary array costs more than the exponentials: its memory comes anew from the
    system at every call.
    """
    sums = []
    for start in range(0, scaled_N.size, PIECE):
        piece = np.exp(scaled_N[start : start + PIECE])
        sums.append(np.add.reduceat(piece, np.arange(0, piece.size, BLOCK), dtype=np.float64))
    return np.concatenate(sums)


def _draw_by_kernels(scaled_RV: torch.Tensor, uniform_R: torch.Tensor) -> torch.Tensor:
    """`draw` as a fixed sequence of operations on all rows; the steps are those of `_find`."""
    vocab = scaled_RV.shape[-1]
    probs = torch.exp(scaled_RV)
    if vocab <= ONE_LEVEL:
        cdf = probs.cumsum(dim=-1, dtype=torch.float64)
        token_R1 = torch.searchsorted(cdf, uniform_R[:, None] * cdf[:, -1:], right=True)
        return token_R1[:, 0].clamp(max=vocab - 1)
    probs = torch.nn.functional.pad(probs, (0, -vocab % BLOCK)).view(scaled_RV.shape[0], -1, BLOCK)
    cdf = probs.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target_R1 = uniform_R[:, None] * cdf[:, -1:]
    block_R1 = torch.searchsorted(cdf, target_R1, right=True).clamp(max=cdf.shape[-1] - 1)
    before_R1 = torch.nn.functional.pad(cdf, (1, 0)).gather(1, block_R1)
    inner = probs.gather(1, block_R1[:, :, None].expand(-1, 1, BLOCK))[:, 0].cumsum(dim=-1, dtype=torch.float64)
    rest_R1 = torch.minimum((target_R1 - before_R1).clamp(min=0.0), inner[:, -1:] * BELOW_ONE)
    token_R1 = block_R1 * BLOCK + torch.searchsorted(inner, rest_R1, right=True)
    return token_R1[:, 0].clamp(max=vocab - 1)


def uniform(mixed_seeds_R: torch.Tensor, steps_R: torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1), float64 with 53 random bits, that depend on (seed, step) alone: two rounds of SplitMix64.

    The first round, `mix64` of the seed, is done once per request. Source: Steele, Lea, Flood, "Fast splittable
    pseudorandom number generators" (2014).
    """
    bits = mix64(mixed_seeds_R + (steps_R + 1) * _signed(0x9E3779B97F4A7C15))
    return _shift_right(bits, 11).double() * 2.0**-53


def mix64(x: torch.Tensor) -> torch.Tensor:
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
