"""Sampling parameters, filters against transformers' warpers, the drawn distribution, and batch independence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from edgellm.errors import EngineError, RequestError
from edgellm.runtime import draw as drawing
from edgellm.runtime.draw import draw, mix64, uniform
from edgellm.runtime.sampling import RowParams, SamplingParams, row_errors
from edgellm.runtime.sampling import sample as sample_batch

VOCAB = 500
MIXED = [
    SamplingParams(temperature=0.7, top_k=20, top_p=0.8),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=1.5, top_p=0.3),
    SamplingParams(temperature=0.2, min_p=0.1),
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=2.0, top_k=400, top_p=0.95, min_p=0.01),
    SamplingParams(temperature=1.0, top_k=10**6),
    SamplingParams(temperature=3.0, top_p=1e-9),
    SamplingParams(temperature=1.0, min_p=1.0),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are small; on a busy machine torch's threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows_of(params: list[SamplingParams], seeds: list[int] | None = None) -> RowParams:
    return RowParams.from_params(params, seeds or list(range(len(params))))


def sample(logits: torch.Tensor, rows: RowParams, steps: torch.Tensor) -> torch.Tensor:
    """The tokens; raises what went wrong."""
    sampled = sample_batch(logits, rows, steps)
    for error in row_errors(sampled).values():
        raise error
    return sampled.tokens


def filter_logits(logits: torch.Tensor, rows: RowParams) -> torch.Tensor:
    assert rows.draws is not None
    return drawing.filter_logits(logits, rows.draws)


def by_transformers(logits_1V: torch.Tensor, p: SamplingParams) -> torch.Tensor:
    """Probabilities [1, V] after transformers' warpers in the order of its `generate`."""
    warpers: list[Callable[[Any, torch.Tensor], torch.Tensor]] = [TemperatureLogitsWarper(p.temperature)]
    if p.top_k:
        warpers.append(TopKLogitsWarper(p.top_k))
    if p.top_p < 1:
        warpers.append(TopPLogitsWarper(p.top_p))
    if p.min_p:
        warpers.append(MinPLogitsWarper(p.min_p))
    for warper in warpers:
        logits_1V = warper(None, logits_1V)
    return logits_1V.softmax(-1)


@pytest.mark.parametrize("seed", range(20))
def test_filters_equal_transformers_warpers(seed: int) -> None:
    logits = torch.randn(len(MIXED), VOCAB, generator=torch.Generator().manual_seed(seed)) * 4
    got = filter_logits(logits, rows_of(MIXED)).softmax(-1)
    for row, params in enumerate(MIXED):
        expected = by_transformers(logits[row : row + 1], params)[0]
        assert torch.equal(got[row] > 0, expected > 0), params
        assert torch.allclose(got[row], expected, atol=1e-6), params


def test_equal_logits_stay_or_go_together() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0, -math.inf]])
    for params in (SamplingParams(temperature=1.0, top_k=2), SamplingParams(temperature=1.0, top_p=0.6)):
        assert torch.isfinite(filter_logits(logits, rows_of([params])))[0].tolist() == [True] * 4 + [False] * 2


def test_tiny_temperature_neither_overflows_nor_changes_the_winner() -> None:
    logits = torch.randn(3, VOCAB) * 1e4
    rows = rows_of([SamplingParams(temperature=t, top_p=0.9) for t in (1e-5, 1e-4, 1e-3)])
    assert torch.equal(sample(logits, rows, torch.zeros(3, dtype=torch.int64)), logits.argmax(-1))


def test_greedy_rows_are_argmax_and_ties_go_to_the_first() -> None:
    logits = torch.randn(4, VOCAB)
    logits[2, [7, 300]] = 50.0
    greedy = [SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=1e-6), SamplingParams()]
    got = sample(logits, rows_of(greedy), torch.zeros(4, dtype=torch.int64))
    assert got.dtype == torch.int64
    assert got[[0, 2, 3]].tolist() == [int(logits[0].argmax()), 7, int(logits[3].argmax())]
    assert torch.equal(
        sample(logits, rows_of([SamplingParams()] * 4), torch.zeros(4, dtype=torch.int64)), logits.argmax(-1)
    )


@pytest.mark.parametrize("params", [MIXED[0], MIXED[1], MIXED[2], MIXED[5]])
def test_drawn_distribution_by_chi_square(params: SamplingParams) -> None:
    """20,000 draws of one row over successive steps; the bound is 5 standard deviations of the statistic."""
    draws, vocab = 20_000, 40
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(3)) * 2
    probs = filter_logits(logits, rows_of([params])).double().softmax(-1)[0]
    many = rows_of([params] * 1000, [1234] * 1000)
    counts = torch.zeros(vocab, dtype=torch.float64)
    for start in range(0, draws, 1000):
        tokens = sample(logits.expand(1000, -1), many, torch.arange(start, start + 1000))
        counts += torch.bincount(tokens, minlength=vocab)
    assert counts[probs == 0].sum() == 0
    expected = probs * draws
    common = expected >= 5
    rare = (counts[~common].sum(), expected[~common].sum())
    statistic = float((((counts - expected) ** 2)[common] / expected[common]).sum())
    freedom = int(common.sum()) - 1
    if rare[1] >= 5:
        statistic += float((rare[0] - rare[1]) ** 2 / rare[1])
        freedom += 1
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * max(freedom, 1)), (statistic, freedom)


def test_a_token_of_probability_0_is_never_drawn() -> None:
    log_probs = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    for number, token in ((0.0, 1), (0.4999, 1), (0.5, 3), (1 - 2.0**-53, 3)):
        assert draw(log_probs, torch.tensor([number], dtype=torch.float64)).tolist() == [token]


def test_uniform_is_uniform_and_uncorrelated_over_seeds_and_steps() -> None:
    seeds = torch.arange(400)[:, None].expand(-1, 500)
    steps = torch.arange(500)[None].expand(400, -1)
    u = uniform(mix64(seeds.reshape(-1)), steps.reshape(-1)).reshape(400, 500)
    assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1 and u.unique().numel() == u.numel()
    counts = torch.histc(u, bins=100, min=0, max=1)
    assert abs(float(((counts - 2000) ** 2 / 2000).sum()) - 99) < 5 * math.sqrt(2 * 99)
    for shifted, straight in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1])):
        pair = torch.corrcoef(torch.stack([shifted.reshape(-1), straight.reshape(-1)]))
        assert abs(float(pair[0, 1])) < 5 / math.sqrt(shifted.numel())


def test_same_seed_gives_same_tokens_whatever_else_is_in_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    script = torch.randn(30, VOCAB, generator=generator) * 3  # this request's logits, one row per step
    alone_rows = rows_of([MIXED[0]], [99])
    alone = [int(sample(script[i : i + 1], alone_rows, torch.tensor([i]))) for i in range(30)]
    for others in (1, 3, 8):
        place = others // 2
        params = [MIXED[i % len(MIXED)] if i % 3 else SamplingParams() for i in range(others)]
        params.insert(place, MIXED[0])
        seeds = list(range(others))
        seeds.insert(place, 99)
        rows = rows_of(params, seeds)
        got = []
        for i in range(30):
            logits = torch.randn(others + 1, VOCAB, generator=generator)
            logits[place] = script[i]
            steps = torch.full((others + 1,), 1000 + i)
            steps[place] = i
            got.append(int(sample(logits, rows, steps)[place]))
        assert got == alone


def test_other_seed_gives_other_tokens() -> None:
    logits = torch.zeros(2, VOCAB).expand(2, -1)
    rows = rows_of([SamplingParams(temperature=1.0)] * 2, [1, 2])
    tokens = torch.stack([sample(logits, rows, torch.tensor([i, i])) for i in range(20)])
    assert (tokens[:, 0] != tokens[:, 1]).sum() > 15
    assert tokens[:, 0].unique().numel() > 15


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_an_engine_error_that_names_the_row(bad: float, temperature: float) -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1, 5] = bad
    with pytest.raises(EngineError, match="row 1"):
        sample(logits, rows_of([SamplingParams(temperature=temperature)] * 3), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", 1.5, "at least 1"),
        ("max_tokens", True, "at least 1"),
        ("temperature", -0.1, "0 (greedy) to 100"),
        ("temperature", math.nan, "0 (greedy) to 100"),
        ("temperature", math.inf, "0 (greedy) to 100"),
        ("temperature", "hot", "0 (greedy) to 100"),
        ("temperature", None, "0 (greedy) to 100"),
        ("top_k", -1, "from 0 to"),
        ("top_k", 2.0, "from 0 to"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.01, "above 0 and at most 1"),
        ("top_p", math.nan, "above 0 and at most 1"),
        ("min_p", -0.5, "0 to 1"),
        ("min_p", 1.5, "0 to 1"),
        ("seed", -1, "from 0 to"),
        ("seed", 2**63, "from 0 to"),
        ("seed", "x", "from 0 to"),
        ("stop", "", "none of them empty"),
        ("stop", ["a", ""], "none of them empty"),
        ("stop", [1], "none of them empty"),
        ("stop", 5, "none of them empty"),
        ("stop_token_ids", [-1], "at least 0"),
        ("stop_token_ids", 3, "at least 0"),
        ("stop_token_ids", ["a"], "at least 0"),
        ("ignore_eos", 1, "true or false"),
    ],
)
def test_bad_parameter_is_refused_with_its_name_value_and_range(field: str, value: object, part: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith(f"{field} is {value!r}; ") and part in message and "\n" not in message


def test_defaults_and_normal_forms() -> None:
    params = SamplingParams()
    assert params.is_greedy and params.max_tokens == 256 and params.stop_strings == () and params.stop_token_ids == ()
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[3]).stop_token_ids == (3,)
    assert SamplingParams(temperature=1, seed=7).resolved_seed() == 7
    assert len({params.resolved_seed() for _ in range(10)}) == 10
    assert dataclasses.replace(SamplingParams(stop="x"), max_tokens=3).stop == ("x",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.max_tokens = 3  # type: ignore[misc]


def test_a_row_without_top_k_is_not_filtered_by_a_neighbours() -> None:
    logits = torch.randn(3, VOCAB)
    params = [
        SamplingParams(temperature=1.0, top_k=5),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=2.0, min_p=1e-9),
    ]
    assert torch.isfinite(filter_logits(logits, rows_of(params))).sum(dim=-1).tolist() == [5, VOCAB, VOCAB]


@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
def test_filters_of_a_large_vocabulary(scale: float) -> None:
    """Peaked rows are known from their largest few logits, flat ones are not; together and alone they are the same."""
    vocab = 20_000
    logits = torch.randn(len(MIXED), vocab, generator=torch.Generator().manual_seed(1)) * scale
    together = filter_logits(logits, rows_of(MIXED))
    for row, params in enumerate(MIXED):
        alone = filter_logits(logits[row : row + 1], rows_of([params]))[0]
        assert torch.equal(alone, together[row])
        assert torch.equal(torch.isfinite(alone), by_transformers(logits[row : row + 1], params)[0] > 0), params


@pytest.mark.parametrize("vocab", [1, 5, 1023, 1024, 1025, 5000])
def test_draw_is_the_inverse_cdf(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    log_probs = torch.randn(200, vocab, generator=generator) * 3
    log_probs[torch.rand(200, vocab, generator=generator) < 0.6] = -math.inf
    log_probs[:, vocab // 2] = 0.0
    numbers = torch.rand(200, generator=generator, dtype=torch.float64)
    numbers[:2] = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    tokens = draw(log_probs, numbers)
    assert torch.equal(drawing._draw_by_kernels(log_probs, numbers), tokens)  # the form used on a GPU
    cdf = log_probs.double().softmax(-1).cumsum(-1)
    rows = torch.arange(200)
    assert bool(torch.isfinite(log_probs[rows, tokens]).all())
    assert bool((cdf[rows, tokens] >= numbers - 1e-6).all())
    assert bool((cdf[rows, tokens] - log_probs.double().softmax(-1)[rows, tokens] <= numbers + 1e-6).all())
