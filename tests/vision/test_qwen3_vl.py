"""Qwen3-VL preprocessing, positions and token bookkeeping against transformers."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionRotaryEmbedding
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from edgellm.errors import ConfigError, RequestError
from edgellm.vision.base import (
    ENCODE_PHASE,
    PreparedImage,
    limit_image_tokens,
    load_visual_runner,
    vision_config_from_checkpoint,
)
from edgellm.vision.qwen3_vl import (
    Qwen3VLRunner,
    VisionConfig,
    expand_image_tokens,
    mrope_positions,
    position_inputs,
    smart_resize,
)

PAD, START, END = 90, 91, 92
VISION = {
    "hidden_size": 128,
    "num_heads": 2,
    "depth": 2,
    "intermediate_size": 128,
    "out_hidden_size": 128,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "in_channels": 3,
    "num_position_embeddings": 144,
    "deepstack_visual_indexes": [0, 1],
}
HF_CONFIG: dict[str, Any] = {"model_type": "qwen3_vl", "vision_config": VISION, "image_token_id": PAD}
PREPROCESSOR: dict[str, Any] = {
    "size": {"shortest_edge": 16 * 1024, "longest_edge": 512 * 1024},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
CONFIG = VisionConfig.from_checkpoint(HF_CONFIG, PREPROCESSOR)
RUNNER = Qwen3VLRunner(CONFIG, torch.device("cpu"), torch.float32)
SIZES = [(480, 640), (33, 57), (1, 1), (1080, 1920), (64, 64), (31, 900), (200, 300), (511, 513)]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with noise, so that resizing and rounding matter."""
    rng = np.random.default_rng([seed, height, width])
    ramp = np.linspace(0, 255, width)[None, :, None] * np.linspace(0.2, 1, height)[:, None, None]
    return np.clip(ramp + rng.normal(0, 40, (height, width, 3)), 0, 255).astype(np.uint8)


def reference_processor(**changes: Any) -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(**{**PREPROCESSOR, **changes})


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("mean_std", [(PREPROCESSOR["image_mean"], PREPROCESSOR["image_std"]), ([0.5] * 3, [0.5] * 3)])
def test_pixel_values_equal_transformers_bit_for_bit(height: int, width: int, mean_std: tuple[list, list]) -> None:
    mean, std = mean_std
    settings = {**PREPROCESSOR, "image_mean": mean, "image_std": std}
    runner = Qwen3VLRunner(VisionConfig.from_checkpoint(HF_CONFIG, settings), torch.device("cpu"), torch.float32)
    array = picture(height, width)
    expected = reference_processor(image_mean=mean, image_std=std)(images=[Image.fromarray(array)], return_tensors="pt")
    got = runner.prepare(array)
    assert list(got.grid_thw) == expected["image_grid_thw"][0].tolist()
    assert torch.equal(got.pixel_values, expected["pixel_values"])
    assert got.num_tokens == got.pixel_values.shape[0] // 4


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK"])
def test_other_pil_modes_equal_transformers(mode: str) -> None:
    image = Image.fromarray(picture(100, 140)).convert(mode)
    expected = reference_processor()(images=[image], return_tensors="pt")["pixel_values"]
    assert torch.equal(RUNNER.prepare(image).pixel_values, expected)


def test_auto_image_processor_picks_the_class_compared_with() -> None:
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    assert IMAGE_PROCESSOR_MAPPING_NAMES["qwen3_vl"]["pil"] == "Qwen2VLImageProcessorPil"


def test_smart_resize_stays_within_limits_or_refuses() -> None:
    rng = np.random.default_rng(1)
    tight = CONFIG.with_token_limits(32, 128)
    refused = []
    for _ in range(2000):
        height, width = (int(x) for x in np.exp(rng.uniform(0, 8, 2)).astype(int) + 1)
        try:
            h, w = smart_resize(height, width, tight)
        except RequestError:
            refused.append(max(height, width) / min(height, width))
            continue
        assert h % 32 == 0 and w % 32 == 0 and 32 <= h * w // 1024 <= 128
    assert refused and min(refused) > 20


def test_long_thin_image_is_refused_instead_of_overrunning_the_engine() -> None:
    with pytest.raises(RequestError, match="200 times"):
        RUNNER.prepare(picture(2, 500))
    with pytest.raises(RequestError, match="engine takes 1 to 16"):
        Qwen3VLRunner(CONFIG.with_token_limits(1, 16), torch.device("cpu"), torch.float32).prepare(picture(40, 7000))


@pytest.mark.parametrize("grid", [(2, 2), (4, 6), (30, 40), (12, 12), (2, 64)])
def test_position_inputs_equal_transformers(grid: tuple[int, int]) -> None:
    thw = torch.tensor([[1, *grid]])
    indices, weights = get_vision_interpolation_indices_and_weights(
        thw, num_grid_per_side=12, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    rotary = Qwen3VLVisionRotaryEmbedding(Qwen3VLConfig(vision_config=VISION).vision_config)
    cos, sin = rotary(torch.zeros(1), get_vision_position_ids(thw, 2))
    got_indices, got_weights, got_rotary = position_inputs(*grid, CONFIG)
    assert got_indices.dtype == torch.int64 and torch.equal(got_indices, indices.T)
    assert torch.equal(got_weights, weights.T)
    half = CONFIG.head_dim // 2
    assert torch.equal(got_rotary, torch.cat([cos[:, :half], sin[:, :half]], dim=-1))


@pytest.fixture(scope="module")
def hf_model() -> Qwen3VLModel:
    text = {
        "vocab_size": 100,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    config = Qwen3VLConfig(text_config=text, vision_config=VISION, image_token_id=PAD, vision_start_token_id=START)
    with torch.device("meta"):
        return Qwen3VLModel(config)


def prompt(*parts: int | tuple[int, int]) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Text runs (their length) and images (their patch grid) as expanded token ids and grids."""
    ids: list[int] = []
    grids: list[tuple[int, int, int]] = []
    for part in parts:
        if isinstance(part, int):
            ids += [1 + i % 50 for i in range(part)]
        else:
            ids += [START, *[PAD] * (part[0] * part[1] // 4), END]
            grids.append((1, *part))
    return ids, grids


@pytest.mark.parametrize(
    "parts",
    [
        (7,),
        (3, (4, 6), 5),
        ((4, 6),),
        (3, (4, 6), (10, 2), 9, (2, 2), 1),
        ((2, 12), 1, (12, 2), 4, (8, 8), (8, 8), 30),
    ],
)
def test_mrope_positions_equal_get_rope_index(hf_model: Qwen3VLModel, parts: tuple) -> None:
    ids, grids = prompt(*parts)
    ids_1S = torch.tensor([ids])
    expected, delta = hf_model.get_rope_index(
        ids_1S, mm_token_type_ids=(ids_1S == PAD).int(), image_grid_thw=torch.tensor(grids) if grids else None
    )
    positions, following = mrope_positions(ids, grids, PAD, 2)
    assert positions.dtype == torch.int64 and torch.equal(positions, expected[:, 0])
    assert following == len(ids) + delta.item()


def test_mrope_positions_refuse_tokens_that_do_not_fit_the_grids() -> None:
    ids, grids = prompt(2, (4, 4), 3, (4, 8))
    with pytest.raises(RequestError, match="12 image tokens; its images need 4"):
        mrope_positions(ids, grids[:1], PAD, 2)
    with pytest.raises(RequestError, match="fewer than the 8"):
        mrope_positions(ids, grids[::-1], PAD, 2)


def prepared(tokens: int) -> PreparedImage:
    return PreparedImage(torch.empty(0), (1, 2, 2 * tokens), tokens, "key")


def test_expand_image_tokens() -> None:
    assert expand_image_tokens([1, PAD, 2, PAD], [prepared(3), prepared(1)], PAD) == [1, PAD, PAD, PAD, 2, PAD]
    assert expand_image_tokens([1, 2], [], PAD) == [1, 2]
    for ids, images in (([1, PAD], []), ([1], [prepared(1)]), ([PAD, PAD], [prepared(1)])):
        with pytest.raises(RequestError, match="image tokens but"):
            expand_image_tokens(ids, images, PAD)


def test_key_follows_the_content() -> None:
    array = picture(64, 96)
    other = array.copy()
    other[0, 0, 0] ^= 1
    assert RUNNER.prepare(array).key == RUNNER.prepare(Image.fromarray(array)).key
    assert RUNNER.prepare(array).key != RUNNER.prepare(other).key
    flat = np.full((64, 256, 3), 7, np.uint8)  # same bytes, other grid
    assert RUNNER.prepare(flat).key != RUNNER.prepare(np.full((256, 64, 3), 7, np.uint8)).key


class FakeEngine:
    """Answers like a visual engine and keeps what it was given."""

    def run(self, phase: str, inputs: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]) -> None:
        self.phase, self.inputs = phase, inputs
        for i, tensor in enumerate(outputs.values()):
            tensor.fill_(i)


def test_encode_hands_the_engine_its_inputs_and_returns_its_outputs() -> None:
    engine = FakeEngine()
    runner = load_visual_runner("qwen3_vl", vision_config_from_checkpoint("qwen3_vl", HF_CONFIG, PREPROCESSOR))
    image = runner.prepare(picture(200, 300))
    features = runner.encode(engine, image)
    count = image.pixel_values.shape[0]
    shapes = {name: (tuple(x.shape), x.dtype) for name, x in engine.inputs.items()}
    assert engine.phase == ENCODE_PHASE
    assert shapes == {
        "pixel_values": ((count, 1536), torch.float32),
        "pos_embed_indices": ((4, count), torch.int64),
        "pos_embed_weights": ((4, count), torch.float32),
        "rotary_cos_sin": ((count, 64), torch.float32),
    }
    assert features.image_embeds.shape == (count // 4, 128) and (features.image_embeds == 0).all()
    assert [float(x[0, 0]) for x in features.deepstack_embeds] == [1.0, 2.0]


def test_config_survives_a_dict_and_refuses_what_it_cannot_do() -> None:
    assert VisionConfig.from_dict(CONFIG.to_dict()) == CONFIG
    assert (CONFIG.min_image_tokens, CONFIG.max_image_tokens, CONFIG.max_patches) == (16, 512, 2048)
    narrowed = CONFIG.with_token_limits(20, 64)
    assert (narrowed.min_image_tokens, narrowed.max_image_tokens) == (20, 64)
    assert limit_image_tokens("qwen3_vl", CONFIG.to_dict(), 20, 64) == narrowed.to_dict()
    assert CONFIG.with_token_limits(1, 10_000) == CONFIG
    with pytest.raises(ConfigError, match=r"valid keys are .*patch_size"):
        VisionConfig.from_dict({**CONFIG.to_dict(), "patchsize": 14})
    tiny = CONFIG.with_token_limits(1, 8)
    assert (tiny.min_image_tokens, tiny.max_image_tokens) == (8, 8), "a build's limits go before the checkpoint's"
    with pytest.raises(ConfigError, match="merge_size is 4"):
        VisionConfig.from_checkpoint(HF_CONFIG, {**PREPROCESSOR, "merge_size": 4})
    with pytest.raises(ConfigError, match="do_resize is False"):
        VisionConfig.from_checkpoint(HF_CONFIG, {**PREPROCESSOR, "do_resize": False})
    with pytest.raises(ConfigError, match="image_mean"):
        VisionConfig.from_checkpoint(HF_CONFIG, {k: v for k, v in PREPROCESSOR.items() if k != "image_mean"})
    with pytest.raises(ConfigError, match="square"):
        dataclasses.replace(CONFIG, num_position_embeddings=143)
    with pytest.raises(ConfigError, match="valid model types are qwen3_vl"):
        load_visual_runner("qwen9", {})


def test_one_camera_frame_is_prepared_quickly() -> None:
    """About 5 ms on one desktop core; the bound leaves room for a busy machine, not for a slow algorithm."""
    frame = picture(480, 640)
    RUNNER.prepare(frame)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        RUNNER.prepare(frame)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.02, f"best of 20: {min(times) * 1e3:.1f} ms"
