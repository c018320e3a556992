"""The LLM on the tiny engine: batched, streamed, cancelled, refused, and alive after failures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgellm import LLM, EdgeLLMError, Increment, SamplingParams
from edgellm.errors import EngineError, QueueFullError, RequestError


@pytest.fixture(scope="module")
def llm(tiny_engine: Path) -> Iterator[LLM]:
    with LLM(tiny_engine, num_threads=2) as llm:
        yield llm


def picture(seed: int, height: int = 256, width: int = 320) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def ask(question: str, *images: Any) -> list[dict[str, Any]]:
    content = [*({"type": "image", "image": i} for i in images), {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


PROMPTS = [
    ask("What is there?", picture(1)),
    ask("Hello."),
    ask("Compare.", picture(2), picture(3, 128, 96)),
    ask("How many?", picture(4, 64, 64)),
    ask("Where is the red circle?", picture(5)),
    "raw text",
    [5, 6, 7],
]
LONG = SamplingParams(max_tokens=40, ignore_eos=True)


def test_every_prompt_form_answers_as_alone_when_batched(llm: LLM) -> None:
    alone = [llm.generate(p, LONG).outputs[0].token_ids for p in PROMPTS]
    together = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, LONG)]
    assert together == alone
    assert len({tuple(ids) for ids in alone}) > 1


def test_requests_of_different_length_leave_and_join(llm: LLM) -> None:
    lengths = [3, 31, 1, 12, 40, 7, 2, 25]
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths]
    prompts = [PROMPTS[i % 5] for i in range(len(lengths))]
    outputs = llm.generate(prompts, params)
    for output, prompt, n in zip(outputs, prompts, lengths, strict=True):
        assert output.outputs[0].token_ids == llm.generate(prompt, LONG).outputs[0].token_ids[:n]
        assert output.outputs[0].finish_reason == "length"
        assert output.usage.completion_tokens == n


def test_seeded_sampling_does_not_depend_on_the_batch(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.5, seed=3, ignore_eos=True)
    alone = llm.generate(PROMPTS[1], params).outputs[0].token_ids
    others = [SamplingParams(max_tokens=30, temperature=1.0, ignore_eos=True)] * 3
    batch = llm.generate([PROMPTS[0], PROMPTS[2], PROMPTS[3], PROMPTS[1]], [*others, params])
    assert batch[3].outputs[0].token_ids == alone
    assert alone != llm.generate(PROMPTS[1], LONG).outputs[0].token_ids[:20]


def test_streaming_forms_agree(llm: LLM) -> None:
    seen: list[Increment] = []
    handle = llm.generate_async(PROMPTS[0], LONG, on_increment=seen.append, request_id="mine")
    streamed = list(handle)
    output = handle.result(1)
    assert streamed == seen
    assert [i.seq for i in streamed] == list(range(len(streamed)))
    assert "".join(i.text for i in streamed) == output.text
    assert [t for i in streamed for t in i.token_ids] == output.outputs[0].token_ids
    assert [i.finished for i in streamed] == [False] * (len(streamed) - 1) + [True]
    assert {i.request_id for i in streamed} == {"mine"}

    async def follow() -> tuple[list[Increment], str]:
        again = llm.generate_async(PROMPTS[0], LONG)
        increments = [i async for i in again]
        return increments, (await again.aresult()).text

    increments, text = asyncio.run(follow())
    assert text == output.text == "".join(i.text for i in increments)


def test_stop_string_and_stop_token(llm: LLM) -> None:
    free = llm.generate(PROMPTS[1], LONG)
    token = free.outputs[0].token_ids[4]
    index = free.outputs[0].token_ids.index(token)
    stopped = llm.generate(PROMPTS[1], SamplingParams(max_tokens=40, ignore_eos=True, stop_token_ids=[token]))
    assert stopped.outputs[0].token_ids == free.outputs[0].token_ids[:index]
    assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", token)
    word = free.text[3:6]
    stopped = llm.generate(PROMPTS[1], SamplingParams(max_tokens=40, ignore_eos=True, stop=word))
    assert stopped.text == free.text[: free.text.index(word)]
    assert stopped.outputs[0].stop_reason == word


@pytest.mark.parametrize("after", [0, 1, 5])
def test_cancel_returns_the_text_so_far(llm: LLM, after: int) -> None:
    handle = llm.generate_async(PROMPTS[0], SamplingParams(max_tokens=1000, ignore_eos=True))
    for _ in zip(range(after), handle, strict=False):
        pass
    handle.cancel()
    output = handle.result(10)
    assert output.outputs[0].finish_reason == "cancelled"
    assert after <= output.usage.completion_tokens < 1000
    assert "".join(i.text for i in handle) == output.text
    handle.cancel()


def test_cancel_while_queued(tiny_engine: Path) -> None:
    with LLM(tiny_engine, max_queue=8) as llm:
        blockers = [llm.generate_async(p, SamplingParams(max_tokens=600, ignore_eos=True)) for p in PROMPTS[:4]]
        queued = llm.generate_async(PROMPTS[4], LONG)
        queued.cancel()
        assert queued.result(10).outputs[0].finish_reason == "cancelled"
        for handle in blockers:
            handle.cancel()
        assert llm.generate(PROMPTS[1], LONG).usage.completion_tokens == 40


def test_full_queue_refuses_and_close_ends_everything(tiny_engine: Path) -> None:
    before = threading.active_count()
    with LLM(tiny_engine, max_queue=2) as llm:
        handles, refusals = [], set()
        for _ in range(20):
            try:
                handles.append(llm.generate_async(PROMPTS[0], SamplingParams(max_tokens=1000, ignore_eos=True)))
            except QueueFullError as e:
                refusals.add(str(e))
    assert len(refusals) == 1
    assert "the queue is full (2 requests waiting)" in refusals.pop()
    assert {h.result(1).outputs[0].finish_reason for h in handles} == {"cancelled"}
    with pytest.raises(EngineError, match="has been closed"):
        llm.generate_async(PROMPTS[0])
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([], "empty"),
        ([10**6], "token id 1000000"),
        ("word " * 5000, r"the prompt has \d+ tokens, the engine takes 1024"),
        (ask("<|image_pad|>"), "image"),
        ([{"role": "robot", "content": "hi"}], "role"),
        (ask("?", np.zeros((0, 0, 3), np.uint8)), r"messages\[0\]\.content\[0\]"),
        (ask("?", np.zeros((20_000, 20_000, 3), np.uint8)), "20000"),
        (ask("?", np.zeros((64, 64), np.float32)), r"messages\[0\]\.content\[0\]"),
        (ask("?", "no/such.png"), "no/such.png"),
        (ask("?", *[picture(i) for i in range(14)]), r"tokens \(\d+ of images\), the engine takes 1024"),
    ],
)
def test_bad_prompt_is_one_line_and_harms_nobody(llm: LLM, prompt: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        llm.generate_async(prompt)
    assert "\n" not in str(caught.value)
    assert llm.generate(PROMPTS[6], SamplingParams(max_tokens=2, ignore_eos=True)).usage.completion_tokens == 2


def test_a_failing_step_fails_only_its_request(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill = llm._runner.prefill

    def broken(slot: int, request: Any, features: Any) -> torch.Tensor:
        if request.request_id == "doomed":
            raise FloatingPointError("cosmic ray")
        return prefill(slot, request, features)

    monkeypatch.setattr(llm._runner, "prefill", broken)
    running = llm.generate_async(PROMPTS[0], SamplingParams(max_tokens=200, ignore_eos=True))
    doomed = llm.generate_async(PROMPTS[1], request_id="doomed")
    with pytest.raises(EngineError, match="FloatingPointError: cosmic ray"):
        doomed.result(10)
    with pytest.raises(EdgeLLMError):
        list(doomed)
    assert running.result(30).usage.completion_tokens == 200


def test_a_raising_callback_harms_nobody(llm: LLM) -> None:
    calls = []

    def broken(increment: Increment) -> None:
        calls.append(increment)
        raise ValueError("callback")

    careless = llm.generate_async(PROMPTS[0], LONG, on_increment=broken)
    other = llm.generate_async(PROMPTS[1], LONG)
    assert careless.result(30).usage.completion_tokens == other.result(30).usage.completion_tokens == 40
    assert len(calls) == 1


def test_capacity_bounds_the_answer(llm: LLM) -> None:
    prompt = [7] * 1000
    output = llm.generate(prompt, SamplingParams(max_tokens=5000, ignore_eos=True))
    assert output.usage.completion_tokens == llm.config.limits.max_kv_cache_capacity - 1000
    assert output.outputs[0].finish_reason == "length"


def test_timing_adds_up(llm: LLM) -> None:
    timing = llm.generate(PROMPTS[0], LONG).timing
    assert timing.ttft_s == pytest.approx(timing.queue_s + timing.vision_s + timing.prefill_s, abs=1e-3)
    assert timing.vision_s > 0
    assert timing.tokens_per_s == pytest.approx(39 / timing.decode_s)


def test_metrics_and_timeline_follow_the_requests(tiny_engine: Path) -> None:
    with LLM(tiny_engine, num_threads=2, max_queue=2, profile=True) as llm:
        outputs = llm.generate([PROMPTS[0], PROMPTS[1], PROMPTS[1]], SamplingParams(max_tokens=10, ignore_eos=True))
        handle = llm.generate_async(PROMPTS[1], SamplingParams(max_tokens=1000, ignore_eos=True))
        next(iter(handle))
        during = llm.metrics()
        handle.cancel()
        cancelled = handle.result(10)
        after, timeline = llm.metrics(), llm.timeline
    assert (during.running, during.waiting) == (1, 0)
    assert 0 < during.kv_tokens < during.kv_capacity_tokens
    assert (after.submitted, after.running, after.waiting) == (4, 0, 0)
    assert after.ended == {"length": 3, "cancelled": 1}
    assert after.completion_tokens == 30 + cancelled.usage.completion_tokens
    assert after.kv_tokens == 0
    by_id = {r.request_id: r for r in after.recent}
    for output in (*outputs, cancelled):
        metrics = by_id[output.request_id]
        assert metrics.completion_tokens == output.usage.completion_tokens
        assert metrics.reused_tokens == output.usage.reused_tokens
        assert metrics.ttft_s == pytest.approx(output.timing.ttft_s, abs=0.02)
    assert timeline is not None
    spans = timeline.spans()
    assert [s.kind for s in spans if outputs[0].request_id in s.request_ids][:3] == ["queued", "encode", "prefill"]
    for output in outputs:
        mine = [s for s in spans if output.request_id in s.request_ids]
        assert sum(s.kind == "decode" for s in mine) == 9
        assert (
            sum(s.tokens for s in mine if s.kind == "prefill") + output.usage.reused_tokens
            == output.usage.prompt_tokens
        )
    steps = [s for s in spans if s.kind != "queued"]
    assert all(a.end <= b.start for a, b in zip(steps, steps[1:], strict=False)), "one thread runs one step at a time"


def test_refused_requests_are_counted(tiny_engine: Path) -> None:
    with LLM(tiny_engine, max_queue=1) as llm:
        long = SamplingParams(max_tokens=500, ignore_eos=True)
        refused = 0
        for _ in range(10):
            try:
                llm.generate_async(PROMPTS[1], long)
            except QueueFullError:
                refused += 1
        assert refused > 0
        assert llm.metrics().refused == refused
        assert llm.metrics().submitted == 10 - refused
