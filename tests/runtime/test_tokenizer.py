"""The tokenizer of an engine directory: equal to transformers' on the same files, and clear about broken ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from edgellm.errors import ConfigError, EngineDirError
from edgellm.runtime.tokenizer import Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|begin|>"]
TEXTS = [
    "Hello, where is the red circle?",
    "<|im_start|>user\nnaïve 你好 🙂<|im_end|>\n",
    "",
    "  two  spaces\n\n",
    "<|im_end",
]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A byte-level tokenizer that puts <|begin|> before raw text, with Qwen's kind of settings."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        ["the red circle is left of the blue square"] * 3,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", backend.token_to_id("<|begin|>"))]
    )
    backend.enable_truncation(5)
    backend.enable_padding(length=50, pad_id=backend.token_to_id("<|endoftext|>"), pad_token="<|endoftext|>")
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": None, "eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>"}
    write(tmp_path / "tokenizer_config.json", settings)
    return tmp_path


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def test_equal_to_transformers_on_the_same_files(directory: Path) -> None:
    reference = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    tokenizer = Tokenizer.from_dir(directory)
    for text in TEXTS:
        for special in (False, True):
            expected = reference.encode(text, add_special_tokens=special, truncation=False, padding=False)
            assert tokenizer.encode(text, add_special_tokens=special) == expected
        ids = tokenizer.encode(text)
        for skip in (False, True):
            expected_text = reference.decode(ids, skip_special_tokens=skip)
            assert tokenizer.decode(ids, skip_special_tokens=skip) == expected_text
    assert tokenizer.vocab_size == len(reference)


def test_special_tokens(directory: Path) -> None:
    tokenizer = Tokenizer.from_dir(directory)
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assert tokenizer.special_ids == {tokenizer.token_id(t) for t in SPECIAL}
    assert tokenizer.encode("<|image_pad|>") == [tokenizer.token_id("<|image_pad|>")]
    with pytest.raises(ConfigError, match=r"has no token '<\|nothing\|>'"):
        tokenizer.token_id("<|nothing|>")


def test_end_tokens_come_from_the_first_file_that_names_them(directory: Path) -> None:
    im_end = Tokenizer.from_dir(directory).token_id("<|im_end|>")
    assert Tokenizer.from_dir(directory).eos_token_ids == {im_end}
    write(directory / "config.json", {"text_config": {"eos_token_id": 7}})
    assert Tokenizer.from_dir(directory).eos_token_ids == {7}
    write(directory / "config.json", {"eos_token_id": 8, "text_config": {"eos_token_id": 7}})
    assert Tokenizer.from_dir(directory).eos_token_ids == {8}
    write(directory / "generation_config.json", {"eos_token_id": [1, 2]})
    assert Tokenizer.from_dir(directory).eos_token_ids == {1, 2}
    write(directory / "generation_config.json", {"eos_token_id": "x"})
    with pytest.raises(ConfigError, match="eos_token_id is 'x'"):
        Tokenizer.from_dir(directory)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "does not exist"),
        ("tokenizer.json", "{", "cannot be read as JSON"),
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("tokenizer.json", "[]", "must hold a JSON object"),
        ("tokenizer_config.json", "nonsense", "cannot be read as JSON"),
        ("generation_config.json", "3", "must hold a JSON object"),
    ],
)
def test_missing_or_broken_file_is_one_clear_line(
    directory: Path, file: str, content: str | None, message: str
) -> None:
    path = directory / file
    if content is None:
        path.unlink()
    else:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(EngineDirError) as caught:
        Tokenizer.from_dir(directory)
    assert str(path) in str(caught.value) and message in str(caught.value) and "\n" not in str(caught.value)


class Letters:
    """The smallest tokenizer that a caller may bring."""

    eos_token_id = 0

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(map(chr, token_ids))


def test_given_objects(directory: Path) -> None:
    letters = Tokenizer.wrap(Letters())
    assert letters.decode(letters.encode("abc", add_special_tokens=True)) == "abc"
    assert letters.eos_token_ids == {0} and letters.special_ids == frozenset()
    with pytest.raises(ConfigError, match="has no token"):
        letters.token_id("a")
    with pytest.raises(ConfigError, match="vocabulary size"):
        _ = letters.vocab_size
    assert Tokenizer.wrap(letters) is letters

    path = str(directory / "tokenizer.json")
    from_files = Tokenizer.from_dir(directory)
    fast = PreTrainedTokenizerFast(tokenizer_file=path, eos_token="<|im_end|>", bos_token="<|begin|>")
    for given in (Tokenizer.wrap(fast), Tokenizer.wrap(from_files._backend)):
        text = "the red <|im_end|>circle"
        ids = from_files.encode(text)
        assert given.encode(text) == ids
        assert given.decode(ids) == "the red circle" and given.vocab_size == from_files.vocab_size
        assert given.token_id("<|im_start|>") == from_files.token_id("<|im_start|>")
    special = {"eos_token": "<|im_end|>", "bos_token": "<|begin|>", "pad_token": "<|endoftext|>"}
    assert Tokenizer.wrap(fast).special_tokens == special
    assert Tokenizer.wrap(fast).eos_token_ids == from_files.eos_token_ids
    with pytest.raises(ConfigError, match="a int has no method encode"):
        Tokenizer.wrap(3)
