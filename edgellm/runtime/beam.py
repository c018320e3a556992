"""Beam search as pure functions over a step's scores: which beams go on, which answers are complete, when to stop.

It chooses what transformers' `generate(num_beams=W, do_sample=False)` chooses: the W best continuations of all beams go
on, a continuation that ends counts only if it is among the W best, finished answers are ranked by sum of log
probabilities / length ** length_penalty, and `early_stopping` means what it means there. Several requests (groups) with
the same number of beams can be searched together; a group's W beams lie in adjacent rows.

Unlike there, a beam that goes on keeps its row, so that the runtime copies KV slots only for beams that split: row i
takes over row `parents[i]`, and a row that is copied from is never written (`copies`). Nothing here waits for the
device but `answers`. Shape letters: G groups, W beams of each, R = G·W rows, V vocabulary, K candidates, T tokens.

The step of a search, `logits_RV` being the engine's:

    scores_RV, errors = process(logits_RV.float().log_softmax(-1), rows, state.steps(), sampler_state, bitmask)
    state, step = advance(state, scores_RV)
    # copy KV slots by copies(step.parents.tolist()); sampler_state.reorder(step.parents) and .append(step.tokens)
    # decode step.tokens next; a group where step.finished is set is over: answers(state, group, n)

In the first step only the prompt's one row exists; give its scores W times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edgellm.runtime.logits_processors import tensor
from edgellm.runtime.sampling_params import SamplingParams

FAR_BELOW = -1e9
"""The score of what must not be chosen; transformers' number, so that scores come out the same."""


@dataclass(frozen=True, eq=False)
class BeamState:
    """Where a search is. `tokens` [G, W, T] int64 and `scores` [G, W] fp32 (sums of log probabilities) of the beams,
    `best_tokens`, `best_lengths`, `best_scores` and `is_done` of the finished answers, best first; the rest are limits.
    """

    tokens: torch.Tensor
    scores: torch.Tensor
    lengths: torch.Tensor
    best_tokens: torch.Tensor
    best_lengths: torch.Tensor
    best_scores: torch.Tensor
    is_done: torch.Tensor
    finished: torch.Tensor
    end_ids: torch.Tensor
    max_tokens: torch.Tensor
    length_penalty: torch.Tensor
    stop_when_full: torch.Tensor
    exhaustive: torch.Tensor

    @classmethod
    def start(
        cls,
        params: Sequence[SamplingParams],
        max_tokens: Sequence[int],
        eos_token_ids: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> BeamState:
        """The searches of one or more requests, all with the same `beam_width`; `max_tokens` as the engine allows."""
        width, groups, room = params[0].beam_width, len(params), max(max_tokens)
        assert all(p.beam_width == width for p in params)
        ends = [[*(p.stop_token_ids or ()), *(() if p.ignore_eos else eos_token_ids)] for p in params]
        longest = max(1, *map(len, ends))

        def full(value: float, dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.full((groups, *shape), value, dtype=dtype, device=device)

        def per_group(values: Sequence[object], dtype: torch.dtype) -> torch.Tensor:
            return tensor(values, dtype, device).reshape(groups, -1)

        # All beams are the prompt yet: only the first may be continued, else all would be the same.
        scores = full(0.0, torch.float32, width)
        scores[:, 1:] = FAR_BELOW
        return cls(
            tokens=full(0, torch.int64, width, room),
            scores=scores,
            lengths=full(0, torch.int64, 1),
            best_tokens=full(0, torch.int64, width, room),
            best_lengths=full(0, torch.int64, width),
            best_scores=full(FAR_BELOW, torch.float32, width),
            is_done=full(0, torch.bool, width),
            finished=full(0, torch.bool, 1),
            end_ids=per_group([e + [-1] * (longest - len(e)) for e in ends], torch.int64),
            max_tokens=per_group(max_tokens, torch.int64),
            length_penalty=per_group([p.length_penalty for p in params], torch.float32),
            stop_when_full=per_group([p.early_stopping is True for p in params], torch.bool),
            exhaustive=per_group([p.early_stopping == "never" and p.length_penalty > 0 for p in params], torch.bool),
        )

    def steps(self) -> torch.Tensor:
        """How many tokens the beam of each row has, [R] int64."""
        return self.lengths.expand(self.scores.shape).reshape(-1)


@dataclass(frozen=True, eq=False)
class BeamStep:
    """One step's outcome. Row i goes on with token `tokens[i]` after what row `parents[i]` held, [R] int64 both.

    `finished` [G] bool: the group's answers are there. `fault` [G] bool: its scores held NaN, or no token was allowed.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    finished: torch.Tensor
    fault: torch.Tensor


@dataclass(frozen=True)
class Answer:
    """A finished answer, its end token included if it has one; `score` is what answers are ranked by."""

    token_ids: list[int]
    cumulative_logprob: float
    score: float


def advance(state: BeamState, scores_RV: torch.Tensor) -> tuple[BeamState, BeamStep]:
    """One step on. `scores_RV` fp32: log probabilities of the next token, after `sampling.process`.

    A group that has finished does not change any more; its row of the step means nothing.
    """
    groups, width = state.scores.shape
    vocab = scores_RV.shape[-1]
    totals = (scores_RV.reshape(groups, width, vocab) + state.scores[:, :, None]).flatten(1)
    # So many that W are left to go on even if every beam's best tokens are all its end tokens.
    count = min(max(2, 1 + state.end_ids.shape[1]) * width, width * vocab)
    top_GK, at_GK = totals.topk(count, dim=-1)
    parents_GK, ids_GK = at_GK // vocab, at_GK % vocab
    lengths = state.lengths + 1
    ends_GK = (ids_GK[:, :, None] == state.end_ids[:, None]).any(dim=-1) | (lengths >= state.max_tokens)
    tokens_GKT = _append(state, parents_GK, ids_GK)

    beams_GW, scores_GW = _going_on(top_GK, ends_GK, parents_GK, width)
    going = dataclasses.replace(
        _collect(state, top_GK, ends_GK, tokens_GKT, lengths),
        tokens=_pick(tokens_GKT, beams_GW),
        scores=scores_GW,
        lengths=torch.where(state.finished, state.lengths, lengths),
    )
    finished = state.finished | _is_over(going) | ends_GK.all(dim=-1, keepdim=True)
    first_row = torch.arange(groups, device=scores_RV.device)[:, None] * width
    step = BeamStep(
        tokens=ids_GK.gather(1, beams_GW).flatten(),
        parents=(parents_GK.gather(1, beams_GW) + first_row).flatten(),
        finished=finished[:, 0],
        fault=~torch.isfinite(top_GK[:, 0]),
    )
    return dataclasses.replace(going, finished=finished), step


def _append(state: BeamState, parents_GK: torch.Tensor, ids_GK: torch.Tensor) -> torch.Tensor:
    """Tokens [G, K, T] of each candidate. A finished group may have no room; there the last place is overwritten."""
    tokens_GKT = _pick(state.tokens, parents_GK)
    place = state.lengths.clamp(max=tokens_GKT.shape[-1] - 1)[:, :, None].expand(-1, parents_GK.shape[1], -1)
    return tokens_GKT.scatter(2, place, ids_GK[:, :, None])


def _pick(x_GNT: torch.Tensor, index_GW: torch.Tensor) -> torch.Tensor:
    return x_GNT.gather(1, index_GW[:, :, None].expand(-1, -1, x_GNT.shape[-1]))


def _going_on(
    top_GK: torch.Tensor, ends_GK: torch.Tensor, parents_GK: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which candidate goes on in each row [G, W], and its score."""
    scores_GW, chosen_GW = (top_GK + ends_GK * FAR_BELOW).topk(width, dim=-1)
    order_GW = _rows(parents_GK.gather(1, chosen_GW)).argsort(dim=-1)
    return chosen_GW.gather(1, order_GW), scores_GW.gather(1, order_GW)


def _rows(parents_GW: torch.Tensor) -> torch.Tensor:
    """The row that each beam gets, [G, W]: its parent's if it is the first child, else one whose beam has no child."""
    same_GWW = parents_GW[:, :, None] == parents_GW[:, None]
    is_first = ~same_GWW.tril(-1).any(dim=-1)
    taken = torch.zeros_like(parents_GW).scatter(1, parents_GW, 1)
    free_rows = taken.argsort(dim=-1, stable=True)
    number = ((~is_first).cumsum(dim=-1) - 1).clamp(min=0)
    return torch.where(is_first, parents_GW, free_rows.gather(1, number))


def _collect(
    state: BeamState, top_GK: torch.Tensor, ends_GK: torch.Tensor, tokens_GKT: torch.Tensor, lengths: torch.Tensor
) -> BeamState:
    """The state with the answers that this step finished, if they are better than those there are."""
    width = state.scores.shape[1]
    is_new = ends_GK & (torch.arange(top_GK.shape[1], device=top_GK.device) < width) & ~state.finished
    scores_GK = top_GK / lengths.float() ** state.length_penalty + ~is_new * FAR_BELOW
    scores, index = torch.cat((state.best_scores, scores_GK), dim=1).topk(width, dim=-1)
    return dataclasses.replace(
        state,
        best_scores=scores,
        best_tokens=_pick(torch.cat((state.best_tokens, tokens_GKT), dim=1), index),
        best_lengths=torch.cat((state.best_lengths, lengths.expand_as(top_GK)), dim=1).gather(1, index),
        is_done=torch.cat((state.is_done, is_new), dim=1).gather(1, index),
    )


def _is_over(state: BeamState) -> torch.Tensor:
    """[G, 1]: W answers are there, and the beams cannot give a better one, or need not."""
    longest = torch.where(state.exhaustive, state.max_tokens, state.lengths).float()
    hoped = state.scores.amax(dim=-1, keepdim=True) / longest**state.length_penalty
    full = state.is_done.all(dim=-1, keepdim=True)
    return full & (state.stop_when_full | (hoped <= state.best_scores.amin(dim=-1, keepdim=True)))


def copies(parents: Sequence[int]) -> list[tuple[int, int]]:
    """(source row, target row) of the slots to copy, in any order: no target is a source."""
    return [(parent, row) for row, parent in enumerate(parents) if parent != row]


def answers(state: BeamState, group: int, n: int) -> list[Answer]:
    """The `n` best answers of a group that has finished, best first. Waits for the device."""
    scores, lengths = state.best_scores[group, :n].tolist(), state.best_lengths[group, :n].tolist()
    penalty = float(state.length_penalty[group])
    tokens = state.best_tokens[group, :n].tolist()
    done = state.is_done[group, :n].tolist()
    return [
        Answer(ids[:length], score * length**penalty, score)
        for ids, length, score, is_done in zip(tokens, lengths, scores, done, strict=True)
        if is_done
    ]
