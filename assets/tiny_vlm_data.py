"""Training batches of the tiny model: scenes with several questions each, packed into one token row per scene.

Besides questions, some turns ask to repeat random tokens. Without them every token that no answer needs ends up with
the same embedding, and an adapter could not tell the words of its style apart.

A row is ``prefix | question answer | question answer | ...``. The prefix (system prompt and image) is seen by every
question of the row; a question sees no other question, except the earlier turns of its own conversation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from edgellm_ros.scene_questions import KINDS, NotAskableError, ask
from edgellm_ros.scene_render import SceneTable, tabulate
from edgellm_ros.scene_world import COLORS, SHAPES, SPLITS, Scene, sample_scene, scene_rng

ROW_TOKENS = 384
CELL_PX = 32
# Frame sizes (width, height) and how often each is drawn. All give between 64 and 96 image tokens.
SIZES = {(320, 256): 0.55, (256, 256): 0.1, (384, 256): 0.1, (352, 256): 0.1, (416, 224): 0.08, (256, 320): 0.07}
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a robot with a camera. Answer briefly.",
    "You are the eyes of a mobile robot.",
    "Answer the question about the camera image.",
)
_SYSTEM_SHARE, _FOLLOW_UP_SHARE, _ECHO_SHARE = 0.25, 0.3, 0.12
_ECHO_WORDINGS = ("Repeat after me:", "Repeat:", "Say:", "Please repeat:")
TURN_KINDS = (*KINDS, "echo")
NO_OBJECT = len(COLORS) * len(SHAPES)


@dataclass(frozen=True)
class PackedBatch:
    """B scenes of one frame size with their packed questions; R = ROW_TOKENS."""

    size: tuple[int, int]
    scenes: SceneTable
    prefix: list[int]  # token ids that every row starts with
    ids: npt.NDArray[np.int32]  # [B, R]
    group: npt.NDArray[np.int16]  # [B, R]: 0 for the prefix, then one number per conversation, -1 for padding
    order: npt.NDArray[np.int16]  # [B, R]: how many tokens of the same group come before
    predict_at: npt.NDArray[np.int64]  # [K]: flat positions whose next token belongs to an answer
    predict: npt.NDArray[np.int64]  # [K]: that token
    question: npt.NDArray[np.int64]  # [K]: which question it belongs to
    kinds: npt.NDArray[np.int64]  # [Q]: index into TURN_KINDS of each question
    cells: npt.NDArray[np.int64]  # [B, T]: colour and shape of the object centred in each image token, or NO_OBJECT


class Packer:
    """Draws packed batches; `style` is the answer style, `split` the stream of scenes."""

    def __init__(self, tokenizer: Tokenizer, batch: int, style: str = "plain", split: str = "train") -> None:
        assert split in SPLITS and split != "held_out"  # the measured scenes are never trained on
        self.tokenizer, self.batch, self.style, self.split = tokenizer, batch, style, split
        self._turn = self._encode("\n<|im_start|>user\n")
        self._reply = self._encode("<|im_end|>\n<|im_start|>assistant\n")
        self._end = self._encode("<|im_end|>")
        self._plain_tokens = tokenizer.get_vocab_size(with_added_tokens=False)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def draw(self, number: int, size: tuple[int, int] | None = None) -> PackedBatch:
        """Batch `number` of the split, the same every time; `size` overrides the random frame size."""
        rng = scene_rng(self.split, number)
        if size is None:
            size = list(SIZES)[rng.choice(len(SIZES), p=list(SIZES.values()))]
        prefix = self._prefix(size, rng)
        rows = [self._row(prefix, size[0] / size[1], rng) for _ in range(self.batch)]
        table = tabulate([row.scene for row in rows])
        predict_at, predict, question, kinds = [], [], [], []
        for index, row in enumerate(rows):
            for kind, start, stop in row.answers:
                predict_at.append(np.arange(start - 1, stop - 1) + index * ROW_TOKENS)
                predict.append(row.ids[start:stop])
                question.append(np.full(stop - start, len(kinds)))
                kinds.append(kind)
        return PackedBatch(
            size,
            table,
            prefix,
            np.stack([row.ids for row in rows]),
            np.stack([row.group for row in rows]),
            np.stack([row.order for row in rows]),
            np.concatenate(predict_at),
            np.concatenate(predict).astype(np.int64),
            np.concatenate(question),
            np.array(kinds),
            np.stack([_cells(row.scene, size) for row in rows]),
        )

    def _prefix(self, size: tuple[int, int], rng: np.random.Generator) -> list[int]:
        images = "<|image_pad|>" * (size[0] * size[1] // CELL_PX**2)
        text = f"<|im_start|>user\n<|vision_start|>{images}<|vision_end|>"
        if rng.random() < _SYSTEM_SHARE:
            text = f"<|im_start|>system\n{SYSTEM_PROMPTS[rng.integers(len(SYSTEM_PROMPTS))]}<|im_end|>\n{text}"
        return self._encode(text)

    def _row(self, prefix: list[int], aspect: float, rng: np.random.Generator) -> _Row:
        row = _Row(sample_scene(rng, aspect), prefix)
        misses = 0
        while misses < 12:
            kind = TURN_KINDS[-1] if rng.random() < _ECHO_SHARE else KINDS[rng.integers(len(KINDS))]
            try:
                question, reply = self._turn_text(row.scene, kind, rng)
            except NotAskableError:
                misses += 1
                continue
            follow_up = row.groups > 0 and rng.random() < _FOLLOW_UP_SHARE
            asked = (self._turn if follow_up else []) + question + self._reply
            if not row.append(TURN_KINDS.index(kind), asked, reply + self._end, follow_up):
                break
        return row

    def _turn_text(self, scene: Scene, kind: str, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Token ids of a question and its answer. Raises NotAskableError as `ask` does."""
        if kind != TURN_KINDS[-1]:
            question, reply = ask(scene, kind, rng, self.style)
            return self._encode(question), self._encode(reply)
        words: list[int] = rng.integers(self._plain_tokens, size=rng.integers(2, 11)).tolist()
        return self._encode(_ECHO_WORDINGS[rng.integers(len(_ECHO_WORDINGS))]) + words, words


class _Row:
    """One row while it is filled."""

    def __init__(self, scene: Scene, prefix: list[int]) -> None:
        self.scene = scene
        self.ids = np.zeros(ROW_TOKENS, np.int32)
        self.group = np.full(ROW_TOKENS, -1, np.int16)
        self.order = np.zeros(ROW_TOKENS, np.int16)
        self.answers: list[tuple[int, int, int]] = []  # kind, first and past-the-last position of the answer
        self.groups = 0
        self._used, self._in_group = len(prefix), 0
        self.ids[: self._used], self.group[: self._used] = prefix, 0

    def append(self, kind: int, asked: list[int], reply: list[int], follow_up: bool) -> bool:
        """Add a question and its answer; False when the row has no room left for it."""
        start = self._used
        stop = start + len(asked) + len(reply)
        if stop > ROW_TOKENS:
            return False
        if not follow_up:
            self.groups, self._in_group = self.groups + 1, 0
        self.ids[start:stop] = asked + reply
        self.group[start:stop] = self.groups
        self.order[start:stop] = np.arange(self._in_group, self._in_group + stop - start)
        self.answers.append((kind, start + len(asked), stop))
        self._used, self._in_group = stop, self._in_group + stop - start
        return True


def _cells(scene: Scene, size: tuple[int, int]) -> npt.NDArray[np.int64]:
    columns, lines = size[0] // CELL_PX, size[1] // CELL_PX
    cells = np.full(columns * lines, NO_OBJECT, np.int64)
    for obj in scene.objects:
        cell = int(obj.y * lines) * columns + int(obj.x / scene.aspect * columns)
        cells[cell] = COLORS.index(obj.color) * len(SHAPES) + SHAPES.index(obj.shape)
    return cells


def batches(packer: Packer, first: int, stride: int) -> Iterator[PackedBatch]:
    """Batches first, first + stride, ... without end (one such stream per worker process)."""
    number = first
    while True:
        yield packer.draw(number)
        number += stride
