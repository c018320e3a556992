"""Draws one token per row of a batch from the logits, each row with its own parameters and its own random stream.

The number drawn for a token depends only on the request's seed and the token's index in the answer, so the same seed
gives the same text whatever else is in the batch. What happens to a row's logits, in this order: the edits of
`logits_processors.py`, then the temperature and filters of `draw.py`. Rows that ask for none of this take the most
likely token of their raw logits, and a batch of such rows costs one pass.

Nothing in `sample` waits for the device (but for callers' own logits processors), so it can be part of a CUDA graph.
What went wrong in a row shows in numbers beside the tokens, for the host to look at when it reads these (`row_errors`).
Shape legend: B rows of the batch, W rows whose logits are worked on, R rows that are drawn, V vocabulary, N rows and K
places of reported log probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edgellm.errors import EdgeLLMError, EngineError, RequestError
from edgellm.runtime.draw import DrawParams, draw_tokens
from edgellm.runtime.logits_processors import Edits, SamplerState, edit, fixed_additions, tensor
from edgellm.runtime.sampling_params import SamplingParams

__all__ = [
    "Logprob",
    "Logprobs",
    "RowParams",
    "Sampled",
    "SamplerState",
    "SamplingParams",
    "process",
    "row_errors",
    "sample",
    "token_logprobs",
]


@dataclass(frozen=True, eq=False)
class RowParams:
    """The sampling parameters of a batch as tensors on the logits' device; build it again when a row joins or leaves.

    `worked` [W] int64 are the rows that do not simply take the largest raw logit, None if that is all of them, in
    order. Of these the first R, batch rows `sampled` [R] int64, are drawn as `draws` says. `reported` [N] int64 are the
    rows whose log probabilities are wanted, `reported_rows` the same for the host, `top_logprobs` the most likely
    tokens of each.
    """

    worked: torch.Tensor | None
    num_worked: int
    edits: Edits | None
    sampled: torch.Tensor
    draws: DrawParams | None
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
        edited = {i for i, p in enumerate(params) if p.needs_history or fixed_additions(p, eos_token_ids)} | {*guided}
        sampled = [i for i, p in enumerate(params) if not p.is_greedy]
        # Rows that are drawn come first, so that they are a slice.
        worked = [*sampled, *sorted(edited.difference(sampled))]
        places = {row: at for at, row in enumerate(worked) if row in edited}
        reported = tuple(i for i, p in enumerate(params) if p.needs_logprobs)
        return cls(
            worked=None if worked == list(range(len(params))) else tensor(worked, torch.int64, device),
            num_worked=len(worked),
            edits=Edits.from_params(params, places, device, eos_token_ids, guided) if edited else None,
            sampled=tensor(sampled, torch.int64, device),
            draws=DrawParams.from_params([params[i] for i in sampled], [seeds[i] for i in sampled], device)
            if sampled
            else None,
            reported=tensor(reported, torch.int64, device),
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
    """What `sample` gives, on the logits' device: `tokens` [B] int64, the log probabilities of those of the `reported`
    rows, and for `row_errors` each row's largest logit [B] as it came (`best`) and after the edits (`allowed`), and the
    errors of callers' functions.
    """

    tokens: torch.Tensor
    best: torch.Tensor
    allowed: torch.Tensor
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
    allowed_B, errors = best_B, {}
    if rows.num_worked:
        worked_WV = _worked(logits_BV, rows)
        if rows.edits is not None:
            errors = edit(worked_WV, rows.edits, steps_B, state, bitmask_BW)
            allowed_W, tokens_W = _max(worked_WV)
            allowed_B, tokens_B = _put(best_B, rows, allowed_W), _put(tokens_B, rows, tokens_W)
        if rows.draws is not None:
            count = rows.sampled.shape[0]
            drawn_R = draw_tokens(worked_WV[:count], rows.draws, steps_B.index_select(0, rows.sampled))
            tokens_B = tokens_B.index_copy(0, rows.sampled, drawn_R)
    logprobs = None
    if rows.reported_rows:
        of = (logits_BV.index_select(0, rows.reported), tokens_B.index_select(0, rows.reported))
        logprobs = token_logprobs(*of, rows.top_logprobs)
    return Sampled(tokens_B, best_B, allowed_B, logprobs, errors)


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
    worked_WV = _worked(scores_BV, rows)
    errors = edit(worked_WV, rows.edits, steps_B, state, bitmask_BW)
    return _put(scores_BV.float(), rows, worked_WV), errors


def _worked(logits_BV: torch.Tensor, rows: RowParams) -> torch.Tensor:
    """A copy [W, V] of the rows that are worked on."""
    return (logits_BV.clone() if rows.worked is None else logits_BV.index_select(0, rows.worked)).float()


def _put(x_B: torch.Tensor, rows: RowParams, worked_W: torch.Tensor) -> torch.Tensor:
    """`x_B` with the rows that were worked on."""
    return worked_W if rows.worked is None else x_B.index_copy(0, rows.worked, worked_W)


def row_errors(sampled: Sampled) -> dict[int, EdgeLLMError]:
    """What went wrong, by row of the batch; the tokens of these rows mean nothing. Waits for the device."""
    errors: dict[int, EdgeLLMError] = dict(sampled.errors)
    for row, (best, allowed) in enumerate(zip(sampled.best.tolist(), sampled.allowed.tolist(), strict=True)):
        if not math.isfinite(best):
            errors[row] = EngineError(
                f"the engine returned NaN or infinite logits for row {row} of the batch; rebuild the engine"
            )
        elif not math.isfinite(allowed) and row not in errors:
            errors[row] = RequestError(
                "the sampling parameters forbid every token of the model here; relax logit_bias, bad, min_tokens, the "
                "guided output or the logits_processors"
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


def _max(x_BV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's largest value (NaN if it holds one), and the first place where it stands."""
    if x_BV.device.type != "cpu" or x_BV.dtype != torch.float32:
        best_B, places_B = x_BV.max(dim=-1)
        return best_B, places_B
    places_B = torch.from_numpy(x_BV.numpy().argmax(axis=-1))  # some six times quicker than torch's
    return x_BV.gather(1, places_B[:, None])[:, 0], places_B
