"""What changes a row's logits before a token is drawn: masks, biases, bans, penalties and the caller's own functions.

The order is transformers', with the mask of guided output before everything else:

1. guided output's bitmask
2. `logit_bias`, and -inf for bad words and, before `min_tokens`, for the tokens that end an answer (transformers bans
   after the penalties; the result is the same, since -inf stays -inf)
3. `repetition_penalty` over prompt and answer, then `frequency_penalty` and `presence_penalty` over the answer
4. the caller's `logits_processors`
(then, in `sampling.py`: temperature, top-k, top-p, min-p)

Each function changes only the rows that asked for it, and of these only the cells it must: the penalties gather and
scatter at the tokens seen, not over the vocabulary. The seen tokens live on the logits' device (`SamplerState`), so
the host need not know a token before the next one is drawn. But for the caller's own functions nothing here waits for
the device, so it can run in a CUDA graph.

Shape letters: B rows of the batch, E rows that are changed here, Q rows or K cells of one feature, V vocabulary, W
words of a bitmask, T tokens seen, L tokens of a bad word before its last.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edgellm.errors import RequestError
from edgellm.runtime.sampling_params import LogitsProcessor, SamplingParams

log = logging.getLogger(__name__)

ALWAYS = 2**62
"""An answer never has so many tokens."""


def tensor(values: Sequence[object], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """A small tensor on `device`, through pinned memory where that spares a wait for the device."""
    pinned = torch.device(device).type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class SamplerState:
    """The tokens of each slot's request, prompt first, on the logits' device. Slot i is row i of the batch.

    Only slots whose request `needs_history` must be set; the others may hold anything. `tokens` [slots, capacity] and
    `prompt_lengths`, `lengths` [slots] are int64 and keep their addresses. A `view` shares them.
    """

    tokens: torch.Tensor
    prompt_lengths: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def empty(cls, slots: int, capacity: int, device: torch.device | str = "cpu") -> SamplerState:
        """Room for `capacity` tokens, prompt and answer, in each slot."""
        lengths = torch.zeros(2, slots, dtype=torch.int64, device=device)
        return cls(torch.zeros(slots, capacity, dtype=torch.int64, device=device), lengths[0], lengths[1])

    def view(self, first: int, count: int) -> SamplerState:
        """Slots `first` to `first + count - 1`, as the state of a batch of these."""
        part = slice(first, first + count)
        return SamplerState(self.tokens[part], self.prompt_lengths[part], self.lengths[part])

    def set_slot(self, slot: int, prompt_ids: Sequence[int], output_ids: Sequence[int] = ()) -> None:
        """A request joins, or comes back with the `output_ids` it has so far."""
        ids = [*prompt_ids, *output_ids]
        self.tokens[slot, : len(ids)] = tensor(ids, torch.int64, self.tokens.device)
        # not by assignment, which on a GPU waits for the device
        self.prompt_lengths[slot].fill_(len(prompt_ids))
        self.lengths[slot].fill_(len(ids))

    def move_slot(self, source: int, target: int) -> None:
        """Slot `target` takes over the request of slot `source`, as in the KV cache."""
        for x in (self.tokens, self.prompt_lengths, self.lengths):
            x[target] = x[source]

    def append(self, tokens_B: torch.Tensor) -> None:
        """Each of the first B slots got its next token; works in a CUDA graph."""
        count = tokens_B.shape[0]
        # A slot that was never set may have counted further than there is room.
        at_B1 = self.lengths[:count, None].clamp(max=self.tokens.shape[1] - 1)
        self.tokens[:count].scatter_(1, at_B1, tokens_B[:, None])
        self.lengths[:count] += 1

    def reorder(self, parents_B: torch.Tensor) -> None:
        """All at once, slot i takes over what slot `parents_B[i]` held: the step of a beam search."""
        for x in (self.tokens, self.prompt_lengths, self.lengths):
            x[: parents_B.shape[0]] = x.index_select(0, parents_B)


@dataclass(frozen=True, eq=False)
class Additions:
    """Amounts added to single logits: `value` [K] at row `at`, token `token`, while the row's step is below `until`."""

    row: torch.Tensor
    at: torch.Tensor
    token: torch.Tensor
    value: torch.Tensor
    until: torch.Tensor


@dataclass(frozen=True, eq=False)
class Sequences:
    """Bad words of several tokens: `token` [K] must not follow `prefix` [K, L], whose -1 on the left match anything."""

    row: torch.Tensor
    at: torch.Tensor
    token: torch.Tensor
    prefix: torch.Tensor


@dataclass(frozen=True, eq=False)
class Penalties:
    """Rows with penalties, and each row's amounts [Q] (repetition: `first`; frequency and presence: both)."""

    row: torch.Tensor
    at: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor


@dataclass(frozen=True, eq=False)
class Guided:
    """Rows with a bitmask; `row` and `at` are None if that is all of them, in order. `table`: see `bitmask_table`."""

    row: torch.Tensor | None
    at: torch.Tensor | None
    table: torch.Tensor


@dataclass(frozen=True, eq=False)
class Edits:
    """What changes logits in a batch, as tensors. `rows` [E] are the batch rows that it concerns.

    In each part `row` is the row of the batch and `at` its place among the rows that `edit` gets.
    """

    guided: Guided | None
    additions: Additions | None
    sequences: Sequences | None
    repetition: Penalties | None
    frequency: Penalties | None
    custom: tuple[tuple[int, int, tuple[LogitsProcessor, ...]], ...]

    @classmethod
    def from_params(
        cls,
        params: Sequence[SamplingParams],
        places: dict[int, int],
        device: torch.device | str,
        eos_token_ids: Sequence[int],
        guided: Sequence[int],
    ) -> Edits:
        """For the batch rows in `places` (row -> where `edit` finds it); `guided` rows have a bitmask."""
        rows = list(places)

        def ints(values: Sequence[object]) -> torch.Tensor:
            return tensor(values, torch.int64, device)

        def penalties(chosen: list[int], first: list[float], second: list[float]) -> Penalties | None:
            amounts = [tensor(x, torch.float32, device)[:, None] for x in (first, second)]
            return Penalties(ints(chosen), ints([places[i] for i in chosen]), *amounts) if chosen else None

        repeated = [i for i in rows if params[i].repetition_penalty != 1.0]
        counted = [i for i in rows if params[i].frequency_penalty != 0.0 or params[i].presence_penalty != 0.0]
        return cls(
            guided=_guided(len(params), places, device, guided) if guided else None,
            additions=_additions(
                [(i, *a) for i in rows for a in fixed_additions(params[i], eos_token_ids)], places, device
            ),
            sequences=_sequences([(i, s) for i in rows for s in params[i].bad_sequences if len(s) > 1], places, device),
            repetition=penalties(repeated, [params[i].repetition_penalty for i in repeated], [0.0] * len(repeated)),
            frequency=penalties(
                counted, [params[i].frequency_penalty for i in counted], [params[i].presence_penalty for i in counted]
            ),
            custom=tuple((i, places[i], processors_of(params[i])) for i in rows if params[i].logits_processors),
        )

    @property
    def needs_history(self) -> bool:
        """Whether `edit` needs a SamplerState."""
        return any((self.sequences, self.repetition, self.frequency, self.custom))


def _guided(batch: int, places: dict[int, int], device: torch.device | str, rows: Sequence[int]) -> Guided:
    at = [places[i] for i in rows]
    if list(rows) == at == list(range(batch)):
        return Guided(None, None, bitmask_table(device))
    return Guided(tensor(rows, torch.int64, device), tensor(at, torch.int64, device), bitmask_table(device))


def processors_of(params: SamplingParams) -> tuple[LogitsProcessor, ...]:
    """The caller's own functions."""
    return tuple(params.logits_processors or ())


def fixed_additions(params: SamplingParams, eos_token_ids: Sequence[int]) -> list[tuple[int, float, int]]:
    """(token, amount, until step) of the biases, the bad words of one token and the bans of `min_tokens`."""
    ends = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else eos_token_ids)} if params.min_tokens else ()
    return [
        *((token, bias, ALWAYS) for token, bias in params.biases if bias != 0.0),
        *((ids[0], -math.inf, ALWAYS) for ids in params.bad_sequences if len(ids) == 1),
        *((token, -math.inf, params.min_tokens) for token in sorted(ends)),
    ]


def _additions(
    entries: list[tuple[int, int, float, int]], places: dict[int, int], device: torch.device | str
) -> Additions | None:
    if not entries:
        return None
    rows, tokens, values, until = zip(*entries, strict=True)
    row, at, token, end = (tensor(x, torch.int64, device) for x in (rows, [places[i] for i in rows], tokens, until))
    return Additions(row, at, token, tensor(values, torch.float32, device), end)


def _sequences(
    entries: list[tuple[int, tuple[int, ...]]], places: dict[int, int], device: torch.device | str
) -> Sequences | None:
    if not entries:
        return None
    longest = max(len(ids) for _, ids in entries) - 1
    prefixes = [[-1] * (longest + 1 - len(ids)) + list(ids[:-1]) for _, ids in entries]
    rows = [i for i, _ in entries]
    row, at, token, prefix = (
        tensor(x, torch.int64, device) for x in (rows, [places[i] for i in rows], [s[-1] for _, s in entries], prefixes)
    )
    return Sequences(row, at, token, prefix)


def edit(
    logits_EV: torch.Tensor,
    edits: Edits,
    steps_B: torch.Tensor,
    state: SamplerState | None = None,
    bitmask_BW: torch.Tensor | None = None,
) -> dict[int, RequestError]:
    """Change `logits_EV` (fp32, contiguous) in place; gives the errors of callers' functions that failed, by batch row.

    `steps_B` is the index of the token drawn now within each row's answer. `bitmask_BW` int32 has one bit per token,
    lowest first, on the logits' device (the form of llguidance and xgrammar); only guided rows of it are read.
    """
    assert not edits.needs_history or state is not None, "this batch needs a SamplerState"
    assert edits.guided is None or bitmask_BW is not None, "this batch needs a bitmask"
    if edits.guided is not None and bitmask_BW is not None:
        guided = edits.guided
        if guided.row is None or guided.at is None:
            apply_bitmask(logits_EV, bitmask_BW, guided.table)
        else:
            some = logits_EV.index_select(0, guided.at)
            logits_EV.index_copy_(
                0, guided.at, apply_bitmask(some, bitmask_BW.index_select(0, guided.row), guided.table)
            )
    if edits.additions is not None:
        add(logits_EV, edits.additions, steps_B)
    if state is None:
        return {}
    if edits.sequences is not None:
        ban_sequences(logits_EV, edits.sequences, state)
    if edits.repetition is not None:
        penalize_repetition(logits_EV, edits.repetition, state)
    if edits.frequency is not None:
        penalize_frequency(logits_EV, edits.frequency, state)
    return _custom(logits_EV, edits, state)


def bitmask_table(device: torch.device | str = "cpu") -> torch.Tensor:
    """[256, 8] fp32: what each byte of a bitmask adds to the logits of its eight tokens."""
    bits = [[0.0 if byte >> bit & 1 else -math.inf for bit in range(8)] for byte in range(256)]
    return tensor(bits, torch.float32, device)


def apply_bitmask(logits_RV: torch.Tensor, bitmask_RW: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The logits, in place, with -inf where the token's bit is 0 or the mask is too short to have one."""
    rows, vocab = logits_RV.shape
    if logits_RV.device.type == "cpu":
        # A look-up of eight tokens at a time: quicker there than testing each bit, and slower on a GPU.
        bytes_R = bitmask_RW.view(torch.uint8).flatten().int()
        added = table.index_select(0, bytes_R).view(rows, -1)[:, :vocab]
        covered = added.shape[1]
        logits_RV[:, :covered] += added
    else:
        bits = torch.bitwise_left_shift(1, torch.arange(32, dtype=torch.int32, device=logits_RV.device))
        forbidden = ((bitmask_RW[:, :, None] & bits) == 0).flatten(1)[:, :vocab]
        covered = forbidden.shape[1]
        logits_RV[:, :covered].masked_fill_(forbidden, -math.inf)
    logits_RV[:, covered:] = -math.inf
    return logits_RV


def add(logits_EV: torch.Tensor, additions: Additions, steps_B: torch.Tensor) -> None:
    """Biases and bans that depend on the step alone, in place."""
    active = steps_B.index_select(0, additions.row) < additions.until
    cells = additions.at * logits_EV.shape[-1] + additions.token
    logits_EV.view(-1).scatter_add_(0, cells, additions.value.masked_fill(~active, 0.0))


def ban_sequences(logits_EV: torch.Tensor, sequences: Sequences, state: SamplerState) -> None:
    """-inf, in place, for the last token of each bad word whose other tokens are the row's latest."""
    length = sequences.prefix.shape[-1]
    ends = state.lengths.index_select(0, sequences.row)[:, None]
    places = ends - length + torch.arange(length, device=logits_EV.device)
    seen = state.tokens[sequences.row[:, None], places.clamp(0, state.tokens.shape[1] - 1)]
    matched = ((sequences.prefix < 0) | ((seen == sequences.prefix) & (places >= 0))).all(dim=-1)
    values = torch.zeros_like(matched, dtype=logits_EV.dtype).masked_fill(matched, -math.inf)
    # Added, not assigned: two words may end in the same token.
    logits_EV.view(-1).scatter_add_(0, sequences.at * logits_EV.shape[-1] + sequences.token, values)


def penalize_repetition(logits_EV: torch.Tensor, penalties: Penalties, state: SamplerState) -> None:
    """Divide the positive logits of all tokens seen, prompt included, by the penalty, multiply the negative; in place.

    Source: Keskar and others, "CTRL" (2019), as transformers computes it.
    """
    _, _, cells = _seen(logits_EV, penalties, state)
    values = logits_EV.view(-1)[cells]
    values = torch.where(values < 0, values * penalties.first, values / penalties.first)
    logits_EV.view(-1).scatter_(0, cells.view(-1), values.view(-1))


def penalize_frequency(logits_EV: torch.Tensor, penalties: Penalties, state: SamplerState) -> None:
    """Subtract, in place, frequency × (how often the answer holds the token) + presence × (whether it does)."""
    known, ids, cells = _seen(logits_EV, penalties, state)
    place = torch.arange(ids.shape[1], device=ids.device)
    answered = known & (place >= state.prompt_lengths.index_select(0, penalties.row)[:, None])
    counts = torch.zeros(ids.shape[0], logits_EV.shape[-1], dtype=torch.float32, device=ids.device)
    counts = counts.scatter_add_(1, ids, answered.float()).gather(1, ids)
    values = logits_EV.view(-1)[cells] - penalties.first * counts - penalties.second * (counts > 0)
    logits_EV.view(-1).scatter_(0, cells.view(-1), values.view(-1))


def _seen(
    logits_EV: torch.Tensor, penalties: Penalties, state: SamplerState
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which places of each row's history are in use [Q, T], the tokens there, and their cells in the flat logits.

    A token stands there as often as it was seen, and unused places repeat the row's first token: all of these get the
    same value, so it does not matter which one is written last.
    """
    lengths = state.lengths.index_select(0, penalties.row)
    # Elsewhere than on a CPU, asking for the longest would mean waiting, and shapes must not change in a CUDA graph.
    width = int(lengths.max()) if lengths.device.type == "cpu" else state.tokens.shape[1]
    tokens = state.tokens[:, :width].index_select(0, penalties.row)
    known = torch.arange(width, device=tokens.device) < lengths[:, None]
    ids = torch.where(known, tokens, tokens[:, :1])
    return known, ids, penalties.at[:, None] * logits_EV.shape[-1] + ids


def _custom(logits_EV: torch.Tensor, edits: Edits, state: SamplerState) -> dict[int, RequestError]:
    """Run the callers' functions; what one raises fails its row, and no other."""
    errors = {}
    for row, at, processors in edits.custom:
        ids = state.tokens[row, : int(state.lengths[row])]
        for number, processor in enumerate(processors):
            name = f"logits_processors[{number}]"
            try:
                changed = processor(ids, logits_EV[at])
            except Exception as e:
                # It is the caller's code: anything can come, and the other rows have nothing to do with it.
                log.exception("%s raised", name)
                errors[row] = RequestError(f"{name} raised {type(e).__name__}: {e}".splitlines()[0])
                break
            if not isinstance(changed, torch.Tensor) or changed.shape != logits_EV[at].shape:
                what = list(changed.shape) if isinstance(changed, torch.Tensor) else type(changed).__name__
                errors[row] = RequestError(f"{name} gave {what}; it must give the logits, [{logits_EV.shape[-1]}]")
                break
            logits_EV[at] = changed
    return errors
