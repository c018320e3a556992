"""Guided output's cost on the host: compiling a grammar, and the mask of each token of a text that fits it.

    python benchmarks/guided.py TOKENIZER_DIR VOCAB_SIZE

Walks along fixed texts, so that every run measures the same states. Percentiles are over the tokens of a text.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from edgellm.runtime.guided import GuidedDecoder, GuidedDecodingParams, apply_bitmask, mask_words
from edgellm.runtime.metrics import Distribution
from edgellm.runtime.tokenizer import Tokenizer

ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "color": {"enum": ["red", "green", "blue", "yellow"]},
        "box": {"type": "array", "items": {"type": "integer"}, "minItems": 4, "maxItems": 4},
    },
    "required": ["name", "color", "box"],
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "properties": {"objects": {"type": "array", "items": ITEM}, "note": {"type": "string", "maxLength": 200}},
    "required": ["objects", "note"],
    "additionalProperties": False,
}
SCENE = {
    "objects": [{"name": "a red circle near the wall", "color": "red", "box": [1, 22, 333, 4444]}] * 6,
    "note": "The way ahead is clear; turn left after the second object, then stop and wait.",
}
CASES = {
    "json_schema": (GuidedDecodingParams(json_schema=SCHEMA), json.dumps(SCENE)),
    "json_object": (GuidedDecodingParams(json_object=True), json.dumps(SCENE)),
    "regex": (GuidedDecodingParams(regex=r"\d{3}-\d{4}( [a-z]+){1,60}"), "555-1234" + " goes to the kitchen" * 10),
    "choice": (GuidedDecodingParams(choice=["left", "right", "straight ahead"]), "straight ahead"),
    "ebnf": (
        GuidedDecodingParams(ebnf='root ::= n ("+" n)*\nn ::= [0-9]+ | "(" root ")"'),
        "12+(3+(44+5))" + "+7" * 20,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer_dir", type=Path, help="directory with a tokenizer.json")
    parser.add_argument("vocab_size", type=int, help="width of the model's logits")
    options = parser.parse_args()
    tokenizer = Tokenizer.from_dir(options.tokenizer_dir)
    start = time.perf_counter()
    decoder = GuidedDecoder(tokenizer, options.vocab_size)
    print(f"vocabulary of {options.vocab_size}: decoder built in {time.perf_counter() - start:.2f} s")
    row_W = torch.zeros(mask_words(options.vocab_size), dtype=torch.int32)
    for name, (params, text) in CASES.items():
        start = time.perf_counter()
        state = decoder.start(params)
        compile_s = time.perf_counter() - start
        times = []
        for token in tokenizer.encode(text):
            start = time.perf_counter()
            state.fill_mask(row_W)
            times.append(time.perf_counter() - start)
            if not state.accept(token):
                raise SystemExit(f"{name}: the text does not fit")
        got = Distribution.of(times)
        assert got is not None
        figures = ", ".join(f"{k} {1e6 * getattr(got, k):.0f} us" for k in ("p50", "p99", "max"))
        print(f"{name:12} compile {1e3 * compile_s:7.2f} ms, mask of {got.count} tokens: {figures}")
    for rows in (1, 8, 32):
        logits, masks = torch.randn(rows, options.vocab_size), row_W.repeat(rows, 1)
        best = min(_timed(lambda logits=logits, masks=masks: apply_bitmask(logits, masks)) for _ in range(10))
        print(f"apply to {rows:2} rows on the CPU: {1e6 * best:.0f} us")


def _timed(function: object) -> float:
    start = time.perf_counter()
    function()  # type: ignore[operator]
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
