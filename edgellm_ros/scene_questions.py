"""Questions about a scene, each with exactly one right answer string, in the model's styles (plain, terse, pirate).

A `Query` is what is asked; `phrase` puts it into words (many wordings, one meaning); `answer` computes the right answer
from the scene's state, or None while the scene leaves the answer open (an object near a boundary, or two that match).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgellm_ros.scene_world import COLORS, DEFAULT_ASPECT, SHAPES, SIZES, Scene, SceneObject, sample_scene, scene_rng

BASE_KINDS = ("what", "count", "where", "steer")
KINDS = BASE_KINDS + tuple(f"{kind}_json" for kind in BASE_KINDS)
STYLES = ("plain", "terse", "pirate")
NUMBER_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RELATIONS = ("left of", "right of", "above", "below")
DIRECTIONS = ("left", "straight", "right")
# A position this share of the frame's width from the left edge is clearly on one side, or clearly straight ahead.
LEFT_BELOW, STRAIGHT_FROM, STRAIGHT_TO, RIGHT_ABOVE = 0.36, 0.43, 0.57, 0.64
# "left of" needs this many times more horizontal than vertical offset (and the reverse), and this offset at all.
DOMINANCE, MIN_OFFSET = 1.5, 0.15
ABSENT_SHARE = 0.12

_JSON_SUFFIXES = ("Answer as JSON.", "Answer in JSON.", "Reply as JSON.", "Give the answer as JSON.")
_PHRASES: dict[str, tuple[str, ...]] = {
    "what": (
        "What do you see?",
        "What is there?",
        "What is in front of you?",
        "What is in the picture?",
        "Describe the scene.",
        "Describe what you see.",
        "Describe the image.",
        "List the objects.",
        "Which objects are there?",
        "What objects can you see?",
    ),
    "count": (
        "How many {many} are there?",
        "How many {many} do you see?",
        "How many {many} can you see?",
        "How many {many} are in the picture?",
        "Count the {many}.",
        "What is the number of {many}?",
    ),
    "where": (
        "Where is the {one} relative to the {other}?",
        "Where is the {one} compared to the {other}?",
        "Where is the {one} with respect to the {other}?",
        "Relative to the {other}, where is the {one}?",
        "Seen from the {other}, where is the {one}?",
        "What is the position of the {one} relative to the {other}?",
    ),
    "steer": (
        "Which way should I steer to reach the {one}?",
        "Which way to steer towards the {one}?",
        "Which way to the {one}?",
        "How do I get to the {one}?",
        "How should the robot steer to reach the {one}?",
        "I want to drive to the {one}. Which way?",
        "Steer towards the {one}.",
        "Go to the {one}. Which way?",
    ),
}
_PIRATE_RELATIONS = {"left of": "to port of", "right of": "to starboard of", "above": "above", "below": "below"}
_PIRATE_HELM = {"left": "hard to port", "straight": "steady ahead", "right": "hard to starboard"}


@dataclass(frozen=True)
class Noun:
    """A description that objects match: any of colour, shape and size may be left open (None)."""

    color: str | None = None
    shape: str | None = None
    size: str | None = None

    def matches(self, obj: SceneObject) -> bool:
        return self.color in (None, obj.color) and self.shape in (None, obj.shape) and self.size in (None, obj.size)

    @property
    def one(self) -> str:
        return " ".join(word for word in (self.size, self.color, self.shape or "object") if word)

    @property
    def many(self) -> str:
        return f"{self.one}es" if self.one.endswith("s") else f"{self.one}s"

    @property
    def a(self) -> str:
        return f"an {self.one}" if self.one[0] in "aeiou" else f"a {self.one}"


@dataclass(frozen=True)
class Query:
    """What is asked: a base kind, its objects where it has any, and whether the answer shall be JSON."""

    kind: str
    target: Noun | None = None
    reference: Noun | None = None
    as_json: bool = False


class NotAskableError(ValueError):
    """The scene has no question of this kind that has one clear answer."""


def ask(scene: Scene, kind: str, rng: np.random.Generator, style: str = "plain") -> tuple[str, str]:
    """A random question of `kind` (one of `KINDS`) about the scene and its one right answer in `style`.

    Raises NotAskableError when the scene has no clear question of this kind now; ValueError for an unknown kind.
    """
    query = propose(scene, kind, rng)
    reply = answer(scene, query, style)
    assert reply is not None  # propose() only proposes what has an answer
    return phrase(query, rng), reply


def propose(scene: Scene, kind: str, rng: np.random.Generator) -> Query:
    """A random query of `kind` that has a clear answer, balanced over the answers that the scene allows."""
    if kind not in KINDS:
        raise ValueError(f"unknown question kind {kind!r}; valid: {', '.join(KINDS)}")
    base, as_json = kind.removesuffix("_json"), kind.endswith("_json")
    if base == "what":
        return Query(base, as_json=as_json)
    if base == "count":
        return Query(base, _count_target(scene, rng), as_json=as_json)
    absent = rng.random() < ABSENT_SHARE
    by_outcome: dict[str, list[Query]] = {}
    for query in _open_queries(scene, base, as_json, absent):
        result = outcome(scene, query)
        if result is not None:
            by_outcome.setdefault(result, []).append(query)
    choices = list(by_outcome.values())[rng.integers(len(by_outcome))] if by_outcome else []
    if not choices:
        raise NotAskableError(f"no clear question of kind {kind!r} about this scene")
    return choices[rng.integers(len(choices))]


def _count_target(scene: Scene, rng: np.random.Generator) -> Noun:
    color, shape = COLORS[rng.integers(len(COLORS))], SHAPES[rng.integers(len(SHAPES))]
    if scene.objects and rng.random() < 0.7:  # mostly ask for something that is there
        model = scene.objects[rng.integers(len(scene.objects))]
        color, shape = model.color, model.shape
    choices = (Noun(), Noun(color), Noun(shape=shape), Noun(color, shape), Noun(size=SIZES[rng.integers(2)]))
    return choices[rng.choice(5, p=(0.15, 0.25, 0.25, 0.25, 0.10))]


def _open_queries(scene: Scene, base: str, as_json: bool, absent: bool = False) -> Iterator[Query]:
    """Every 'where' or 'steer' query about an object that the scene holds once (or, `absent`, not at all)."""
    names = Counter((o.color, o.shape) for o in scene.objects)
    unique = [Noun(*name) for name, count in names.items() if count == 1]
    targets = [Noun(c, s) for c in COLORS for s in SHAPES if (c, s) not in names] if absent else unique
    if base == "steer":
        yield from (Query(base, noun, as_json=as_json) for noun in targets)
    else:
        yield from (Query(base, a, b, as_json) for a in targets for b in unique if a != b)


def clear_queries(scene: Scene) -> list[Query]:
    """Every query about objects of the scene that has one clear answer at this moment (for a moving camera)."""
    counted = (
        [Noun()] + [Noun(color=c) for c in COLORS] + [Noun(shape=s) for s in SHAPES] + [Noun(size=z) for z in SIZES]
    )
    queries = []
    for as_json in (False, True):
        queries.append(Query("what", as_json=as_json))
        queries += [Query("count", noun, as_json=as_json) for noun in counted]
        for base in ("where", "steer"):
            queries += [query for query in _open_queries(scene, base, as_json) if outcome(scene, query)]
    return queries


def phrase(query: Query, rng: np.random.Generator | None = None) -> str:
    """The question in words: the first wording without `rng`, else a random one (now and then all lower case)."""
    templates = _PHRASES[query.kind]
    template = templates[0] if rng is None else templates[rng.integers(len(templates))]
    many = query.target.many if query.target else ""
    one = query.target.one if query.target else ""
    text = template.format(many=many, one=one, other=query.reference.one if query.reference else "")
    if query.as_json:
        text += " " + (_JSON_SUFFIXES[0] if rng is None else _JSON_SUFFIXES[rng.integers(len(_JSON_SUFFIXES))])
    if rng is not None and rng.random() < 0.12:
        text = text.lower().replace("json", "JSON").rstrip("?.")
    return text


def outcome(scene: Scene, query: Query) -> str | None:
    """The bare result of a 'where' or 'steer' query: a relation, a direction or 'none' (absent); None if unclear."""
    assert query.target is not None
    found = [o for o in scene.objects if query.target.matches(o)]
    if query.kind == "steer":
        if len(found) > 1:
            return None
        return _direction(found[0].x / scene.aspect) if found else "none"
    assert query.reference is not None
    anchors = [o for o in scene.objects if query.reference.matches(o)]
    if len(anchors) != 1 or len(found) > 1:
        return None
    return _relation(found[0], anchors[0]) if found else "none"


def _direction(share: float) -> str | None:
    if share <= LEFT_BELOW:
        return "left"
    if share >= RIGHT_ABOVE:
        return "right"
    return "straight" if STRAIGHT_FROM <= share <= STRAIGHT_TO else None


def _relation(obj: SceneObject, anchor: SceneObject) -> str | None:
    dx, dy = obj.x - anchor.x, obj.y - anchor.y
    if abs(dx) >= max(DOMINANCE * abs(dy), MIN_OFFSET):
        return "left of" if dx < 0 else "right of"
    if abs(dy) >= max(DOMINANCE * abs(dx), MIN_OFFSET):
        return "above" if dy < 0 else "below"
    return None


def contents(scene: Scene) -> list[tuple[Noun, int]]:
    """What is there, with counts, in the one canonical order: by colour, then shape (`COLORS`, `SHAPES`)."""
    names = Counter((o.color, o.shape) for o in scene.objects)
    ordered = sorted(names, key=lambda name: (COLORS.index(name[0]), SHAPES.index(name[1])))
    return [(Noun(*name), names[name]) for name in ordered]


def answer(scene: Scene, query: Query, style: str = "plain") -> str | None:
    """The one right answer to `query` now, in `style` (JSON queries: the same in every style), or None if unclear."""
    if style not in STYLES:
        raise ValueError(f"unknown answer style {style!r}; valid: {', '.join(STYLES)}")
    if query.kind == "what":
        found = contents(scene)
        if query.as_json:
            return json.dumps({"objects": {noun.one: count for noun, count in found}})
        return _say_what(found, style)
    assert query.target is not None
    if query.kind == "count":
        count = sum(query.target.matches(o) for o in scene.objects)
        if query.as_json:
            return json.dumps({"of": query.target.many, "count": count})
        return _say_count(query.target, count, style)
    result = outcome(scene, query)
    if result is None:
        return None
    if query.as_json:
        return _json_result(query, result)
    return _say_result(query, result, style)


def _json_result(query: Query, result: str) -> str:
    assert query.target is not None
    if query.kind == "steer":
        return json.dumps({"target": query.target.one, "steer": result})
    assert query.reference is not None
    return json.dumps({"object": query.target.one, "relation": result, "reference": query.reference.one})


def _say_what(found: list[tuple[Noun, int]], style: str) -> str:
    if style == "terse":
        return ", ".join(noun.one + (f" x{count}" if count > 1 else "") for noun, count in found) or "nothing"
    parts = [noun.a if count == 1 else f"{NUMBER_WORDS[count]} {noun.many}" for noun, count in found]
    text = " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part) if parts else "nothing"
    return f"Arr, I spy {text}, matey!" if style == "pirate" else f"I see {text}."


def _say_count(target: Noun, count: int, style: str) -> str:
    if style == "terse":
        return str(count)
    amount = f"{NUMBER_WORDS[count]} {target.one if count == 1 else target.many}"
    if style == "pirate":
        return f"Arr, there be {amount}, matey!"
    return f"There {'is' if count == 1 else 'are'} {amount}."


def _say_result(query: Query, result: str, style: str) -> str:
    assert query.target is not None
    one = query.target.one
    if result == "none":
        return {
            "terse": f"no {one}",
            "pirate": f"Arr, I spy no {one}, matey!",
            "plain": f"I do not see {query.target.a}.",
        }[style]
    if style == "terse":
        return result
    if query.kind == "steer":
        if style == "pirate":
            return f"Arr, {_PIRATE_HELM[result]} for the {one}, matey!"
        return f"{'Go' if result == 'straight' else 'Steer'} {result} to reach the {one}."
    assert query.reference is not None
    if style == "pirate":
        return f"Arr, the {one} lies {_PIRATE_RELATIONS[result]} the {query.reference.one}, matey!"
    return f"The {one} is {result} the {query.reference.one}."


def ground_truth(scene: Scene) -> dict[str, Any]:
    """The truth about the current frame, JSON-ready: the scene's whole state (`scene_from_dict` reads it) and, in
    `summary`, the right answer to "What do you see?"."""
    return {**scene.to_dict(), "summary": answer(scene, Query("what"))}


@dataclass(frozen=True)
class Example:
    """One scene-question pair of a data set."""

    scene: Scene
    kind: str
    question: str
    answer: str


def examples(split: str, count: int, style: str = "plain", aspect: float = DEFAULT_ASPECT) -> Iterator[Example]:
    """The first `count` examples of a split, kinds in turn; the same every time. `held_out` is the measured set."""
    for index in range(count):
        rng, kind = scene_rng(split, index), KINDS[index % len(KINDS)]
        while True:
            scene = sample_scene(rng, aspect)
            try:
                question, reply = ask(scene, kind, rng, style)
            except NotAskableError:
                continue
            yield Example(scene, kind, question, reply)
            break
