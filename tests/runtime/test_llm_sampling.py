"""Sampling features through the engine loop: penalties, bans and log probabilities, alone and in a batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgellm import LLM, SamplingParams
from edgellm.errors import RequestError

PROMPT = [40, 41, 42, 43]


@pytest.fixture(scope="module")
def llm(tiny_engine: Path) -> Iterator[LLM]:
    with LLM(tiny_engine, num_threads=2) as llm:
        yield llm


def test_penalties_and_bans_change_the_answer_as_they_say(llm: LLM) -> None:
    plain = llm.generate(PROMPT, SamplingParams(max_tokens=30, ignore_eos=True)).outputs[0].token_ids
    once = llm.generate(
        PROMPT, SamplingParams(max_tokens=30, ignore_eos=True, frequency_penalty=2.0, presence_penalty=2.0)
    )
    assert len(set(once.outputs[0].token_ids)) > len(set(plain))
    banned = plain[0]
    without = llm.generate(PROMPT, SamplingParams(max_tokens=30, ignore_eos=True, bad_token_ids=[[banned]]))
    assert banned not in without.outputs[0].token_ids
    forced = llm.generate(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True, logit_bias={777: 100.0}))
    assert forced.outputs[0].token_ids == [777] * 3


def test_history_survives_a_changing_batch(llm: LLM) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True, repetition_penalty=1.3, temperature=0.9, seed=5)
    alone = llm.generate(PROMPT, params).outputs[0].token_ids
    others = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (3, 11, 19, 27)]
    together = llm.generate([[50 + i] * 9 for i in range(4)] + [PROMPT], [*others, params])
    assert together[-1].outputs[0].token_ids == alone


def test_logprobs(llm: LLM) -> None:
    answer = llm.generate(PROMPT, SamplingParams(max_tokens=6, ignore_eos=True, logprobs=3)).outputs[0]
    assert answer.logprobs is not None
    assert answer.cumulative_logprob is not None
    assert len(answer.logprobs) == 6
    for token, places in zip(answer.token_ids, answer.logprobs, strict=True):
        assert len(places) == 3
        assert places[token].rank == 1, "greedy takes the most likely"
        assert all(p.logprob <= 0 for p in places.values())
    assert answer.cumulative_logprob == pytest.approx(
        sum(p[t].logprob for p, t in zip(answer.logprobs, answer.token_ids, strict=True))
    )


@pytest.mark.parametrize(
    "params", [SamplingParams(n=2, temperature=1.0), SamplingParams(beam_width=2), SamplingParams(prompt_logprobs=1)]
)
def test_what_is_not_supported_is_refused(llm: LLM, params: SamplingParams) -> None:
    with pytest.raises(RequestError, match="is not supported by the runtime yet"):
        llm.generate(PROMPT, params)


def test_token_outside_the_vocabulary_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="1000000"):
        llm.generate(PROMPT, SamplingParams(logit_bias={1000000: 1.0}))
