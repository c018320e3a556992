"""The null engine: answers that a test can foretell, whatever runs beside them, in the time that was asked for."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest

from edgellm import LLM, SamplingParams
from edgellm.build.builder import build
from edgellm.build.null_builder import make
from edgellm.config import BuildConfig, NullConfig
from edgellm.engine_dir import read_manifest
from edgellm.engines.null_engine import next_token
from edgellm.errors import ConfigError

VOCAB = 500


def foretold(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, VOCAB))
    return tokens[len(prompt) :]


def test_every_answer_is_as_foretold_in_any_company(tmp_path: Path) -> None:
    make(tmp_path / "engine", BuildConfig(max_batch_size=5), NullConfig(vocab_size=VOCAB))
    rng = random.Random(0)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 40))] for _ in range(60)]
    counts = [rng.randint(1, 30) for _ in prompts]
    with LLM(tmp_path / "engine", skip_tokenizer_init=True) as llm:
        outputs = llm.generate(prompts, [SamplingParams(max_tokens=n) for n in counts])
    for prompt, count, output in zip(prompts, counts, outputs, strict=True):
        assert output.outputs[0].token_ids == foretold(prompt, count)


def test_next_token_depends_on_every_token_and_its_place() -> None:
    base = [3, 1, 4, 1, 5]
    others = [[3, 1, 4, 1], [1, 3, 4, 1, 5], [3, 1, 4, 1, 6], [2, 1, 4, 1, 5], [0, *base]]
    large = 2**24
    assert len({next_token(tokens, large) for tokens in (base, *others)}) == 6
    assert all(0 <= next_token([i], 7) < 7 for i in range(50))


def test_steps_take_the_time_asked_for(tmp_path: Path) -> None:
    make(tmp_path / "engine", null=NullConfig(prefill_s_per_token=0.01, decode_s_per_step=0.02, vocab_size=VOCAB))
    with LLM(tmp_path / "engine", skip_tokenizer_init=True) as llm:
        start = time.perf_counter()
        llm.generate(list(range(10)), SamplingParams(max_tokens=6))
        took = time.perf_counter() - start
    assert took >= 0.2, "ten tokens of prompt and five steps after the first token"


def test_null_engine_of_a_vision_model(tiny_vlm: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What is there?"}]
    answers = []
    for name, source in (("onnx", tiny_onnx), ("checkpoint", tiny_vlm)):
        build(source, tmp_path / name, "null", BuildConfig(), {"encode_s_per_image": 0.01})
        with LLM(tmp_path / name) as llm:
            output = llm.generate([{"role": "user", "content": content}], SamplingParams(max_tokens=9))
        assert output.timing.vision_s >= 0.01
        answers.append(output.outputs[0].token_ids)
    assert answers[0] == answers[1]
    assert (tmp_path / "onnx" / "tokenizer.json").exists()
    build(tiny_vlm, tmp_path / "small", "null", BuildConfig(), {"vocab_size": 2000})
    assert read_manifest(tmp_path / "small").decoder.vocab_size == 2000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode_s_per_step": -1}, "decode_s_per_step is -1"),
        ({"decode_s_per_step": "fast"}, "decode_s_per_step is 'fast'"),
        ({"speed": 1}, "unknown key 'speed'; valid keys are decode_s_per_step"),
    ],
)
def test_bad_options(tiny_vlm: Path, tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(tiny_vlm, tmp_path / "engine", "null", BuildConfig(), options)
