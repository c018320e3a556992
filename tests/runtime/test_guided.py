"""Guided output: what may come next, what is refused, and answers of the tiny model that always fit."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLParserLimits
from tokenizers import decoders, models, pre_tokenizers

from edgellm import LLM, GuidedDecodingParams, SamplingParams
from edgellm.errors import ConfigError, RequestError
from edgellm.runtime import guided
from edgellm.runtime.guided import GuidedDecoder, GuidedState, MaskWorker, apply_bitmask, mask_words
from edgellm.runtime.tokenizer import Tokenizer

TINY = Path(__file__).resolve().parents[2] / "assets" / "tiny_vlm"
V = 1536
EOS = {1510, 1512}
CHOICES = ["left", "right", "straight ahead", "strai", 'say "stop"\n', "走れ 🤖", "a|b", "/x/"]
ARITHMETIC = """root ::= term (("+" | "-") term){0,3}
term ::= num | "(" num "*" num ")"
num ::= [1-9] [0-9]{0,3}
"""
ARITHMETIC_LARK = """start: term (("+" | "-") term){0,3}
term: NUM | "(" NUM "*" NUM ")"
NUM: /[1-9][0-9]{0,3}/
"""
SCENE = {
    "type": "object",
    "properties": {
        "objects": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 12},
                    "color": {"enum": ["red", "green", "blue"]},
                    "box": {
                        "type": "array",
                        "items": {"type": "integer", "minimum": 0, "maximum": 999},
                        "minItems": 4,
                        "maxItems": 4,
                    },
                    "note": {"type": ["string", "null"], "maxLength": 5},
                },
                "required": ["name", "color", "box"],
                "additionalProperties": False,
            },
            "maxItems": 3,
        },
        "steer": {"enum": ["left", "right", "straight"]},
    },
    "required": ["objects", "steer"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(TINY)


@pytest.fixture(scope="module")
def decoder(tokenizer: Tokenizer) -> GuidedDecoder:
    return GuidedDecoder(tokenizer, V)


@pytest.fixture(scope="module")
def llm(tiny_engine: Path) -> Iterator[LLM]:
    with LLM(tiny_engine, num_threads=2) as llm:
        yield llm


def allowed(state: GuidedState, vocab_size: int = V) -> set[int]:
    row_W = torch.zeros(mask_words(vocab_size), dtype=torch.int32)
    state.fill_mask(row_W)
    return {i for i in range(vocab_size) if int(row_W[i // 32]) >> (i % 32) & 1}


def walk(state: GuidedState, tokenizer: Tokenizer, seed: int, wander: int = 30, most: int = 400) -> str:
    """A random text that the state allows; after `wander` tokens it takes the way to the end."""
    generator = torch.Generator().manual_seed(seed)
    ends = [tokenizer.token_id(c) for c in '}]",0e:1']
    quote, letter = tokenizer.token_id('"'), tokenizer.token_id("q")
    ids: list[int] = []
    while not state.is_terminated and len(ids) < most:
        may = allowed(state)
        assert may
        assert bool(may & EOS) == state.is_complete
        token = sorted(may)[int(torch.randint(len(may), (1,), generator=generator))]
        if len(ids) > wander:
            in_string = letter in may and quote in may
            token = next((t for t in (*EOS, *([quote] if in_string else ends)) if t in may), token)
        assert state.accept(token)
        ids.append(token)
    assert state.is_terminated
    return tokenizer.decode(ids)


def accepts(state: GuidedState, tokenizer: Tokenizer, text: str) -> bool:
    return all(state.accept(t) for t in tokenizer.encode(text)) and state.is_complete


# What may come next


@pytest.mark.parametrize("choice", CHOICES)
def test_choice_takes_each_of_its_strings(decoder: GuidedDecoder, tokenizer: Tokenizer, choice: str) -> None:
    state = decoder.start(GuidedDecodingParams(choice=CHOICES))
    assert not allowed(state) & EOS
    assert accepts(state, tokenizer, choice)
    assert state.is_terminated == (choice != "strai")
    assert not state.accept(tokenizer.token_id("z"))
    assert state.accept(1512) == (choice == "strai")
    assert state.is_terminated


def test_a_refused_token_changes_nothing(decoder: GuidedDecoder, tokenizer: Tokenizer) -> None:
    state = decoder.start(GuidedDecodingParams(regex="ab+"))
    assert not state.accept(1512)
    assert not state.accept(tokenizer.token_id("b"))
    assert not state.is_terminated
    assert state.failure() is None
    assert accepts(state, tokenizer, "abbb")


def test_a_copy_goes_its_own_way(decoder: GuidedDecoder, tokenizer: Tokenizer) -> None:
    state = decoder.start(GuidedDecodingParams(choice=["ax", "ay"]))
    assert state.accept(tokenizer.token_id("a"))
    other = state.copy()
    assert other.accept(tokenizer.token_id("x"))
    assert other.is_terminated
    assert not state.is_terminated
    assert accepts(state, tokenizer, "y")


def test_forced_tokens(decoder: GuidedDecoder, tokenizer: Tokenizer) -> None:
    state = decoder.start(GuidedDecodingParams(regex="(yes|no), captain of the ship!"))
    assert state.forced_tokens() == []
    for token in tokenizer.encode("yes"):
        assert state.accept(token)
    forced = state.forced_tokens()
    assert forced
    assert ", captain of the ship!".startswith(tokenizer.decode(forced))
    assert all(state.accept(t) for t in forced)


def test_special_tokens_are_no_text(decoder: GuidedDecoder, tokenizer: Tokenizer) -> None:
    special = set(range(1510, V)) - EOS
    for params in ({"regex": ".*"}, {"json_schema": {"type": "string"}}, {"json_object": True}):
        state = decoder.start(GuidedDecodingParams(**params))
        for _ in range(3):
            assert not allowed(state) & special
            state.accept(min(allowed(state)))
    state = decoder.start(GuidedDecodingParams(ebnf='start: <tool_call> "x"'))
    assert allowed(state) == {tokenizer.token_id("<tool_call>")}


def test_padding_of_the_vocabulary_is_never_allowed(tokenizer: Tokenizer) -> None:
    state = GuidedDecoder(tokenizer, V + 77).start(GuidedDecodingParams(regex=".*"))
    assert max(allowed(state, V + 77)) < V


def test_json_whitespace_is_free_but_not_endless(decoder: GuidedDecoder, tokenizer: Tokenizer) -> None:
    params = GuidedDecodingParams(json_object=True)
    value = {"a": [1, {"b": "x"}], "c": None}
    for text in (*(json.dumps(value, indent=i) for i in (None, 1, 2, 4)), json.dumps(value, separators=(",", ":"))):
        assert accepts(decoder.start(params), tokenizer, text)
    assert not accepts(decoder.start(params), tokenizer, '{"a":\n\n\n1}')


@pytest.mark.parametrize("seed", range(15))
def test_random_walks_fit(decoder: GuidedDecoder, tokenizer: Tokenizer, seed: int) -> None:
    value = json.loads(walk(decoder.start(GuidedDecodingParams(json_schema=SCENE)), tokenizer, seed))
    jsonschema.validate(value, SCENE)
    assert isinstance(json.loads(walk(decoder.start(GuidedDecodingParams(json_object=True)), tokenizer, seed)), dict)
    regex = r"[A-Z]\w{0,5}( \d{2,3})?(,[^a-z,]{1,4}){0,2}"
    assert re.fullmatch(regex, walk(decoder.start(GuidedDecodingParams(regex=regex)), tokenizer, seed))
    assert walk(decoder.start(GuidedDecodingParams(choice=CHOICES)), tokenizer, seed) in CHOICES
    for grammar in (ARITHMETIC, ARITHMETIC_LARK):
        ast.parse(walk(decoder.start(GuidedDecodingParams(ebnf=grammar)), tokenizer, seed), mode="eval")


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
    bounds = st.tuples(st.integers(-300, 300), st.integers(0, 500))
    sizes = st.tuples(st.integers(0, 2), st.integers(0, 2))
    leaves = st.one_of(
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "integer"}, {"type": "number"}]),
        bounds.map(lambda b: {"type": "integer", "minimum": b[0], "maximum": b[0] + b[1]}),
        bounds.map(lambda b: {"type": "number", "minimum": b[0], "exclusiveMaximum": b[0] + b[1] + 1}),
        sizes.map(lambda s: {"type": "string", "minLength": s[0], "maxLength": s[0] + s[1]}),
        st.just({"type": "string", "pattern": "^[a-f]{2,4}$"}),
        st.just({"type": "string", "format": "date"}),
        st.lists(st.one_of(text, st.integers(-9, 9), st.booleans(), st.none()), min_size=1, max_size=4).map(
            lambda values: {"enum": values}
        ),
        text.map(lambda value: {"const": value}),
    )

    def nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        arrays = st.tuples(inner, sizes).map(
            lambda p: {"type": "array", "items": p[0], "minItems": p[1][0], "maxItems": p[1][0] + p[1][1]}
        )
        objects = st.tuples(st.dictionaries(text, inner, max_size=3), st.randoms()).map(
            lambda p: {
                "type": "object",
                "properties": p[0],
                "required": [k for k in p[0] if p[1].random() < 0.5],
                "additionalProperties": False,
            }
        )
        return st.one_of(arrays, objects, st.lists(inner, min_size=1, max_size=3).map(lambda any_: {"anyOf": any_}))

    return st.recursive(leaves, nested, max_leaves=5)


@settings(max_examples=60, deadline=None)
@given(schema=schemas(), seed=st.integers(0, 1000))
def test_random_schemas(decoder: GuidedDecoder, tokenizer: Tokenizer, schema: dict[str, Any], seed: int) -> None:
    state = decoder.start(GuidedDecodingParams(json_schema=schema))
    jsonschema.validate(json.loads(walk(state, tokenizer, seed, wander=60, most=2000)), schema)


# What is refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "exactly one of json_schema, json_object, regex, choice, ebnf; got 0"),
        ({"regex": "a", "json_object": True}, "got json_object and regex"),
        ({"json_object": 1}, "json_object is 1"),
        ({"json_schema": '{"type":'}, "json_schema is not JSON: Expecting value: line 1"),
        ({"json_schema": "[1]"}, r"json_schema is \[1\]; it must be a JSON object"),
        ({"json_schema": {"type": {1}}}, "json_schema is not JSON: Object of type set"),
        ({"json_schema": '{"items":' * 10_000}, "nested too deeply"),
        ({"json_schema": '{"items":' * 20_000}, "json_schema has 180,000 bytes; the most is 100,000"),
        ({"json_schema": {"type": "robot"}}, "json_schema cannot be used: Invalid type: robot"),
        ({"json_schema": {"uniqueItems": True}}, "Unimplemented keys.*uniqueItems"),
        ({"json_schema": {"type": "string", "pattern": "(?=a)"}}, "look-around"),
        ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 2}}, "minimum .5. is greater than maximum"),
        ({"json_schema": {"$ref": "#/$defs/a"}}, "'/\\$defs/a' does not exist"),
        ({"json_schema": {"$ref": "https://example.com/s.json"}}, "Default retriever does not fetch"),
        ({"json_schema": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}}, "no text matches it"),
        ({"regex": ""}, "regex is ''; it must be a text"),
        ({"regex": b"a"}, "regex is b'a'"),
        ({"regex": "a{2,3"}, "regex cannot be used: unclosed counted repetition"),
        ({"regex": "x" * 5000 + "("}, "regex cannot be used: unclosed group"),
        ({"regex": "(" * 3000 + ")" * 3000}, "nested"),
        ({"regex": "[a&&b]"}, "no text matches it"),
        ({"regex": "x" * 100_001}, "regex has 100,001 bytes"),
        ({"regex": "\ud800"}, "regex holds half of a surrogate pair"),
        ({"choice": []}, r"choice is \[\]"),
        ({"choice": "left"}, "choice is 'left'; it must be a list of strings"),
        ({"choice": ["left", ""]}, "none of them empty"),
        ({"choice": [str(i) for i in range(1001)]}, "choice has 1001 entries; the most is 1000"),
        ({"ebnf": "start: missing"}, "unknown name: .missing"),
        ({"ebnf": "root ::= missing"}, "Rule 'missing' not found"),
        ({"ebnf": 'start: "a'}, "lexer error"),
        ({"ebnf": "no grammar at all"}, "Expected ::="),
        ({"ebnf": "start: start"}, "no text matches it"),
    ],
)
def test_what_cannot_be_used_is_one_line(decoder: GuidedDecoder, values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        decoder.start(GuidedDecodingParams(**values))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@settings(max_examples=200, deadline=None)
@given(kind=st.sampled_from(["regex", "ebnf", "json_schema"]), text=st.text(max_size=40))
def test_any_text_is_used_or_refused(decoder: GuidedDecoder, kind: str, text: str) -> None:
    try:
        state = decoder.start(GuidedDecodingParams(**{kind: text}))
    except RequestError as e:
        lines = str(e).splitlines()
    else:
        lines = ["used"] if allowed(state) else []
    assert len(lines) == 1


def test_equal_parameters_share_a_grammar(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = GuidedDecoder(tokenizer, V)
    assert GuidedDecodingParams(json_schema={"type": "null"}) == GuidedDecodingParams(json_schema='{ "type":"null"}')
    compiled: list[str] = []
    compile_ = decoder._compile
    monkeypatch.setattr(decoder, "_compile", lambda p: (compiled.append(p.regex), compile_(p))[1])
    monkeypatch.setattr(guided, "CACHED_GRAMMARS", 2)
    for regex in ("a", "b", "a", "c", "a", "b"):
        decoder.start(GuidedDecodingParams(regex=regex))
    assert compiled == ["a", "b", "c", "b"]


def test_tokenizers_that_cannot_be_guided(tokenizer: Tokenizer) -> None:
    class Words:
        eos_token_id = 0

        def encode(self, text: str) -> list[int]:
            return [1]

        def decode(self, ids: list[int]) -> str:
            return "a"

    with pytest.raises(ConfigError, match="Words; guided output needs one of the library tokenizers"):
        GuidedDecoder(Tokenizer.wrap(Words()), V)
    with pytest.raises(ConfigError, match="end token"):
        GuidedDecoder(Tokenizer(tokenizer._backend), V)
    whole_words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(ConfigError, match="does not work with this tokenizer"):
        GuidedDecoder(Tokenizer(whole_words, eos_token_ids=[1]), V)


def test_a_byte_fallback_tokenizer() -> None:
    vocab = {"<unk>": 0, "</s>": 1, **{f"<0x{b:02X}>": 2 + b for b in range(256)}, "▁": 258, "a": 259, "b": 260}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "</s>"])
    state = GuidedDecoder(Tokenizer(backend, eos_token_ids=[1]), 261).start(GuidedDecodingParams(regex="a é"))
    for token in (259, 258, 2 + 0xC3, 2 + 0xA9):
        assert token in allowed(state, 261)
        assert state.accept(token)
    assert state.is_terminated


# The masks of a batch


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 1536, 2000])
def test_apply_bitmask(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    may = torch.rand(3, vocab_size, generator=generator) < 0.5
    bits = torch.zeros(3, mask_words(vocab_size) * 32, dtype=torch.int64)
    bits[:, :vocab_size] = may
    words = (bits.view(3, -1, 32) << torch.arange(32)).sum(-1)
    bitmask = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    logits = torch.randn(3, vocab_size, generator=generator)
    expected = logits.masked_fill(~may, -torch.inf)
    apply_bitmask(logits, bitmask)
    assert torch.equal(logits, expected)


def test_mask_worker_follows_the_rows(decoder: GuidedDecoder, tokenizer: Tokenizer) -> None:
    worker = MaskWorker(4, V)
    a, b = (decoder.start(GuidedDecodingParams(regex=r)) for r in ("[a-f]+", "[0-9]+"))
    for states in ([None, a, b], [b, None, a, None], [a], [None, None], [b, a]):
        worker.start(states)
        bitmask, failures = worker.finish()
        assert failures == {}
        if bitmask is None:
            assert not any(states)
            continue
        assert len(bitmask) == len(states)
        logits = torch.zeros(len(states), V)
        apply_bitmask(logits, bitmask)
        for row, state in enumerate(states):
            got = set((logits[row] == 0).nonzero()[:, 0].tolist())
            assert got == (set(range(V)) if state is None else allowed(state))
    assert worker.finish() == (None, {})
    worker.close()


def test_a_grammar_that_grows_too_complex_fails_alone(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guided, "_LIMITS", LLParserLimits(step_max_items=30, verbose_errors=False))
    decoder = GuidedDecoder(tokenizer, V)
    bad = decoder.start(GuidedDecodingParams(ebnf='start: "[" a\na: "x" | a a | a "x" a'))
    good = decoder.start(GuidedDecodingParams(regex="x+"))
    worker = MaskWorker(2, V)
    for token in tokenizer.encode("[xxxxxxxx"):
        if not bad.accept(token):
            break
    worker.start([bad, good])
    bitmask, failures = worker.finish()
    worker.close()
    assert list(failures) == [0]
    assert "guided output cannot go on" in str(failures[0])
    assert bitmask is not None
    assert (bitmask[0] == -1).all()
    assert not (bitmask[1] == -1).all()


# The tiny model


def test_answers_of_the_tiny_model_fit(llm: LLM) -> None:
    for temperature in (0.0, 1.5):
        seeds = range(1 if temperature == 0.0 else 6)
        params = [SamplingParams(max_tokens=600, temperature=temperature, seed=s) for s in seeds]

        def ask(seeds_params: list[SamplingParams], **kind: Any) -> list[str]:
            outputs = llm.generate(
                ["What do you see?"] * len(seeds_params), seeds_params, guided=GuidedDecodingParams(**kind)
            )
            assert {o.outputs[0].finish_reason for o in outputs} == {"stop"}
            return [o.text for o in outputs]

        for text in ask(params, json_schema=SCENE):
            jsonschema.validate(json.loads(text), SCENE)
        regex = "[a-z]{3,9}( [0-9]{1,3}x){1,4}"
        assert all(re.fullmatch(regex, text) for text in ask(params, regex=regex))
        assert all(text in CHOICES for text in ask(params, choice=CHOICES))
        for text in ask(params, ebnf=ARITHMETIC):
            ast.parse(text, mode="eval")


def test_guided_and_free_requests_share_a_batch(llm: LLM) -> None:
    free = SamplingParams(max_tokens=30, temperature=1.0, seed=5, ignore_eos=True)
    alone = llm.generate("Hello.", free).text
    handles = [
        llm.generate_async("Hello.", free),
        llm.generate_async("Hello.", free, guided=GuidedDecodingParams(choice=["one", "two"])),
        llm.generate_async("Hello.", free, guided=GuidedDecodingParams(json_schema=SCENE)),
        llm.generate_async("Hello.", free),
    ]
    texts = [h.result(30).text for h in handles]
    assert texts[0] == texts[3] == alone
    assert texts[1] in ("one", "two")
    again = llm.generate("Hello.", free, guided=GuidedDecodingParams(json_schema=SCENE)).text
    assert again == texts[2]


def test_max_tokens_cuts_a_guided_answer(llm: LLM, decoder: GuidedDecoder) -> None:
    params = GuidedDecodingParams(json_schema=SCENE)
    output = llm.generate("Hello.", SamplingParams(max_tokens=4), guided=params).outputs[0]
    assert (output.finish_reason, len(output.token_ids)) == ("length", 4)
    state = decoder.start(params)
    assert all(state.accept(t) for t in output.token_ids)
    assert not state.is_complete


def test_bad_guided_parameters_are_refused_at_once(llm: LLM, tiny_engine: Path) -> None:
    with pytest.raises(RequestError, match="unclosed group"):
        llm.generate_async("Hello.", guided=GuidedDecodingParams(regex="("))
    with LLM(tiny_engine, skip_tokenizer_init=True) as bare, pytest.raises(RequestError, match="skip_tokenizer_init"):
        bare.generate_async([5, 6], guided=GuidedDecodingParams(regex="a"))
