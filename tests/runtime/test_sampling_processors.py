"""Edits of logits against transformers' processors, the tokens' history, log probabilities, and what goes wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from edgellm.runtime.logits_processors import SamplerState, apply_bitmask, bitmask_table
from edgellm.runtime.sampling import RowParams, SamplingParams, process, row_errors, sample, token_logprobs

VOCAB = 97
EOS = (5, 11)
PROMPT = [3, 8, 3, 20, 96, 0]
ANSWER = [8, 40, 40, 41, 8, 40]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are small; on a busy machine torch's threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def plus_one(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """A caller's function: the token after the last one gains 3."""
    logits[(ids[-1] + 1) % VOCAB] += 3
    return logits


FEATURES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "bias": {"logit_bias": {3: 5.0, 40: -100.0, 96: 0.5}},
    "repetition": {"repetition_penalty": 1.7},
    "reward": {"repetition_penalty": 0.5},
    "frequency": {"frequency_penalty": 0.9},
    "presence": {"presence_penalty": -1.5},
    "bad": {"bad_token_ids": [7, [40, 9], [8, 40, 50], [41, 8, 40, 9], [1, 40, 10], [3] * 40 + [2], [0, 0]]},
    "min": {"min_tokens": 7, "stop_token_ids": [60]},
    "min over": {"min_tokens": 6},
    "min, eos ignored": {"min_tokens": 7, "stop_token_ids": [60], "ignore_eos": True},
    "custom": {"logits_processors": [plus_one]},
}
FEATURES["all"] = {
    k: v
    for f in ("bias", "repetition", "frequency", "presence", "bad", "min", "custom")
    for k, v in FEATURES[f].items()
}


def history(slots: int, prompt: list[int] = PROMPT, answer: list[int] = ANSWER) -> SamplerState:
    state = SamplerState.empty(slots, 64)
    for slot in range(slots):
        state.set_slot(slot, prompt, answer)
    return state


def by_transformers(logits_1V: torch.Tensor, p: SamplingParams) -> torch.Tensor:
    """One row after transformers' processors in the order of its `generate`; OpenAI's penalties, which it has not."""
    ids = torch.tensor([PROMPT + ANSWER])
    processors = LogitsProcessorList()
    if p.biases:
        processors.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in p.biases}))
    if p.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(p.repetition_penalty))

    def openai(ids: torch.Tensor, logits_1V: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(torch.tensor(ANSWER), minlength=VOCAB)
        return logits_1V - p.frequency_penalty * counts - p.presence_penalty * (counts > 0)

    processors.append(openai)
    if p.bad_sequences:
        processors.append(NoBadWordsLogitsProcessor([list(s) for s in p.bad_sequences]))
    ends = [*(p.stop_token_ids or ()), *(() if p.ignore_eos else EOS)]
    processors.append(MinNewTokensLengthLogitsProcessor(len(PROMPT), p.min_tokens, torch.tensor(ends)))
    if p.logits_processors:
        (function,) = p.logits_processors
        processors.append(lambda ids, x: function(ids[0], x[0].clone())[None])
    if not p.is_greedy:
        processors.append(TemperatureLogitsWarper(p.temperature))
    if p.top_k:
        processors.append(TopKLogitsWarper(p.top_k))
    if p.top_p < 1:
        processors.append(TopPLogitsWarper(p.top_p))
    if p.min_p:
        processors.append(MinPLogitsWarper(p.min_p))
    return processors(ids, logits_1V)[0]


def random_logits(rows: int, seed: int, scale: float = 4.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("seed", range(5))
def test_every_feature_equals_transformers_side_by_side_in_one_batch(seed: int) -> None:
    params = [SamplingParams(**fields) for fields in FEATURES.values()]
    logits = random_logits(len(params), seed)
    before = logits.clone()
    rows = RowParams.from_params(params, [0] * len(params), eos_token_ids=EOS)
    steps = torch.full((len(params),), len(ANSWER))
    got, errors = process(logits, rows, steps, history(len(params)))
    assert not errors and torch.equal(logits, before)
    for row, (name, p) in enumerate(zip(FEATURES, params, strict=True)):
        expected = by_transformers(logits[row : row + 1].clone(), p)
        assert torch.allclose(got[row], expected, atol=1e-5), name
    assert torch.equal(got[0], logits[0])
    tokens = sample(logits, rows, steps, history(len(params))).tokens
    assert torch.equal(tokens, got.argmax(dim=-1))


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("warpers", [{}, {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.01}])
def test_drawn_distribution_by_chi_square(feature: str, warpers: dict[str, Any]) -> None:
    """Draws over successive steps of a row against transformers' probabilities; the bound is 5 standard deviations."""
    params = SamplingParams(**{"temperature": 0.8, **FEATURES[feature], **warpers})
    logits = random_logits(1, 3, 1.5)
    probs = by_transformers(logits.clone(), params).double().softmax(-1)
    batch, draws = 500, 10_000 if not params.logits_processors else 2_000
    rows = RowParams.from_params([params] * batch, list(range(batch)), eos_token_ids=EOS)
    state = history(batch)
    counts = torch.zeros(VOCAB, dtype=torch.float64)
    for number in range(draws // batch):
        # other seeds rather than other steps, on which min_tokens depends
        seeds = RowParams.from_params([params] * batch, [number * batch + i for i in range(batch)], eos_token_ids=EOS)
        tokens = sample(logits.expand(batch, -1), seeds, torch.full((batch,), len(ANSWER)), state).tokens
        counts += torch.bincount(tokens, minlength=VOCAB)
    assert rows.needs_history == params.needs_history
    assert counts[probs == 0].sum() == 0
    expected = probs * draws
    common = expected >= 5
    statistic = float((((counts - expected) ** 2)[common] / expected[common]).sum())
    freedom = int(common.sum()) - 1
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * max(freedom, 1)), (statistic, freedom)


def test_min_tokens_ends_at_its_step() -> None:
    params = SamplingParams(min_tokens=3, stop_token_ids=[60], logit_bias={60: 100.0})
    rows = RowParams.from_params([params], [0], eos_token_ids=EOS)
    drawn = [int(sample(torch.zeros(1, VOCAB), rows, torch.tensor([step])).tokens) for step in range(5)]
    assert 60 not in drawn[:3] and drawn[3:] == [60, 60]


def test_bad_word_of_repeated_tokens_is_never_completed_in_a_long_answer() -> None:
    words = [[1, 1, 1], [2, 3], [3, 2, 1], [1, 2, 3, 1]]
    params = SamplingParams(temperature=1.0, bad_token_ids=words)
    rows = RowParams.from_params([params], [7])
    state = SamplerState.empty(1, 2000)
    state.set_slot(0, [1, 1])
    for step in range(1500):
        sampled = sample(torch.zeros(1, 4), rows, torch.tensor([step]), state)
        state.append(sampled.tokens)
    ids = state.tokens[0, :1502].tolist()
    assert set(ids) == {0, 1, 2, 3}
    for word in words:
        assert all(ids[i : i + len(word)] != word for i in range(len(ids)))


def test_features_of_one_row_do_not_touch_another_and_depend_on_no_other() -> None:
    """A row's draws over 40 steps are the same alone and among rows with every feature."""
    mixed = [SamplingParams(**{"temperature": 0.9, **fields}) for fields in FEATURES.values()]
    for mine in (mixed[-1], SamplingParams(temperature=1.0), SamplingParams(**FEATURES["all"]), SamplingParams()):

        def run(others: list[SamplingParams], place: int, mine: SamplingParams = mine) -> list[int]:
            params = [*others[:place], mine, *others[place:]]
            rows = RowParams.from_params(
                params, [9 if i == place else i for i in range(len(params))], eos_token_ids=EOS
            )
            state = history(len(params))
            state.set_slot(place, PROMPT)
            noise = torch.Generator().manual_seed(place)
            for step in range(40):
                logits = torch.randn(len(params), VOCAB, generator=noise)
                logits[place] = random_logits(1, step)[0]
                steps = torch.full((len(params),), 20)
                steps[place] = step
                state.append(sample(logits, rows, steps, state).tokens)
            return state.tokens[place, len(PROMPT) : len(PROMPT) + 40].tolist()

        alone = run([], 0)
        assert run(mixed, 4) == alone == run(mixed[::-1], 0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_history_after_moves_and_steps_is_that_of_the_tokens(data: st.DataObject) -> None:
    """Requests join, leave (the last slot moves into the gap) and step; at the end penalties see each one's tokens."""
    state, running = SamplerState.empty(4, 80), []
    token = st.integers(0, VOCAB - 1)
    for _ in range(data.draw(st.integers(1, 20))):
        action = data.draw(st.sampled_from(["join", "leave", "step"]))
        if action == "join" and len(running) < 4:
            prompt = data.draw(st.lists(token, min_size=1, max_size=9))
            answer = data.draw(st.lists(token, max_size=3))
            state.set_slot(len(running), prompt, answer)
            running.append((prompt, list(answer)))
        elif action == "leave" and running:
            slot = data.draw(st.integers(0, len(running) - 1))
            state.move_slot(len(running) - 1, slot)
            running[slot] = running[-1]
            running.pop()
        elif action == "step" and running:
            tokens = data.draw(st.lists(token, min_size=len(running), max_size=len(running)))
            state.append(torch.tensor(tokens))
            for (_, answer), new in zip(running, tokens, strict=True):
                answer.append(new)
    if not running:
        return
    params = [SamplingParams(repetition_penalty=1.5, frequency_penalty=1.0)] * len(running)
    rows = RowParams.from_params(params, [0] * len(running))
    logits = random_logits(len(running), 1)
    got, _ = process(logits, rows, torch.zeros(len(running), dtype=torch.int64), state)
    for row, (prompt, answer) in enumerate(running):
        seen = sorted({*prompt, *answer})
        x = logits[row].clone()
        x[seen] = torch.where(x[seen] < 0, x[seen] * 1.5, x[seen] / 1.5)
        assert torch.equal(got[row], x - torch.bincount(torch.tensor(answer, dtype=torch.int64), minlength=VOCAB))


def test_a_slot_that_was_never_set_does_no_harm() -> None:
    state = SamplerState.empty(2, 8)
    state.set_slot(1, [1, 2])
    for token in range(20):
        state.append(torch.tensor([90, token % 5]) if token < 6 else torch.tensor([90]))
    assert state.tokens[1].tolist() == [1, 2, 0, 1, 2, 3, 4, 0] and int(state.lengths[1]) == 8


def test_a_view_is_the_state_of_a_part_of_the_slots() -> None:
    state = SamplerState.empty(3, 10)
    state.set_slot(2, [4, 4])
    rows = RowParams.from_params([SamplingParams(frequency_penalty=2.0)], [0])
    part = state.view(2, 1)
    part.append(torch.tensor([6]))
    got, _ = process(torch.zeros(1, VOCAB), rows, torch.tensor([1]), part)
    assert got.nonzero().tolist() == [[0, 6]] and state.tokens[2, :3].tolist() == [4, 4, 6]


def packed(allowed: torch.Tensor) -> torch.Tensor:
    """[B, V] bool as a bitmask [B, ceil(V/32)] int32, lowest bit first."""
    rows, vocab = allowed.shape
    bits = np.zeros((rows, -(-vocab // 32) * 32), dtype=np.uint8)
    bits[:, :vocab] = allowed.numpy()
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view(np.int32).copy())


@pytest.mark.parametrize("vocab", [31, 32, 33, 97, 128])
def test_bitmask(vocab: int) -> None:
    allowed = torch.rand(3, vocab, generator=torch.Generator().manual_seed(vocab)) < 0.5
    logits = torch.randn(3, vocab)
    got = apply_bitmask(logits.clone(), packed(allowed), bitmask_table())
    assert torch.equal(got, logits.masked_fill(~allowed, -math.inf))
    if vocab > 32:
        short = apply_bitmask(logits.clone(), packed(allowed)[:, :1].contiguous(), bitmask_table())
        assert torch.equal(short[:, :32], got[:, :32]) and bool((short[:, 32:] == -math.inf).all())


def test_only_guided_rows_are_masked_and_before_everything_else() -> None:
    allowed = torch.zeros(4, VOCAB, dtype=torch.bool)
    allowed[:, 50:60] = True
    params = [
        SamplingParams(),
        SamplingParams(),
        SamplingParams(logit_bias={3: 100.0}),
        SamplingParams(temperature=1.0),
    ]
    rows = RowParams.from_params(params, [0] * 4, guided=[1, 2, 3])
    logits = random_logits(4, 0)
    logits[:, 3] = 50.0
    sampled = sample(logits, rows, torch.zeros(4, dtype=torch.int64), None, packed(allowed))
    assert int(sampled.tokens[0]) == 3 and all(50 <= int(t) < 60 for t in sampled.tokens[1:])
    assert not row_errors(sampled)
    every = RowParams.from_params(params[:3], [0] * 3, guided=[0, 1, 2])
    sampled = sample(logits[:3], every, torch.zeros(3, dtype=torch.int64), None, packed(allowed[:3]))
    assert all(50 <= int(t) < 60 for t in sampled.tokens)


def test_rows_that_want_nothing_are_not_worked_on() -> None:
    params = [SamplingParams(), SamplingParams(max_tokens=3, ignore_eos=True), SamplingParams(logprobs=2)]
    rows = RowParams.from_params(params, [0] * 3, eos_token_ids=EOS)
    assert rows.num_worked == 0 and rows.edits is None and rows.reported_rows == (2,)
    rows = RowParams.from_params(
        [*params, SamplingParams(temperature=1.0), SamplingParams(min_tokens=1)], [0] * 5, eos_token_ids=EOS
    )
    assert rows.worked is not None and rows.worked.tolist() == [3, 4] and not rows.needs_history


def test_log_probabilities_are_those_of_the_raw_logits() -> None:
    logits = random_logits(4, 5)
    params = [
        SamplingParams(logprobs=3, repetition_penalty=3.0, logit_bias={9: 100.0}),
        SamplingParams(),
        SamplingParams(logprobs=0, temperature=2.0, top_k=4),
        SamplingParams(temperature=1.0, n=1, best_of=2),
    ]
    rows = RowParams.from_params(params, [1, 2, 3, 4])
    sampled = sample(logits, rows, torch.zeros(4, dtype=torch.int64), history(4))
    assert rows.reported_rows == (0, 2, 3) and rows.top_logprobs == 3 and sampled.logprobs is not None
    expected = logits.log_softmax(-1)
    tokens = [int(sampled.tokens[r]) for r in rows.reported_rows]
    dicts = sampled.logprobs.dicts(tokens, [params[r].logprobs or 0 for r in rows.reported_rows])
    assert int(sampled.tokens[0]) == 9 and [len(d) for d in dicts] == [3 + (9 not in logits[0].topk(3).indices), 1, 1]
    for row, token, entry in zip(rows.reported_rows, tokens, dicts, strict=True):
        assert token in entry
        for i, found in entry.items():
            assert found.logprob == pytest.approx(float(expected[row, i]), abs=1e-5)
            assert found.rank == int((logits[row] > logits[row, i]).sum()) + 1
    assert set(list(dicts[0])[:3]) == set(logits[0].topk(3).indices.tolist())


def test_prompt_log_probabilities() -> None:
    logits, tokens = random_logits(9, 2), torch.arange(9)
    got = token_logprobs(logits, tokens, 2)
    assert torch.allclose(got.chosen, logits.log_softmax(-1)[torch.arange(9), tokens], atol=1e-5)
    assert got.top_ids.shape == (9, 2) and bool((got.top[:, 0] >= got.top[:, 1]).all())


@pytest.mark.parametrize("fields", FEATURES.values(), ids=FEATURES)
def test_broken_logits_are_found_whatever_the_row_asks_for(fields: dict[str, Any]) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        logits = torch.zeros(3, VOCAB)
        logits[1, 33 if bad != -math.inf else slice(None)] = bad
        params = [SamplingParams(), SamplingParams(**fields), SamplingParams(temperature=1.0, **fields)]
        rows = RowParams.from_params(params, [0] * 3, eos_token_ids=EOS)
        sampled = sample(logits, rows, torch.zeros(3, dtype=torch.int64), history(3))
        errors = row_errors(sampled)
        assert list(errors) == [1] and "NaN or infinite logits for row 1" in str(errors[1])
        assert bool(((sampled.tokens >= 0) & (sampled.tokens < VOCAB)).all())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_every_token_forbidden_fails_alone(temperature: float) -> None:
    forbidden = SamplingParams(temperature=temperature, bad_token_ids=list(range(VOCAB)))
    rows = RowParams.from_params([SamplingParams(), forbidden], [0, 0])
    sampled = sample(random_logits(2, 0), rows, torch.zeros(2, dtype=torch.int64))
    errors = row_errors(sampled)
    assert list(errors) == [1] and "forbid every token" in str(errors[1])
    assert int(sampled.tokens[1]) < VOCAB


def test_a_callers_function_sees_its_row_and_its_failure_is_its_rows_alone() -> None:
    seen = []

    def watch(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        seen.append((ids.tolist(), logits.clone()))
        return torch.where(torch.arange(VOCAB) == 77, 1e4, logits)

    def broken(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        raise KeyError("two\nlines")

    functions: list[Any] = [watch, broken, lambda ids, x: x[:3], lambda ids, x: None]
    params = [SamplingParams(logit_bias={1: 2.0}, logits_processors=[f, watch]) for f in functions]
    rows = RowParams.from_params([*params, SamplingParams()], [0] * 5)
    assert rows.waits_for_host
    logits = random_logits(5, 0)
    sampled = sample(logits, rows, torch.zeros(5, dtype=torch.int64), history(5))
    assert int(sampled.tokens[0]) == 77 and int(sampled.tokens[4]) == int(logits[4].argmax())
    assert seen[0][0] == PROMPT + ANSWER and float(seen[0][1][1]) == pytest.approx(float(logits[0, 1]) + 2)
    messages = {row: str(e) for row, e in row_errors(sampled).items()}
    assert messages == {
        1: "logits_processors[0] raised KeyError: 'two\\nlines'",
        2: f"logits_processors[0] gave [3]; it must give the logits, [{VOCAB}]",
        3: f"logits_processors[0] gave NoneType; it must give the logits, [{VOCAB}]",
    }


def test_nothing_waits_for_the_device() -> None:
    """Meta tensors have no values: whatever looked at one would raise. So all of this can be in a CUDA graph."""
    params = [SamplingParams(**{k: v for k, v in f.items() if k != "logits_processors"}) for f in FEATURES.values()]
    hot = [SamplingParams(temperature=1.0, top_k=5, logprobs=3), SamplingParams(temperature=1.0, top_p=0.5, min_p=0.1)]
    batch = [*params, *hot]
    rows = RowParams.from_params(batch, [0] * len(batch), "meta", eos_token_ids=EOS, guided=[0, 3])
    assert not rows.waits_for_host
    state = SamplerState.empty(len(batch), 64, "meta")
    steps = torch.zeros(len(batch), dtype=torch.int64, device="meta")
    mask = torch.zeros(len(batch), 4, dtype=torch.int32, device="meta")
    sampled = sample(torch.zeros(len(batch), VOCAB, device="meta"), rows, steps, state, mask)
    state.append(sampled.tokens)
    state.reorder(steps)
    state.move_slot(3, 1)
    assert (
        sampled.tokens.shape == sampled.best.shape == sampled.allowed.shape == (len(batch),)
        and sampled.tokens.dtype == torch.int64
    )
    assert sampled.logprobs is not None and sampled.logprobs.top.shape == (1, 3)
