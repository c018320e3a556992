"""Chunked prefill, priorities, preemption, deadlines, fairness and the prompt cache on the tiny engine."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellm import LLM, Increment, SamplingParams
from edgellm.config import KvCacheConfig
from edgellm.errors import EngineDirError, EngineError, RequestError
from edgellm.runtime.prompt_cache import common_prefix
from edgellm.runtime.request import RequestHandle

GREEDY = SamplingParams(max_tokens=48, ignore_eos=True)
LONG = SamplingParams(max_tokens=900, ignore_eos=True)


@pytest.fixture
def llm(tiny_engine: Path) -> Iterator[LLM]:
    with LLM(tiny_engine, num_threads=2, prefill_chunk=64) as llm:
        yield llm


@pytest.fixture(scope="module")
def plain(tiny_engine: Path) -> Iterator[LLM]:
    """The reference: prompts in one piece, nothing reused."""
    none = KvCacheConfig(prompt_cache_bytes=0)
    with LLM(tiny_engine, num_threads=2, prefill_chunk=4096, kv_cache_config=none) as llm:
        yield llm


def picture(seed: int, height: int = 128, width: int = 160) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def turn(role: str, *parts: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": role, "content": content}


def tokens(llm: LLM, prompt: Any, params: SamplingParams = GREEDY) -> list[int]:
    ids: list[int] = llm.generate(prompt, params).outputs[0].token_ids
    return ids


def test_chunked_prefill_changes_nothing(llm: LLM, plain: LLM) -> None:
    prompts = [
        [turn("user", "count " * 150, picture(1), "and", picture(2, 96, 64), "now.")],
        [turn("user", picture(3, 256, 320), "What is there?")],
        list(range(5, 405)),
    ]
    for prompt in prompts:
        assert tokens(llm, prompt) == tokens(plain, prompt)


def test_a_long_prompt_does_not_hold_up_a_stream(tiny_engine: Path) -> None:
    with LLM(tiny_engine, num_threads=2, prefill_chunk=16) as llm:
        seen: list[tuple[str, int]] = []

        def note(increment: Increment) -> None:
            seen.append((increment.request_id, increment.seq))

        stream = llm.generate_async([7, 8, 9], LONG, on_increment=note, request_id="stream")
        next(iter(stream))
        begun = len(seen)
        prompt = llm.generate_async([5] * 800, GREEDY, on_increment=note, request_id="prompt")
        prompt.result(60)
        stream.cancel()
        first = seen.index(("prompt", 0))
        assert first - begun >= 800 // 16 - 2, "the stream must decode one token per chunk of the other's prompt"


def test_multi_turn_chat_reuses_the_earlier_turns(llm: LLM, plain: LLM) -> None:
    conversation = [turn("system", "Be brief."), turn("user", picture(4), "What is there?")]
    reused = []
    for question in ("How many?", "Where is it?", "Steer to it."):
        output, expected = llm.generate(conversation, GREEDY), plain.generate(conversation, GREEDY)
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        reused.append(output.usage.reused_tokens)
        conversation += [turn("assistant", output.text), turn("user", question)]
    assert reused[0] == 0
    assert reused[1] > 20
    assert reused[2] > reused[1]
    assert plain.generate(conversation, GREEDY).usage.reused_tokens == 0


def test_another_picture_is_not_the_same_prefix(llm: LLM, plain: LLM) -> None:
    for seed in (5, 6, 5):
        prompt = [turn("user", "Look:", picture(seed), "What is there?")]
        assert tokens(llm, prompt) == tokens(plain, prompt)
    shared = llm.generate([turn("user", "Look:", picture(7), "What is there?")], GREEDY).usage.reused_tokens
    assert shared < 12, "only the text before the picture may be reused"


def test_system_prompts(llm: LLM, plain: LLM) -> None:
    text = "You are the eyes of a robot. " * 12
    info = llm.cache_system_prompt("eyes", text)
    assert not info.already_cached
    assert llm.cache_system_prompt("eyes", text) == dataclasses.replace(info, already_cached=True)
    prompt = [turn("system", text), turn("user", "Hello.")]
    output = llm.generate(prompt, GREEDY)
    assert output.usage.reused_tokens == info.tokens
    assert output.outputs[0].token_ids == tokens(plain, prompt)
    llm.clear_prompt_cache()
    assert [i.name for i in llm.system_prompts()] == ["eyes"]
    llm.cache_system_prompt("eyes", "Another text.")
    assert len(llm.system_prompts()) == 1
    llm.drop_system_prompt("eyes")
    with pytest.raises(RequestError, match="no system prompt 'eyes' is cached; cached are: none"):
        llm.drop_system_prompt("eyes")


def test_prompt_cache_stays_within_its_budget(tiny_engine: Path) -> None:
    budget = 3 * 2**20
    with LLM(tiny_engine, kv_cache_config=KvCacheConfig(prompt_cache_bytes=budget)) as llm:
        llm.cache_system_prompt("kept", "Short.")
        for i in range(12):
            llm.generate([i + 20] * 100, SamplingParams(max_tokens=4, ignore_eos=True))
            assert llm._prompt_cache.nbytes <= budget
        assert len(llm._prompt_cache.entries) > 2
        assert llm.generate([31] * 100, GREEDY).usage.reused_tokens > 90, "the most recent are kept"
        assert llm.generate([20] * 100, GREEDY).usage.reused_tokens == 0, "the oldest are not"
        assert [i.name for i in llm.system_prompts()] == ["kept"]
        with pytest.raises(EngineError, match="system prompt 'huge' takes"):
            llm.cache_system_prompt("huge", "word " * 700)


def test_prompt_cache_on_disk(tiny_engine: Path, plain: LLM, tmp_path: Path) -> None:
    file = tmp_path / "cache.safetensors"
    prompt = [turn("system", "Look closely. " * 20), turn("user", picture(8), "What is there?")]
    with LLM(tiny_engine) as llm:
        pinned = llm.cache_system_prompt("closely", "Look closely. " * 20)
        first = llm.generate(prompt, GREEDY)
        assert llm.save_prompt_cache(file) == file
    with LLM(tiny_engine) as llm:
        assert llm.load_prompt_cache(file) == 2
        assert llm.system_prompts() == [pinned]
        again = llm.generate(prompt, GREEDY)
        assert again.usage.reused_tokens == len(first.prompt_token_ids) - 1
        assert again.outputs[0].token_ids == tokens(plain, prompt)
        damaged = tmp_path / "damaged.safetensors"
        data = bytearray(file.read_bytes())
        data[-1000] ^= 1
        damaged.write_bytes(data)
        with pytest.raises(EngineDirError, match="has changed since it was saved"):
            llm.load_prompt_cache(damaged)
        damaged.write_bytes(data[:500])
        with pytest.raises(EngineDirError, match="is damaged"):
            llm.load_prompt_cache(damaged)
        with pytest.raises(EngineDirError, match="does not exist"):
            llm.load_prompt_cache()
        llm.config = dataclasses.replace(llm.config, files={})
        with pytest.raises(EngineDirError, match="made by another engine"):
            llm.load_prompt_cache(file)


def test_urgent_request_displaces_and_the_displaced_one_goes_on(llm: LLM, plain: LLM) -> None:
    params = SamplingParams(max_tokens=400, ignore_eos=True)
    prompts = [[turn("user", picture(10 + i), "What is there?")] for i in range(4)]
    seen: dict[str, list[float]] = {}

    def note(increment: Increment) -> None:
        seen.setdefault(increment.request_id, []).append(increment.sampled_at)

    handles = [llm.generate_async(p, params, on_increment=note, request_id=str(i)) for i, p in enumerate(prompts)]
    while len(seen) < 4:
        time.sleep(0.001)
    urgent = llm.generate_async([9, 8, 7], GREEDY, priority=5)
    output = urgent.result(30)
    assert not any(h.done() for h in handles)
    assert output.timing.queue_s < 0.2
    assert output.outputs[0].token_ids == tokens(plain, [9, 8, 7])
    for handle, prompt in zip(handles, prompts, strict=True):
        assert handle.result(60).outputs[0].token_ids == tokens(plain, prompt, params)


def test_urgent_request_displaces_a_prompt_in_progress(llm: LLM, plain: LLM) -> None:
    blockers = [llm.generate_async([i + 5], LONG, priority=5) for i in range(3)]
    long = [turn("user", "word " * 300, picture(3), "end")]
    prompt = llm.generate_async(long, GREEDY)
    urgent = llm.generate_async([9, 8, 7], GREEDY, priority=5)
    assert urgent.result(30).outputs[0].token_ids == tokens(plain, [9, 8, 7])
    assert prompt.result(60).outputs[0].token_ids == tokens(plain, long)
    for handle in blockers:
        handle.cancel()


def test_deadline(llm: LLM) -> None:
    output = llm.generate_async([5], LONG, deadline_s=0.05).result(30)
    assert output.outputs[0].finish_reason == "deadline"
    assert 0 < output.usage.completion_tokens < 900
    blockers = [llm.generate_async([i + 5], LONG) for i in range(4)]
    waiting = llm.generate_async([5], GREEDY, deadline_s=0.02)
    assert waiting.result(30).outputs[0].finish_reason == "deadline"
    for handle in blockers:
        handle.cancel()
    for bad in (0, -1, float("nan"), "soon"):
        with pytest.raises(RequestError, match="deadline_s is"):
            llm.generate_async([5], GREEDY, deadline_s=bad)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="priority is"):
        llm.generate_async([5], GREEDY, priority=1.5)  # type: ignore[arg-type]


def test_clients_take_turns(tiny_engine: Path) -> None:
    with LLM(tiny_engine, max_queue=40) as llm:
        order: list[str] = []

        def finished(handle: RequestHandle) -> None:
            order.append(handle.request_id)

        blockers = [llm.generate_async([5, 6], LONG) for _ in range(4)]
        time.sleep(0.1)
        short = SamplingParams(max_tokens=8, ignore_eos=True)
        handles = [llm.generate_async([7], short, client="greedy", request_id=f"greedy-{i}") for i in range(12)]
        handles += [llm.generate_async([7], short, client="modest", request_id=f"modest-{i}") for i in range(2)]
        for handle in handles:
            handle.add_done_callback(finished)
        for blocker in blockers:
            blocker.cancel()
        for handle in handles:
            handle.result(30)
        assert max(order.index("modest-0"), order.index("modest-1")) < 8, order


def test_common_prefix() -> None:
    a = np.array([1, 2, 3, 4])
    assert common_prefix(a, a) == 4
    assert common_prefix(a, a[:2]) == 2
    assert common_prefix(a, np.array([1, 2, 9, 4])) == 2
    assert common_prefix(a, np.array([], dtype=np.int64)) == 0
