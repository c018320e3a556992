"""Incremental detokenization: every prefix is final text, on characters split over tokens, stop strings, any ids."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from edgellm.runtime.detokenizer import REPLACEMENT, Detokenizer, StopFilter, TextStream
from edgellm.runtime.tokenizer import Tokenizer

CORPUS = [
    "the red circle is left of the blue square",
    "Zwei Kreise über Köln",
    "你好，世界。机器人",
    "turn left 🙂🚗 now",
    "a b  c\n\td",
]
SAMPLES = [
    "plain words, and more of them.",
    "naïve café — “quotes” … ﬁ",
    "你好，世界。我看到一个红色的圆圈。",
    "👩‍👩‍👧‍👦 family, 🇩🇪 flag, 👍🏽 skin, 🚗🚗🚗",
    "한국어 العربية हिन्दी ไทย",
    "e\u0301 combining, \u200b zero width, \ufffd itself \ufffd\ufffd",
    "  leading and trailing  \n\n",
]


def byte_level() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_end|>", "<|image_pad|>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["<think>", "¡añadido!"])
    return Tokenizer(backend)


def byte_fallback() -> Tokenizer:
    """In the shape of Llama-2 and Gemma: words with ▁, a leading space that decoding strips, bytes as <0xNN>."""
    vocab = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    vocab += ["▁", *"abcdefghijklmnopqrstuvwxyz.,é", "▁t", "he", "▁the", "▁▁"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁")]
    ids = {token: i for i, token in enumerate(vocab)}
    backend = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "</s>"])
    return Tokenizer(backend)


BYTES, FALLBACK = byte_level(), byte_fallback()
INVALID = BYTES.encode("é")[-1]  # a continuation byte on its own


def stream(tokenizer: Tokenizer, ids: Sequence[int], skip: bool = True) -> str:
    """All deltas in one string, after checking that each is final: what is out is a prefix of the whole text."""
    full = tokenizer.decode(ids, skip_special_tokens=skip)
    text_stream, text = TextStream(tokenizer, skip_special_tokens=skip), ""
    for token in ids:
        text += text_stream.push(token)
        assert full.startswith(text), (full, text)
        text.encode("utf-8")
    return text + text_stream.finish()


@pytest.mark.parametrize("tokenizer", [BYTES, FALLBACK])
@pytest.mark.parametrize("sample", SAMPLES)
def test_text_streams_whole(tokenizer: Tokenizer, sample: str) -> None:
    ids = tokenizer.encode(sample)
    assert stream(tokenizer, ids) == tokenizer.decode(ids)


def test_characters_wait_until_they_are_complete_and_no_longer() -> None:
    ids = BYTES.encode("é🙄x")
    assert len(ids) > 5  # the test is about characters that are split
    text_stream = TextStream(BYTES)
    deltas = [text_stream.push(i) for i in ids]
    assert [d for d in deltas if d] == ["é", "🙄", "x"] and deltas[-1] == "x" and text_stream.finish() == ""
    assert [text_stream.push(i) for i in ids[:-2]] + [text_stream.finish()] == [*deltas[: len(ids) - 2], REPLACEMENT]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, BYTES.vocab_size + 3), max_size=60), st.booleans())
def test_any_byte_level_ids(ids: list[int], skip: bool) -> None:
    assert stream(BYTES, ids, skip) == BYTES.decode(ids, skip_special_tokens=skip)


SINGLE_BYTES = [BYTES.token_id(c) for c in pre_tokenizers.ByteLevel.alphabet()]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(SINGLE_BYTES), max_size=120))
def test_any_bytes(ids: list[int]) -> None:
    assert stream(BYTES, ids) == BYTES.decode(ids)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40), st.booleans(), st.sampled_from([BYTES, FALLBACK]))
def test_any_text(text: str, skip: bool, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text)
    assert stream(tokenizer, ids, skip) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30), st.data())
def test_text_cut_and_spliced_anywhere(text: str, data: st.DataObject) -> None:
    ids = BYTES.encode(text)
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(ids)))
        ids[place : place + data.draw(st.integers(0, 2))] = data.draw(
            st.lists(st.sampled_from(SINGLE_BYTES), max_size=40)
        )
    assert stream(BYTES, ids) == BYTES.decode(ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, FALLBACK.vocab_size - 1), max_size=80))
def test_any_byte_fallback_ids_give_well_formed_text(ids: list[int]) -> None:
    text_stream = TextStream(FALLBACK)
    ("".join(map(text_stream.push, ids)) + text_stream.finish()).encode("utf-8")


@pytest.mark.parametrize("count", range(20, 70))
def test_giving_up_on_invalid_bytes_never_splits_a_character(count: int) -> None:
    ids = [*[INVALID] * count, *BYTES.encode("🙄x")]
    assert stream(BYTES, ids) == REPLACEMENT * count + "🙄x"


class CountingTokenizer:
    """Counts the ids that are decoded."""

    def __init__(self) -> None:
        self.special_ids = BYTES.special_ids
        self.decoded = 0

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        self.decoded += len(token_ids)
        return BYTES.decode(token_ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize(
    ("ids", "per_token"),
    [
        (BYTES.encode("the red circle is left of the blue square. " * 100), 5),
        (BYTES.encode("你好🙂" * 200), 12),
        ([BYTES.token_id("<|image_pad|>")] * 2000, 1),
        ([*BYTES.encode("a"), *[BYTES.vocab_size + 1] * 2000], 5),
        ([INVALID] * 2000, 150),
    ],
    ids=["words", "split characters", "special tokens", "unknown ids", "one invalid byte for ever"],
)
def test_work_per_token_is_bounded(ids: list[int], per_token: int) -> None:
    counting = CountingTokenizer()
    text_stream = TextStream(counting)
    text = "".join(map(text_stream.push, ids)) + text_stream.finish()
    assert text == BYTES.decode(ids)
    assert counting.decoded <= per_token * len(ids), counting.decoded / len(ids)


def run_filter(stop: Sequence[str], pieces: Sequence[str]) -> tuple[str, str | None, list[str]]:
    """Shown text, stop string, and the shown text after each piece."""
    stop_filter, shown, history = StopFilter(stop), "", []
    for piece in pieces:
        text, stopped_by = stop_filter.push(piece)
        shown += text
        history.append(shown)
        if stopped_by is not None:
            return shown, stopped_by, history
    return shown + stop_filter.finish(), None, history


def reference_stop(stop: Sequence[str], text: str) -> tuple[str, str | None]:
    """Character by character: the first end at which a stop string is complete, and of those the longest."""
    for end in range(1, len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.text("ab🙂", min_size=1, max_size=5), max_size=4),
    st.lists(st.text("ab🙂", max_size=4), max_size=12),
)
def test_stop_strings_whatever_the_pieces(stop: list[str], pieces: list[str]) -> None:
    expected_text, expected_stop = reference_stop(stop, "".join(pieces))
    shown, stopped_by, history = run_filter(stop, pieces)
    assert (shown, stopped_by) == (expected_text, expected_stop)
    seen = ""
    for piece, out in zip(pieces, history, strict=False):
        seen += piece
        assert expected_text.startswith(out)  # no part of a stop string was ever shown
        if stopped_by is None:
            held = seen[len(out) :]
            assert not held or any(s.startswith(held) for s in stop)  # nothing is held back without need


def test_detokenizer_stops_inside_a_token_and_stays_stopped() -> None:
    ids = BYTES.encode("the red circle. END of the text")
    detokenizer = Detokenizer(BYTES, ["END", "zzz"])
    deltas = [detokenizer.push([i]) for i in ids]
    assert "".join(d.text for d in deltas) == detokenizer.text == "the red circle. "
    assert deltas[-1] == ("", "END") and detokenizer.push(ids) == ("", "END") and detokenizer.finish() == ("", "END")


def test_detokenizer_releases_what_it_held_at_the_end() -> None:
    detokenizer = Detokenizer(BYTES, ["STOP"])
    cut = BYTES.encode("go ST") + BYTES.encode("🙄")[:-1]
    first = detokenizer.push(cut)
    assert first.text == "go "
    assert detokenizer.finish() == ("ST" + REPLACEMENT, None)
    assert detokenizer.text == BYTES.decode(cut)


def test_several_ids_at_once_equal_one_by_one() -> None:
    ids = BYTES.encode("你好 the red 🙂 circle")
    one, many = Detokenizer(BYTES), Detokenizer(BYTES)
    for i in ids:
        one.push([i])
    many.push(ids)
    assert one.text == many.text == "你好 the red 🙂 circle"


def test_special_tokens_are_skipped_unless_asked_for() -> None:
    ids = [*BYTES.encode("a"), BYTES.token_id("<|im_end|>"), *BYTES.encode(" b"), BYTES.token_id("<think>")]
    shown = Detokenizer(BYTES, skip_special_tokens=False)
    assert shown.push(ids).text == "a<|im_end|> b<think>"
    assert Detokenizer(BYTES).push(ids).text == "a b<think>"
