"""Qwen3-VL against transformers in fp32: logits and visual features, with and without images, batched, with cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgellm.checkpoint import Checkpoint
from edgellm.models.layers import EdgeLLMForCausalLM
from edgellm.models.registry import family_of, load_decoder, load_visual
from edgellm.runtime.rope import cos_sin
from edgellm.vision.base import VisualRunner, load_visual_runner, vision_config_from_checkpoint
from edgellm.vision.qwen3_vl import position_inputs

LIMIT = 1e-4
CAPACITY = 96
PREPROCESSOR = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "min_pixels": 1024, "max_pixels": 65536}


class Subject:
    """Our modules on a checkpoint, called as the runtime calls them."""

    def __init__(self, directory: Path) -> None:
        checkpoint = Checkpoint(directory)
        self.decoder: EdgeLLMForCausalLM = load_decoder(checkpoint)
        self.visual = load_visual(checkpoint)
        config = vision_config_from_checkpoint("qwen3_vl", checkpoint.hf_config, PREPROCESSOR)
        self.runner: VisualRunner = load_visual_runner("qwen3_vl", config)
        self.embedding = checkpoint.tensor(family_of(checkpoint).embedding_name())

    def encode(self, image: Any) -> tuple[torch.Tensor, ...]:
        _, height, width = image.grid_thw
        assert self.visual is not None
        features: tuple[torch.Tensor, ...] = self.visual(
            image.pixel_values, *position_inputs(height, width, self.runner.config)
        )
        return features

    def caches(self, batch: int) -> list[torch.Tensor]:
        config = self.decoder.config
        shape = (batch, 2, config.num_key_value_heads, CAPACITY, config.head_dim)
        return [torch.full(shape, torch.nan) for _ in range(config.num_hidden_layers)]

    def prepare(self, ids: list[int], images: list[Any]) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """Embeddings [S, H], deepstack embeddings [S, H] each, and the RoPE table [C, R] of one row."""
        embeds = self.embedding[torch.tensor(ids)].clone()
        deepstack = [torch.zeros_like(embeds) for _ in range(self.decoder.config.num_deepstack)]
        where = torch.tensor(ids) == self.runner.image_token_id
        if images:
            features = [torch.cat(f) for f in zip(*(self.encode(i) for i in images), strict=True)]
            for target, values in zip((embeds, *deepstack), features, strict=True):
                target[where] = values
        positions, following = self.runner.mrope_positions(ids, [i.grid_thw for i in images])
        rest = torch.arange(following, following + CAPACITY - len(ids)).expand(3, -1)
        table = torch.cat(cos_sin(torch.cat((positions, rest), 1), self.decoder.config.rope), -1)
        return embeds, deepstack, table

    def logits(self, rows: list[tuple[list[int], list[Any]]], split: int | None = None) -> list[torch.Tensor]:
        """Logits [S, V] of every position of each row; with `split`, in two calls that share the cache."""
        prepared = [self.prepare(*row) for row in rows]
        lengths = [len(ids) for ids, _ in rows]
        longest = max(lengths)

        def padded(x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(x, (0, 0, 0, longest - x.shape[0]))

        embeds = torch.stack([padded(e) for e, _, _ in prepared])
        deepstack = [torch.stack([padded(d[i]) for _, d, _ in prepared]) for i in range(len(prepared[0][1]))]
        table = torch.stack([t for _, _, t in prepared])
        caches, outputs = self.caches(len(rows)), []
        for start, end in [(0, longest)] if split is None else [(0, split), (split, longest)]:
            ends = torch.tensor([min(n, end) for n in lengths], dtype=torch.int32)
            starts = torch.tensor([min(n, start) for n in lengths], dtype=torch.int32)
            every = torch.arange(end - start).expand(len(rows), -1)
            logits, caches = self.decoder(
                embeds[:, start:end], caches, table, ends, starts, every, [d[:, start:end] for d in deepstack]
            )
            outputs.append(logits)
        return [row[:n] for row, n in zip(torch.cat(outputs, 1), lengths, strict=True)]


def reference_logits(model: Any, ids: list[int], images: list[Any]) -> torch.Tensor:
    inputs = {"input_ids": torch.tensor([ids])}
    if images:
        inputs["pixel_values"] = torch.cat([i.pixel_values for i in images])
        inputs["image_grid_thw"] = torch.tensor([i.grid_thw for i in images])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs).logits[0]
    return logits


@pytest.fixture(scope="module")
def subject(random_vlm: tuple[Any, Path]) -> Subject:
    return Subject(random_vlm[1])


def image(subject: Subject, height: int, width: int) -> Any:
    rng = np.random.default_rng(height * width)
    return subject.runner.prepare(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def prompt(subject: Subject, *parts: int | Any) -> tuple[list[int], list[Any]]:
    """Random text of the given lengths, and images, in order."""
    rng, ids, images = np.random.default_rng(len(parts)), [], []
    for part in parts:
        if isinstance(part, int):
            ids += rng.integers(0, 290, part).tolist()
        else:
            ids += [302, *[subject.runner.image_token_id] * part.num_tokens, 303]
            images.append(part)
    return ids, images


def test_logits_equal_transformers(subject: Subject, random_vlm: tuple[Any, Path]) -> None:
    model, _ = random_vlm
    small, wide = image(subject, 64, 96), image(subject, 96, 160)
    rows = [
        prompt(subject, 11),
        prompt(subject, 3, small, 5),
        prompt(subject, 2, small, 4, wide, 3),
        prompt(subject, wide, 1),
    ]
    for row in rows:
        expected = reference_logits(model, *row)
        assert (subject.logits([row])[0] - expected).abs().max() <= LIMIT
        assert (subject.logits([row], split=5)[0] - expected).abs().max() <= LIMIT
    for pair in ([rows[0], rows[2]], [rows[3], rows[1]]):
        for got, row in zip(subject.logits(pair), pair, strict=True):
            assert (got - reference_logits(model, *row)).abs().max() <= LIMIT
    assert expected.abs().max() > 0.1, "logits that are all near zero prove nothing"


def test_visual_encoder_equals_transformers(subject: Subject, random_vlm: tuple[Any, Path]) -> None:
    model, _ = random_vlm
    for size in ((64, 64), (96, 160), (256, 32)):
        prepared = image(subject, *size)
        with torch.no_grad():
            expected = model.model.visual(prepared.pixel_values, torch.tensor([prepared.grid_thw]))
        got = subject.encode(prepared)
        for ours, theirs in zip(got, (expected.pooler_output, *expected.deepstack_features), strict=True):
            assert (ours - theirs).abs().max() <= LIMIT
            assert theirs.abs().max() > 0.1


def test_weights_stay_mapped(random_vlm: tuple[Any, Path]) -> None:
    decoder = load_decoder(Checkpoint(random_vlm[1]))
    mapped = Path("/proc/self/maps").read_text()
    ranges = [
        [int(x, 16) for x in line.split()[0].split("-")] for line in mapped.splitlines() if str(random_vlm[1]) in line
    ]
    for name, parameter in decoder.named_parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in ranges), f"{name} was copied"
