"""Beam search against transformers' `generate(num_beams=...)` on a tiny random model, and its properties."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from edgellm.runtime.beam import Answer, BeamState, _rows, advance, answers, copies
from edgellm.runtime.logits_processors import SamplerState
from edgellm.runtime.sampling import RowParams, process
from edgellm.runtime.sampling_params import SamplingParams

VOCAB = 40
EOS = [3, 17]
PROMPT = [5, 9, 21, 30]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are small; on a busy machine torch's threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> Any:
    """Random, but with a head sharp enough that beams differ, end and overtake each other."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(12)
    return model


def search(model: Any, prompts: list[list[int]], params: list[SamplingParams], max_tokens: list[int]) -> BeamState:
    """The loop of a runtime, with every row computed anew at each step. `history` stands for the KV cache."""
    groups, width = len(prompts), params[0].beam_width
    beams = BeamState.start(params, max_tokens, EOS)
    rows = RowParams.from_params([p for p in params for _ in range(width)], [0] * groups * width, eos_token_ids=EOS)
    history = SamplerState.empty(groups * width, 64)
    for row in range(groups * width):
        history.set_slot(row, prompts[row // width])
    for _ in range(max(max_tokens) + 1):
        ids = [history.tokens[row, : int(history.lengths[row])] for row in range(groups * width)]
        with torch.no_grad():
            logits = torch.stack([model(i[None]).logits[0, -1] for i in ids])
        scores, _ = process(logits.log_softmax(-1), rows, beams.steps(), history)
        beams, step = advance(beams, scores)
        if bool(step.finished.all()):
            return beams
        assert not bool((step.fault & ~step.finished).any())
        before = history.tokens.clone()
        sources = [source for source, _ in copies(step.parents.tolist())]
        targets = [target for _, target in copies(step.parents.tolist())]
        assert not set(sources) & set(targets) and len(set(targets)) == len(targets)
        copied = before.clone()
        for source, target in copies(step.parents.tolist()):  # one after the other, in place
            copied[target] = copied[source]
        history.reorder(step.parents)
        assert torch.equal(copied, history.tokens)
        history.append(step.tokens)
        for row in range(groups * width):
            if not bool(step.finished[row // width]):
                answer = history.tokens[row, len(prompts[row // width]) : int(history.lengths[row])]
                assert torch.equal(answer, beams.tokens[row // width, row % width, : answer.shape[0]])
    raise AssertionError("the search did not end")


def by_transformers(model: Any, prompt: list[int], p: SamplingParams, max_tokens: int) -> list[tuple[list[int], float]]:
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        num_beams=p.beam_width,
        num_return_sequences=p.n,
        do_sample=False,
        max_new_tokens=max_tokens,
        length_penalty=p.length_penalty,
        early_stopping=p.early_stopping,
        repetition_penalty=p.repetition_penalty,
        bad_words_ids=[list(s) for s in p.bad_sequences] or None,
        min_new_tokens=p.min_tokens or None,
        eos_token_id=EOS,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    results = []
    for sequence, score in zip(out.sequences[:, len(prompt) :].tolist(), out.sequences_scores.tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(sequence) if token in EOS), len(sequence))
        results.append((sequence[:end], score))
    return results


def check(found: list[Answer], expected: list[tuple[list[int], float]], params: SamplingParams) -> None:
    assert [a.token_ids for a in found] == [ids for ids, _ in expected]
    for answer, (ids, score) in zip(found, expected, strict=True):
        assert answer.score == pytest.approx(score, abs=1e-4)
        assert answer.cumulative_logprob == pytest.approx(score * len(ids) ** params.length_penalty, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("width", [2, 3, 5])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.5])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_answers_and_scores_are_those_of_transformers(
    model: Any, width: int, length_penalty: float, early_stopping: Any
) -> None:
    p = SamplingParams(beam_width=width, n=width, length_penalty=length_penalty, early_stopping=early_stopping)
    for prompt, max_tokens in (([5, 9, 21, 30], 12), ([1], 7), ([8, 8], 1), ([33, 2, 7], 16)):
        state = search(model, [prompt], [p], [max_tokens])
        check(answers(state, 0, p.n), by_transformers(model, prompt, p, max_tokens), p)


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.4},
        {"min_tokens": 6},
        {"bad_token_ids": [[1], [9, 4], [30, 21]]},
        {"repetition_penalty": 0.8, "min_tokens": 3, "bad_token_ids": [[12], [13, 13]], "early_stopping": True},
    ],
)
def test_processors_within_the_search_are_those_of_transformers(model: Any, fields: dict[str, Any]) -> None:
    p = SamplingParams(beam_width=4, n=4, **fields)
    state = search(model, [PROMPT], [p], [12])
    check(answers(state, 0, p.n), by_transformers(model, PROMPT, p, 12), p)


def test_groups_searched_together_are_as_alone(model: Any) -> None:
    params = [
        SamplingParams(beam_width=3, n=3),
        SamplingParams(beam_width=3, n=3, length_penalty=0.0, early_stopping=True),
        SamplingParams(beam_width=3, n=2, length_penalty=2.0, early_stopping="never"),
        SamplingParams(beam_width=3, n=1, stop_token_ids=[7, 8], ignore_eos=True),
    ]
    prompts, max_tokens = [[1], [5, 9, 21, 30], [33, 2, 7], [4, 4]], [7, 12, 16, 3]
    together = search(model, prompts, params, max_tokens)
    for group, p in enumerate(params):
        alone = search(model, [prompts[group]], [p], [max_tokens[group]])
        expected = answers(alone, 0, p.n)
        found = answers(together, group, p.n)
        assert [a.token_ids for a in found] == [a.token_ids for a in expected]
        assert [a.score for a in found] == pytest.approx([a.score for a in expected], abs=1e-5)
        assert len(found) == p.n


def test_one_beam_is_greedy(model: Any) -> None:
    p = SamplingParams(beam_width=1, ignore_eos=True)
    state = search(model, [PROMPT], [p], [10])
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(10):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert answers(state, 0, 1)[0].token_ids == ids[len(PROMPT) :]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 16).flatmap(lambda w: st.lists(st.integers(0, w - 1), min_size=w, max_size=w)))
def test_a_parent_that_goes_on_keeps_its_row(parents: list[int]) -> None:
    rows = _rows(torch.tensor([parents, parents]))
    assert torch.equal(rows[0], rows[1]) and sorted(rows[0].tolist()) == list(range(len(parents)))
    by_row = dict(zip(rows[0].tolist(), parents, strict=True))
    assert all(by_row[parent] == parent for parent in parents)
    assert len(copies([by_row[r] for r in range(len(parents))])) == len(parents) - len(set(parents))


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_broken_scores_are_reported_for_their_group(bad: float) -> None:
    state = BeamState.start([SamplingParams(beam_width=2)] * 2, [5, 5], EOS)
    scores = torch.zeros(4, VOCAB).log_softmax(-1)
    scores[2:] = bad
    _, step = advance(state, scores)
    assert step.fault.tolist() == [False, True]
    assert bool(((step.tokens >= 0) & (step.tokens < VOCAB)).all())


def test_nothing_waits_for_the_device() -> None:
    """Meta tensors have no values: whatever looked at one would raise."""
    state = BeamState.start([SamplingParams(beam_width=4)] * 2, [5, 5], EOS, "meta")
    state, step = advance(state, torch.zeros(8, VOCAB, device="meta"))
    assert step.parents.shape == state.steps().shape == (8,) and step.finished.shape == (2,)
