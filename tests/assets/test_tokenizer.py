"""The tiny model's tokenizer files as `transformers` loads them: any text survives, special tokens are single ids."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from assets.tiny_vlm_tokenizer import PLAIN_TOKENS, SPECIAL_TOKENS, VOCAB_SIZE

FOLDER = Path(__file__).parents[2] / "assets" / "tiny_vlm"
TEXTS = [
    "Where is the orange star relative to the blue cross? Answer as JSON.",
    '{"objects": {"red circle": 2, "white star": 1}}',
    "Grüße, 你好, नमस्ते 🙂👩‍🚀 — naïve café",
    "  two  spaces\n\n\ttabs and 12345 numbers, don't we'll",
    "def f(x):\n    return x ** 2  # code\r\n",
    "\x00\x7f control",
]


@pytest.fixture(scope="module")
def tokenizer() -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer: AutoTokenizer, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode(text).ids == ids


def test_special_tokens_are_single_and_last(tokenizer: AutoTokenizer) -> None:
    assert len(tokenizer) == VOCAB_SIZE
    tokens = [*SPECIAL_TOKENS, *PLAIN_TOKENS]
    ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
    assert ids == list(range(VOCAB_SIZE - len(tokens), VOCAB_SIZE))
    assert tokenizer("".join(tokens)).input_ids == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "".join(PLAIN_TOKENS)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_answers_are_short(tokenizer: AutoTokenizer) -> None:
    assert len(tokenizer(TEXTS[0]).input_ids) <= 16
    assert len(tokenizer(TEXTS[1]).input_ids) <= 17


def test_chat_template_is_qwen3_vls_format(tokenizer: AutoTokenizer) -> None:
    picture = {"type": "image", "image": "frame.png"}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": ["ignored", picture][1:] + [{"type": "text", "text": "What?"}, {"type": "video"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A star."}]},
        {"role": "user", "content": "Sure?"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?"
        "<|vision_start|><|video_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\nA star.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    numbered = tokenizer.apply_chat_template(
        [{"role": "user", "content": [picture, picture]}], tokenize=False, add_vision_id=True
    )
    assert numbered.startswith("<|im_start|>user\nPicture 1: <|vision_start|>")
    assert "Picture 2: <|vision_start|>" in numbered


def test_chat_template_renders_tools(tokenizer: AutoTokenizer) -> None:
    tool = {"type": "function", "function": {"name": "drive", "parameters": {}}}
    messages = [
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "drive", "arguments": {"v": 1}}}]},
        {"role": "tool", "content": "done"},
        {"role": "tool", "content": "stopped"},
    ]
    text = tokenizer.apply_chat_template(messages, tools=[tool], tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\n# Tools\n\nYou may call one or more functions")
    assert '<tools>\n{"type": "function", "function": {"name": "drive", "parameters": {}}}\n</tools>' in text
    assert text.endswith(
        '<|im_start|>assistant\n<tool_call>\n{"name": "drive", "arguments": {"v": 1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\ndone\n</tool_response>\n<tool_response>\nstopped\n</tool_response>"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
