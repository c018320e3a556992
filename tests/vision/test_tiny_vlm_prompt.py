"""The whole way from chat messages to model inputs, on the tiny reference model's files, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from edgellm.runtime.chat_template import ChatTemplate, collect_images
from edgellm.runtime.detokenizer import Detokenizer
from edgellm.runtime.tokenizer import Tokenizer
from edgellm.vision.base import (
    VisualRunner,
    load_visual_runner,
    read_preprocessor_config,
    vision_config_from_checkpoint,
)

CHECKPOINT = Path(__file__).resolve().parents[2] / "assets" / "tiny_vlm"
pytestmark = pytest.mark.skipif(not (CHECKPOINT / "config.json").is_file(), reason="assets/tiny_vlm is not there")


@pytest.fixture(scope="module")
def runner() -> VisualRunner:
    hf_config = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    config = vision_config_from_checkpoint("qwen3_vl", hf_config, read_preprocessor_config(CHECKPOINT))
    return load_visual_runner("qwen3_vl", config)


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(240, 320), (480, 640), (300, 200)]
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def chat(images: list[Any]) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "text", "text": "Look: "}]
    for image in images:
        content += [{"type": "image", "image": image}, {"type": "text", "text": " and "}]
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [*content, {"type": "text", "text": "where is the red circle? 你好 🙂"}]},
    ]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_prompt_and_pixels_equal_transformers(runner: VisualRunner, count: int) -> None:
    reference = AutoTokenizer.from_pretrained(CHECKPOINT)
    processor = Qwen2VLImageProcessorPil.from_pretrained(CHECKPOINT)
    messages = chat(pictures()[:count])

    tokenizer = Tokenizer.from_dir(CHECKPOINT)
    text = ChatTemplate.from_dir(CHECKPOINT, tokenizer.special_tokens).render(messages)
    assert text == reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text, add_special_tokens=False)
    assert runner.image_token_id == tokenizer.token_id("<|image_pad|>")

    images = [runner.prepare(ref.image, ref.where) for ref in collect_images(messages)]
    expanded = runner.expand_image_tokens(ids, images)
    positions, _ = runner.mrope_positions(expanded, [i.grid_thw for i in images])
    assert positions.shape == (3, len(expanded))
    if count:
        expected = processor(images=pictures()[:count], return_tensors="pt")
        assert [list(i.grid_thw) for i in images] == expected["image_grid_thw"].tolist()
        assert torch.equal(torch.cat([i.pixel_values for i in images]), expected["pixel_values"])
        tokens = (expected["image_grid_thw"].prod(-1) // 4).tolist()
        assert len(expanded) == len(ids) - count + sum(tokens)


def test_answers_stream_whole() -> None:
    tokenizer = Tokenizer.from_dir(CHECKPOINT)
    assert tokenizer.eos_token_ids and tokenizer.eos_token_ids <= set(range(tokenizer.vocab_size))
    text = 'There is a red circle on the left. {"steer": "left"} naïve 你好 🙂'
    detokenizer = Detokenizer(tokenizer)
    for token in tokenizer.encode(text):
        detokenizer.push([token])
    detokenizer.finish()
    assert detokenizer.text == text
