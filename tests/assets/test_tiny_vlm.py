"""The committed checkpoint and adapters: their shape, their size, and that plain `transformers` gets right answers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from assets.eval_tiny_vlm import MODEL, Asker, picture, results
from assets.tiny_vlm_data import TURN_KINDS, Packer
from assets.tiny_vlm_model import PackedForward, make_config, make_layout
from edgellm_ros.scene_questions import examples
from edgellm_ros.scene_render import render_table

SIZE = (320, 256)


@pytest.fixture(scope="module")
def asker() -> Asker:
    return Asker()


def right_answers(asker: Asker, style: str, count: int, size: tuple[int, int] = SIZE) -> int:
    data = list(examples("held_out", count, style, size[0] / size[1]))
    replies = results(asker, data, size, jpeg=0, batch=count)
    return sum(reply == example.answer for reply, example in zip(replies, data, strict=True))


def test_answers_held_out_scenes(asker: Asker) -> None:
    assert right_answers(asker, "plain", 24) >= 23


def test_answers_frames_of_another_size(asker: Asker) -> None:
    assert right_answers(asker, "plain", 16, (384, 256)) >= 15


@pytest.mark.parametrize("adapter", ["terse", "pirate"])
def test_adapters_answer_in_their_style(adapter: str) -> None:
    pytest.importorskip("peft", reason="adapters are checked with peft")
    assert right_answers(Asker(adapter=adapter), adapter, 16) >= 15


def test_repeats_any_words(asker: Asker) -> None:
    frame = picture(next(examples("test", 1)), SIZE)
    assert asker.ask([frame], ["Repeat after me: hello robot"]) == [" hello robot"]


def test_fits_20_megabytes() -> None:
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= 20_000_000


def test_weights_are_fp16_and_stored_once() -> None:
    with safe_open(MODEL / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"F16"}  # noqa: SIM118
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118


def test_shape_suits_the_engines(asker: Asker) -> None:
    text, vision = asker.model.config.text_config, asker.model.config.vision_config
    assert text.head_dim == 64
    assert all(size % 128 == 0 for size in (text.hidden_size, text.intermediate_size, text.vocab_size))
    assert all(size % 128 == 0 for size in (vision.hidden_size, vision.intermediate_size, vision.out_hidden_size))
    assert len(vision.deepstack_visual_indexes) == 3
    assert asker.model.config.tie_word_embeddings
    assert sum(p.numel() for p in asker.model.parameters()) < 8_000_000


def test_configuration_is_what_the_script_makes(asker: Asker) -> None:
    made = make_config(Tokenizer.from_file(str(MODEL / "tokenizer.json"))).to_dict()
    stored = asker.model.config.to_dict()
    for part in ("text_config", "vision_config"):
        same = {key for key in made[part] if key != "dtype"}
        assert {key: made[part][key] for key in same} == {key: stored[part][key] for key in same}


@pytest.fixture(scope="module")
def packer() -> Packer:
    return Packer(Tokenizer.from_file(str(MODEL / "tokenizer.json")), batch=2, split="test")


def test_training_never_sees_the_held_out_split() -> None:
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    with pytest.raises(AssertionError):
        Packer(tokenizer, batch=1, split="held_out")


def test_batches_repeat_and_mark_every_answer(packer: Packer) -> None:
    batch, again = packer.draw(3), packer.draw(3)
    assert np.array_equal(batch.ids, again.ids)
    assert len(batch.kinds) == batch.question.max() + 1
    assert batch.kinds.max() < len(TURN_KINDS)
    assert np.array_equal(batch.ids.reshape(-1)[batch.predict_at + 1], batch.predict)
    end = packer.tokenizer.token_to_id("<|im_end|>")
    assert (batch.predict == end).sum() == len(batch.kinds)


@pytest.mark.parametrize("size", [(320, 256), (416, 224)])
def test_packed_training_forward_equals_transformers(asker: Asker, packer: Packer, size: tuple[int, int]) -> None:
    model, batch = asker.model, packer.draw(1, size)
    frames = render_table(batch.scenes, size)
    layout = make_layout(model, size, batch.prefix)
    forward = PackedForward(model)
    with torch.no_grad():
        image, deepstack = forward.encode(frames, layout)
        ids, group, order = (torch.from_numpy(a).long() for a in (batch.ids, batch.group, batch.order))
        packed = model.lm_head(forward.hidden(ids, group, order, layout, image, deepstack))
        for row in range(2):
            conversation = (group[row] == 0) | (group[row] == 1)
            alone = ids[row, conversation][None]
            pixels = asker.processor(images=frames[row].numpy(), return_tensors="pt")
            is_image = (alone == asker.image_id).int()
            logits = model(input_ids=alone, mm_token_type_ids=is_image, **pixels).logits[0]
            torch.testing.assert_close(packed[row, conversation], logits, atol=1e-3, rtol=0)


def test_checkpoint_lists_its_files() -> None:
    names = {str(path.relative_to(MODEL)) for path in MODEL.rglob("*") if path.is_file()}
    adapters = {
        str(Path("lora") / style / name)
        for style in ("terse", "pirate")
        for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    assert names == adapters | {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
