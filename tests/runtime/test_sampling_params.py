"""The checks on sampling parameters, their normal forms, and what becomes of `bad` texts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.errors import RequestError
from edgellm.runtime.sampling_params import (
    MAX_BAD_WORDS,
    MAX_BIASED_TOKENS,
    MAX_SEED,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    MAX_WORD_BYTES,
    MAX_WORD_TOKENS,
    SamplingParams,
    answer_seed,
)

HOT = {"temperature": 1.0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_tokens": -1}, "min_tokens is -1; it must be a whole number of at least 0"),
        ({"min_tokens": 300}, "min_tokens is 300; it must be a whole number from 0 to max_tokens, 256"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be a number, above 0 and at most 100"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf; it must be a number, above 0 and at most 100"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5; it must be a number, -2 to 2"),
        ({"frequency_penalty": "x"}, "frequency_penalty is 'x'; it must be a number, -2 to 2"),
        ({"logit_bias": 3}, "logit_bias is 3; it must be a mapping of token ids to numbers"),
        ({"logit_bias": [1, 2]}, "logit_bias is [1, 2]; it must be a mapping of token ids to numbers"),
        ({"logit_bias": {"3": 1.0}}, "logit_bias holds '3'; a token id is a whole number of at least 0"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias holds -1; a token id is a whole number of at least 0"),
        ({"logit_bias": {True: 1.0}}, "logit_bias holds True; a token id is a whole number of at least 0"),
        ({"logit_bias": {3: 101}}, "logit_bias[3] is 101; it must be a number, -100 to 100"),
        ({"logit_bias": {3: math.nan}}, "logit_bias[3] is nan; it must be a number, -100 to 100"),
        ({"logit_bias": dict.fromkeys(range(301), 1.0)}, "logit_bias has 301 tokens; it must have at most 300"),
        ({"stop": ["x"] * 17}, "stop has 17 strings; it must have at most 16"),
        ({"stop": ["x", "é" * 600]}, "stop[1] has 1200 bytes; it must have at most 1024"),
        ({"stop": "\ud800"}, "stop[0] is '\\ud800'; it must be text that UTF-8 can hold"),
        ({"stop_token_ids": [0] * 257}, "stop_token_ids has 257 token ids; it must have at most 256"),
        ({"bad": ["x", ""]}, "bad is ['x', '']; it must be a string or a list of strings, none of them empty"),
        ({"bad": ["x"] * 301}, "bad has 301 strings; it must have at most 300"),
        ({"bad": ["x" * 1025]}, "bad[0] has 1025 bytes; it must have at most 1024"),
        ({"bad_token_ids": 5}, "bad_token_ids is 5; it must be a list of token ids or of lists of token ids"),
        ({"bad_token_ids": [[]]}, "bad_token_ids[0] is []; it must hold at least one token id"),
        ({"bad_token_ids": [1, [2, -3]]}, "bad_token_ids[1] is [2, -3]; it must be a list of token ids"),
        ({"bad_token_ids": [True]}, "bad_token_ids[0] is [True]; it must be a list of token ids"),
        ({"bad_token_ids": [[1] * 65]}, "bad_token_ids[0] has 65 token ids; it must have at most 64"),
        ({"bad_token_ids": [1] * 1001}, "bad_token_ids has 1001 sequences; it must have at most 1000"),
        ({"n": 0}, "n is 0; it must be a whole number from 1 to 16"),
        ({"n": 17, **HOT}, "n is 17; it must be a whole number from 1 to 16"),
        ({"n": 2}, "n is 2; it must be 1 where temperature is 0"),
        ({"best_of": 3}, "best_of is 3; it must be 1 where temperature is 0"),
        ({"n": 3, "best_of": 2, **HOT}, "best_of is 2; it must be a whole number from 3 to 16"),
        ({"beam_width": 0}, "beam_width is 0; it must be a whole number from 1 to 16"),
        ({"beam_width": 4, **HOT}, "beam_width is 4; it must be 1 where temperature is 1"),
        ({"beam_width": 2, "n": 3}, "n is 3; it must be a whole number from 1 to beam_width, 2"),
        ({"beam_width": 2, "best_of": 2}, "best_of is 2; it must be left out where beam_width is above 1"),
        ({"beam_width": 2, "stop": "x"}, "stop is ('x',); it must be left out where beam_width is above 1"),
        ({"length_penalty": 11}, "length_penalty is 11; it must be a number, -10 to 10"),
        ({"early_stopping": "maybe"}, "early_stopping is 'maybe'; it must be true, false or \"never\""),
        ({"early_stopping": 1}, 'early_stopping is 1; it must be true, false or "never"'),
        ({"logprobs": 21}, "logprobs is 21; it must be a whole number from 0 to 20"),
        ({"logprobs": True}, "logprobs is True; it must be a whole number from 0 to 20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1; it must be a whole number from 0 to 20"),
        ({"logits_processors": [3]}, "logits_processors is [3]; it must be a list of functions"),
        ({"logits_processors": [len] * 17}, "logits_processors has 17 functions; it must have at most 16"),
    ],
)
def test_bad_value_is_refused_with_its_name_value_and_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**fields)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_the_limits_themselves_are_accepted() -> None:
    params = SamplingParams(
        max_tokens=7,
        min_tokens=7,
        temperature=100.0,
        repetition_penalty=100.0,
        presence_penalty=-2.0,
        frequency_penalty=2,
        logit_bias=dict.fromkeys(range(MAX_BIASED_TOKENS), -100),
        stop=["x" * MAX_WORD_BYTES] * MAX_STOP_STRINGS,
        stop_token_ids=[1] * MAX_STOP_TOKENS,
        bad=["x"] * MAX_BAD_WORDS,
        bad_token_ids=[[1] * MAX_WORD_TOKENS],
        n=16,
        best_of=16,
        logprobs=20,
        prompt_logprobs=0,
    )
    assert params.num_answers == 16 and params.needs_logprobs and len(params.biases) == MAX_BIASED_TOKENS
    assert SamplingParams(beam_width=16, n=16, early_stopping="never", length_penalty=-10).num_answers == 16


def test_normal_forms_survive_replace_and_can_be_hashed() -> None:
    params = SamplingParams(logit_bias={7: 1, 3: -2.5}, bad_token_ids=[4, [5, 6]], bad="no", logits_processors=[max])
    assert params.logit_bias == ((3, -2.5), (7, 1.0)) == params.biases
    assert params.bad_token_ids == ((4,), (5, 6)) == params.bad_sequences
    assert params.bad == ("no",) and params.logits_processors == (max,)
    again = dataclasses.replace(params, seed=3)
    assert dataclasses.replace(again, seed=None) == params and hash(again) != hash(params)


def test_defaults_ask_for_nothing_that_costs() -> None:
    params = SamplingParams()
    assert not params.needs_history and not params.needs_logprobs and params.num_answers == 1
    assert params.biases == () == params.bad_sequences
    assert not SamplingParams(bad_token_ids=[3], logit_bias={1: 2.0}, min_tokens=3).needs_history
    for fields in (
        {"repetition_penalty": 1.1},
        {"presence_penalty": 1},
        {"frequency_penalty": 1},
        {"bad_token_ids": [[1, 2]]},
    ):
        assert SamplingParams(**fields).needs_history  # type: ignore[arg-type]
    assert SamplingParams(n=2, best_of=3, temperature=1.0).needs_logprobs
    assert not SamplingParams(n=2, temperature=1.0).needs_logprobs


def test_bad_texts_become_ids_with_and_without_a_space_before() -> None:
    def encode(text: str) -> list[int]:
        return [ord(c) for c in text]

    params = SamplingParams(bad=["ab", " c"], bad_token_ids=[[9]]).resolved(encode)
    assert params.bad_sequences == ((9,), (97, 98), (32, 97, 98), (32, 99))
    assert params.bad == () and params.resolved(None) is params
    with pytest.raises(RequestError, match="without a tokenizer"):
        SamplingParams(bad="ab").resolved(None)
    with pytest.raises(RequestError, match="65 tokens; a text must have 1 to 64"):
        SamplingParams(bad="a" * 65).resolved(encode)
    with pytest.raises(RequestError, match="0 tokens"):
        SamplingParams(bad="ab").resolved(lambda text: [])


@pytest.mark.parametrize(
    "fields", [{"stop_token_ids": [2, 50]}, {"logit_bias": {50: 1.0}}, {"bad_token_ids": [[1, 50]]}]
)
def test_a_token_id_beyond_the_vocabulary_is_refused(fields: dict[str, Any]) -> None:
    params = SamplingParams(**fields)
    params.check_vocabulary(51)
    with pytest.raises(
        RequestError, match=f"{next(iter(fields))} holds token id 50; the model's vocabulary has 0 to 49"
    ):
        params.check_vocabulary(50)


@given(st.integers(0, MAX_SEED))
def test_every_answer_has_its_own_valid_seed(seed: int) -> None:
    seeds = [answer_seed(seed, i) for i in range(16)]
    assert seeds[0] == seed and len(set(seeds)) == 16
    for s in seeds:
        SamplingParams(seed=s)
