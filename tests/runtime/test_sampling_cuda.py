"""Sampling and beam search on a GPU: the results of the CPU, no wait for the device, and all in a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from edgellm.runtime.beam import BeamState, advance, answers
from edgellm.runtime.logits_processors import SamplerState
from edgellm.runtime.sampling import RowParams, SamplingParams, process, row_errors, sample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

VOCAB = 5000
STEPS = 30
PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.8, min_p=0.02),
    SamplingParams(temperature=1.4, top_p=0.7),
    SamplingParams(repetition_penalty=1.5, logit_bias={7: 3.0, 8: -100.0}),
    SamplingParams(temperature=0.9, frequency_penalty=0.7, presence_penalty=0.3, logprobs=4),
    SamplingParams(bad_token_ids=[1, [2, 3], [4, 5, 6]], min_tokens=20, stop_token_ids=[9]),
    SamplingParams(logprobs=0),
]
BATCH = len(PARAMS)
SEEDS = list(range(40, 40 + BATCH))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def rows_on(device: str) -> RowParams:
    return RowParams.from_params(PARAMS, SEEDS, device, eos_token_ids=[0], guided=[3])


def state_on(device: str) -> SamplerState:
    state = SamplerState.empty(BATCH, 128, device)
    for slot in range(BATCH):
        state.set_slot(slot, [slot + 1, 2, 4, 5], [3])
    return state


def script() -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of every step, and the bitmask."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(STEPS, BATCH, VOCAB, generator=generator) * 3
    mask = torch.randint(-(2**31), 2**31 - 1, (BATCH, -(-VOCAB // 32)), generator=generator, dtype=torch.int64)
    return logits, mask.to(torch.int32)


def run(device: str) -> tuple[torch.Tensor, list[Any], torch.Tensor]:
    """Tokens [steps, B], log probabilities, and the last step's processed logits, launched one by one."""
    logits, mask = (x.to(device) for x in script())
    rows, state, reports, tokens = rows_on(device), state_on(device), [], []
    counts = torch.arange(STEPS, device=device)[:, None].expand(-1, BATCH)
    for step in range(STEPS):
        sampled = sample(logits[step], rows, counts[step], state, mask)
        state.append(sampled.tokens)
        tokens.append(sampled.tokens)
        reports.append(sampled.logprobs)
        assert device != "cpu" or not row_errors(sampled)
    processed, _ = process(logits[-1], rows, counts[-1], state, mask)
    return torch.stack(tokens).cpu(), reports, processed.cpu()


def test_same_as_on_the_cpu() -> None:
    tokens, reports, processed = run("cuda")
    expected_tokens, expected_reports, expected_processed = run("cpu")
    assert torch.equal(tokens, expected_tokens)
    assert torch.allclose(processed, expected_processed, atol=1e-5)
    for report, expected in zip(reports, expected_reports, strict=True):
        assert torch.allclose(report.chosen.cpu(), expected.chosen, atol=1e-4)
        assert torch.equal(report.rank.cpu(), expected.rank)
        assert torch.allclose(report.top.cpu(), expected.top, atol=1e-4)


def test_nothing_waits_for_the_device_not_even_a_joining_row() -> None:
    rows, state = rows_on("cuda"), state_on("cuda")
    logits, mask = (x.cuda() for x in script())
    steps = torch.zeros(BATCH, dtype=torch.int64, device="cuda")
    sample(logits[0], rows, steps, state, mask)  # first use may wait
    with no_waiting():
        rows, state = rows_on("cuda"), state_on("cuda")
        sampled = sample(logits[0], rows, steps, state, mask)
        state.append(sampled.tokens)
        state.move_slot(3, 1)
        beams = BeamState.start([SamplingParams(beam_width=4)], [9], [0], "cuda")
        _, step = advance(beams, logits[0, :4].log_softmax(-1))
        state.view(0, 4).reorder(step.parents)


def test_in_a_cuda_graph_as_launched_one_by_one() -> None:
    logits, mask = (x.cuda() for x in script())
    rows, state = rows_on("cuda"), state_on("cuda")
    now, steps = torch.zeros_like(logits[0]), torch.zeros(BATCH, dtype=torch.int64, device="cuda")

    def step() -> torch.Tensor:
        sampled = sample(now, rows, steps, state, mask)
        state.append(sampled.tokens)
        steps.add_(1)
        return sampled.tokens

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = step()
    for slot in range(BATCH):
        state.set_slot(slot, [slot + 1, 2, 4, 5], [3])
    steps.zero_()
    got = []
    for number in range(STEPS):
        now.copy_(logits[number])
        graph.replay()
        got.append(tokens.cpu())
    assert torch.equal(torch.stack(got), run("cuda")[0])


@pytest.mark.parametrize("early_stopping", [False, True])
def test_beam_search_as_on_the_cpu(early_stopping: bool) -> None:
    params = [SamplingParams(beam_width=5, n=5, early_stopping=early_stopping), SamplingParams(beam_width=5, n=5)]
    found = {}
    for device in ("cpu", "cuda"):
        state = BeamState.start(params, [12, 9], [0, 1], device)
        generator = torch.Generator().manual_seed(1)
        for _ in range(12):
            scores = torch.randn(10, 50, generator=generator).to(device)
            state, step = advance(state, scores.log_softmax(-1))
        assert bool(step.finished.all())
        found[device] = [a.token_ids for group in (0, 1) for a in answers(state, group, 5)]
    assert found["cpu"] == found["cuda"]
