"""Draws one token per row of a batch from the logits, each row with its own parameters and its own random stream.

The number drawn for a token depends only on the request's seed and the token's index in the answer, so the same seed
gives the same text whatever else is in the batch. What happens to a row's logits, in this order: the edits of
`logits_processors.py`, temperature, top-k, top-p, min-p. Rows that ask for none of this take the most likely token of
their raw logits, and a batch of such rows costs one pass.

Nothing in `sample` waits for the device (but for callers' own logits processors), so it can be part of a CUDA graph;
what went wrong in a row comes back as a number in `Sampled.fault`, for the host to look at when it reads the tokens.
Shape legend: B rows of the batch, W rows whose logits are worked on, R rows that are drawn, V vocabulary, N rows and K
places of reported log probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from edgellm.errors import EdgeLLMError, EngineError, RequestError
from edgellm.runtime.logits_processors import Edits, SamplerState, edit, fixed_additions, tensor
from edgellm.runtime.sampling_params import MAX_TOP_K, SamplingParams

__all__ = [
    "Logprob",
    "Logprobs",
    "RowParams",
    "Sampled",
    "SamplerState",
    "SamplingParams",
    "draw",
    "filter_logits",
    "process",
    "row_errors",
    "sample",
    "token_logprobs",
    "uniform",
]

BROKEN_LOGITS = 1
NOTHING_ALLOWED = 2

BLOCK = 1024
"""Tokens whose probabilities `draw` sums first."""

FEW = 1024
"""As many of the largest logits top-p looks at first on a CPU."""


@dataclass(frozen=True, eq=False)
class RowParams:
    """The sampling parameters of a batch as tensors on the logits' device; build it again when a row joins or leaves.

    `worked` [W] int64 are the rows that do not simply take the largest raw logit. `sampled` [R] are those that do not
    decode greedily, `sampled_at` their places in `worked`; temperature … seed are [R] too, in that order. `sort_width`
    is how many of the largest logits top-k and top-p must see, 0 where neither is on. `reported` [N] are the rows whose
    log probabilities are wanted, `reported_rows` the same for the host, `top_logprobs` the most likely tokens of each.
    """

    batch_size: int
    worked: torch.Tensor
    edits: Edits | None
    sampled: torch.Tensor
    sampled_at: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    sort_width: int
    any_min_p: bool
    reported: torch.Tensor
    reported_rows: tuple[int, ...]
    top_logprobs: int

    @classmethod
    def from_params(
        cls,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        eos_token_ids: Sequence[int] = (),
        guided: Sequence[int] = (),
    ) -> RowParams:
        """From each row's parameters and resolved seed (see `SamplingParams.resolved_seed`).

        `eos_token_ids` are what `min_tokens` holds back; `guided` the rows for which `sample` gets a bitmask.
        """
        edited = {i for i, p in enumerate(params) if _is_edited(p, eos_token_ids)} | set(guided)
        sampled = [i for i, p in enumerate(params) if not p.is_greedy]
        # Rows that are drawn come first: where nothing else is worked on, no second copy is needed.
        places = {row: at for at, row in enumerate([*sampled, *sorted(edited.difference(sampled))])}
        edit_places = {row: places[row] for row in sorted(edited)}
        chosen = [params[i] for i in sampled]
        reported = tuple(i for i, p in enumerate(params) if p.needs_logprobs)

        def ints(values: Sequence[int]) -> torch.Tensor:
            return tensor(values, torch.int64, device)

        return cls(
            batch_size=len(params),
            worked=ints(list(places)),
            edits=Edits.from_params(params, edit_places, device, eos_token_ids, guided) if edited else None,
            sampled=ints(sampled),
            sampled_at=ints(range(len(sampled))),
            temperature=tensor([float(p.temperature) for p in chosen], torch.float32, device),
            top_k=ints([p.top_k for p in chosen]),
            top_p=tensor([float(p.top_p) for p in chosen], torch.float64, device),
            min_p=tensor([float(p.min_p) for p in chosen], torch.float32, device),
            seed=ints([seeds[i] for i in sampled]),
            sort_width=max((_sort_width(p) for p in chosen), default=0),
            any_min_p=any(p.min_p > 0.0 for p in chosen),
            reported=ints(reported),
            reported_rows=reported,
            top_logprobs=max((params[i].logprobs or 0 for i in reported), default=0),
        )

    @property
    def needs_history(self) -> bool:
        """Whether `sample` needs a SamplerState for this batch, and `SamplerState.append` is due after it."""
        return self.edits is not None and self.edits.needs_history

    @property
    def waits_for_host(self) -> bool:
        """Whether callers' own functions run at every step, which no CUDA graph can hold."""
        return self.edits is not None and bool(self.edits.custom)


def _is_edited(params: SamplingParams, eos_token_ids: Sequence[int]) -> bool:
    return params.needs_history or bool(fixed_additions(params, eos_token_ids))


def _sort_width(params: SamplingParams) -> int:
    return params.top_k or (MAX_TOP_K if params.top_p < 1.0 else 0)


@dataclass(frozen=True, eq=False)
class Logprobs:
    """Log probabilities of N tokens under the raw logits, on the logits' device.

    `chosen` [N] fp32 and `rank` [N] int64 (1: the most likely) of the tokens themselves, `top` [N, K] fp32 and
    `top_ids` [N, K] int64 of the most likely ones.
    """

    chosen: torch.Tensor
    rank: torch.Tensor
    top: torch.Tensor
    top_ids: torch.Tensor

    def dicts(self, tokens: Sequence[int], counts: Sequence[int]) -> list[dict[int, Logprob]]:
        """For the host: {token id: Logprob} of each of the N places, the `counts[i]` most likely and the token itself.

        `tokens` are those that `chosen` belongs to. Waits for the device.
        """
        columns = (self.chosen.tolist(), self.rank.tolist(), self.top.tolist(), self.top_ids.tolist(), tokens, counts)
        out = []
        for chosen, rank, top, top_ids, token, count in zip(*columns, strict=True):
            best = zip(top_ids[:count], top[:count], range(1, count + 1), strict=True)
            out.append({i: Logprob(value, place) for i, value, place in best} | {token: Logprob(chosen, rank)})
        return out


@dataclass(frozen=True)
class Logprob:
    """A token's log probability, and its place among all tokens (1: the most likely)."""

    logprob: float
    rank: int


@dataclass(frozen=True, eq=False)
class Sampled:
    """What `sample` gives, on the logits' device: `tokens` [B] int64, `fault` [B] uint8 (0: none), log probabilities of
    the tokens of the `reported` rows, and the errors of callers' functions by row. See `row_errors`.
    """

    tokens: torch.Tensor
    fault: torch.Tensor
    logprobs: Logprobs | None
    errors: dict[int, RequestError]


def sample(
    logits_BV: torch.Tensor,
    rows: RowParams,
    steps_B: torch.Tensor,
    state: SamplerState | None = None,
    bitmask_BW: torch.Tensor | None = None,
) -> Sampled:
    """The next token of each row. The logits are left as they are.

    `steps_B` int64 is the index, within its answer, of the token that each row draws now. Greedy rows take the first of
    the largest logits. `state` is needed where `rows.needs_history`, `bitmask_BW` int32 (see `edit`) for guided rows.
    """
    best_B, tokens_B = _max(logits_BV)
    fault_B = (~torch.isfinite(best_B)).to(torch.uint8) * BROKEN_LOGITS
    errors: dict[int, RequestError] = {}
    if rows.worked.numel():
        worked_WV = logits_BV.index_select(0, rows.worked).float()
        if rows.edits is not None:
            errors = edit(worked_WV, rows.edits, steps_B, state, bitmask_BW)
            best_W, tokens_W = _max(worked_WV)
            tokens_B = tokens_B.index_copy(0, rows.worked, tokens_W)
            nothing_W = (~torch.isfinite(best_W)).to(torch.uint8) * NOTHING_ALLOWED
            fault_B = fault_B.index_add(0, rows.worked, nothing_W)
        if rows.sampled.numel():
            scaled_RV = filter_logits(worked_WV[: rows.sampled.numel()], rows)
            uniform_R = uniform(rows.seed, steps_B.index_select(0, rows.sampled))
            tokens_B = tokens_B.index_copy(0, rows.sampled, draw(scaled_RV, uniform_R))
    logprobs = None
    if rows.reported.numel():
        of = (logits_BV.index_select(0, rows.reported), tokens_B.index_select(0, rows.reported))
        logprobs = token_logprobs(*of, rows.top_logprobs)
    return Sampled(tokens_B, fault_B, logprobs, errors)


def process(
    scores_BV: torch.Tensor,
    rows: RowParams,
    steps_B: torch.Tensor,
    state: SamplerState | None = None,
    bitmask_BW: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[int, RequestError]]:
    """Scores [B, V] fp32 after everything that comes before temperature; a beam search chooses among these."""
    if rows.edits is None:
        return scores_BV, {}
    worked_WV = scores_BV.index_select(0, rows.worked).float()
    errors = edit(worked_WV, rows.edits, steps_B, state, bitmask_BW)
    return scores_BV.float().index_copy(0, rows.worked, worked_WV), errors


def row_errors(sampled: Sampled) -> dict[int, EdgeLLMError]:
    """What went wrong, by row of the batch; the tokens of these rows mean nothing. Waits for the device."""
    errors: dict[int, EdgeLLMError] = dict(sampled.errors)
    for row, fault in enumerate(sampled.fault.tolist()):
        if fault & BROKEN_LOGITS:
            errors[row] = EngineError(
                f"the engine returned NaN or infinite logits for row {row} of the batch; rebuild the engine"
            )
        elif fault:
            errors.setdefault(
                row,
                RequestError(
                    "the sampling parameters forbid every token of the model here; relax logit_bias, bad, min_tokens, "
                    "the guided output or the logits_processors"
                ),
            )
    return errors


def token_logprobs(logits_NV: torch.Tensor, tokens_N: torch.Tensor, count: int) -> Logprobs:
    """Log probabilities of `tokens_N` and of the `count` most likely tokens at each of N places.

    For an answer's tokens; or for a prompt's, with the logits of every place and the tokens that come next.
    """
    logits_NV = logits_NV.float()
    total_N1 = logits_NV.logsumexp(dim=-1, keepdim=True)
    chosen_N1 = logits_NV.gather(1, tokens_N[:, None])
    rank_N = (logits_NV > chosen_N1).sum(dim=-1) + 1
    top_NK, ids_NK = logits_NV.topk(min(count, logits_NV.shape[-1]), dim=-1)
    return Logprobs((chosen_N1 - total_N1)[:, 0], rank_N, top_NK - total_N1, ids_NK)


def filter_logits(logits_RV: torch.Tensor, rows: RowParams) -> torch.Tensor:
    """Logits after temperature, top-k, top-p and min-p in this order, less their row's maximum; -inf is filtered out.

    The order and the meaning of each are those of transformers' warpers, except that equal logits stay or go together,
    so that no sorting order can show.
    """
    # Shifted before it is divided: a tiny temperature cannot overflow.
    scaled = (logits_RV - logits_RV.amax(dim=-1, keepdim=True)) / rows.temperature[:, None]
    if not rows.sort_width and not rows.any_min_p:
        return scaled
    floor_R1 = torch.log(rows.min_p)[:, None]  # in logits, as the largest one is 0 now; -inf where off
    if rows.sort_width:
        floor_R1 = torch.maximum(floor_R1, _top_k_top_p_floor(scaled, rows))
    return scaled.masked_fill(scaled < floor_R1, -math.inf)


def _top_k_top_p_floor(scaled_RV: torch.Tensor, rows: RowParams) -> torch.Tensor:
    """The smallest logit [R, 1] that top-k and top-p leave in each row; -inf where both are off."""
    vocab = scaled_RV.shape[-1]
    width = min(rows.sort_width, vocab)
    top_k_R1 = torch.where(rows.top_k == 0, vocab, rows.top_k.clamp(max=vocab))[:, None]
    whole_R1 = torch.exp(scaled_RV).sum(dim=-1, keepdim=True, dtype=torch.float64)
    if scaled_RV.device.type == "cpu" and width > FEW:
        # Nearly always the few largest tokens are enough to know; looking whether they are costs nothing on a CPU.
        floor_R1, is_known_R1 = _floor_among(_largest(scaled_RV, FEW), whole_R1, top_k_R1, rows)
        if bool(is_known_R1.all()):
            return floor_R1
    return _floor_among(_largest(scaled_RV, width), whole_R1, top_k_R1, rows)[0]


def _floor_among(
    descending_RN: torch.Tensor, whole_R1: torch.Tensor, top_k_R1: torch.Tensor, rows: RowParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """The floor [R, 1] as far as the N largest logits tell, and whether they tell it, [R, 1] bool.

    `whole_R1` is the sum of exp of all logits. A row's own result does not depend on N, where it is known.
    """
    count = descending_RN.shape[-1]
    top_p_R1, has_top_k_R1 = rows.top_p[:, None], rows.top_k[:, None] > 0
    probs = torch.exp(descending_RN) * (torch.arange(count, device=descending_RN.device) < top_k_R1)
    mass = probs.cumsum(dim=-1, dtype=torch.float64)
    # A token stays while the tokens before it hold less than top_p of the probability; the first one always stays.
    wanted_R1 = torch.where(has_top_k_R1, mass[:, -1:], whole_R1) * top_p_R1
    stays = (probs > 0) & (((mass - probs) < wanted_R1) | (top_p_R1 == 1.0))
    last_R1 = stays.sum(dim=-1, keepdim=True).clamp(min=1) - 1  # 0 where top_p * mass underflows
    is_off_R1 = ~has_top_k_R1 & (top_p_R1 == 1.0)
    floor_R1 = descending_RN.gather(1, last_R1).masked_fill(is_off_R1, -math.inf)
    return floor_R1, is_off_R1 | torch.where(has_top_k_R1, top_k_R1 <= count, mass[:, -1:] >= wanted_R1)


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


def _max(x_BV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's largest value (NaN if it holds one), and the first place where it stands."""
    if x_BV.device.type != "cpu" or x_BV.dtype != torch.float32:
        best_B, places_B = x_BV.max(dim=-1)
        return best_B, places_B
    places_B = torch.from_numpy(x_BV.numpy().argmax(axis=-1))  # some six times quicker than torch's
    return x_BV.gather(1, places_B[:, None])[:, 0], places_B


def draw(scaled_RV: torch.Tensor, uniform_R: torch.Tensor) -> torch.Tensor:
    """One token per row, [R] int64, from unnormalized log probabilities and a number in [0, 1) by the inverse CDF.

    First the block of tokens is found, then the token in it: a float64 CDF of the whole vocabulary would cost more than
    all the rest.
    """
    rows, vocab = scaled_RV.shape
    blocks = -(-vocab // BLOCK)
    probs = scaled_RV.new_zeros(rows, blocks * BLOCK)
    torch.exp(scaled_RV, out=probs[:, :vocab])
    probs = probs.view(rows, blocks, BLOCK)
    cdf = probs.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target_R1 = torch.minimum(uniform_R[:, None] * cdf[:, -1:], _just_below(cdf[:, -1:]))
    # right=True finds the first entry above the target, whose own probability is therefore not 0. Where logits are
    # broken there is no such entry; that token is never used, but it must be one that exists.
    block_R1 = torch.searchsorted(cdf, target_R1, right=True).clamp(max=blocks - 1)
    before_R1 = cdf.gather(1, (block_R1 - 1).clamp(min=0)).masked_fill(block_R1 == 0, 0.0)
    inner = probs.gather(1, block_R1[:, :, None].expand(-1, 1, BLOCK))[:, 0].cumsum(dim=-1, dtype=torch.float64)
    # The two sums are rounded differently: without the limit the rest could be just past the block's last token.
    rest_R1 = torch.minimum((target_R1 - before_R1).clamp(min=0.0), _just_below(inner[:, -1:]))
    token_R1 = block_R1 * BLOCK + torch.searchsorted(inner, rest_R1, right=True)
    return token_R1[:, 0].clamp(max=vocab - 1)


def _just_below(x: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(x, torch.zeros_like(x))


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
