"""Questions about scenes: the right answer follows from the geometry, checked here by reading the answers back."""

import json
import re
from collections import Counter

import pytest

from edgellm_ros.scenes import (
    KINDS,
    STYLES,
    Example,
    NotAskableError,
    Noun,
    Query,
    Scene,
    answer,
    ask,
    clear_queries,
    examples,
    ground_truth,
    phrase,
    sample_scene,
    scene_rng,
)

NUMBERS = {"no": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "a": 1, "an": 1}
NAME = r"([a-z]+ [a-z]+)"


def find(scene: Scene, name: str) -> tuple[float, float] | None:
    """Where the one object called `name` is, as shares of the frame's height; None if there is none."""
    found = [(o.x, o.y) for o in scene.objects if f"{o.color} {o.shape}" == name]
    assert len(found) <= 1, "a question named an object that the scene holds twice"
    return found[0] if found else None


def check_relation(scene: Scene, name: str, relation: str, anchor: str) -> None:
    at, base = find(scene, name), find(scene, anchor)
    assert base is not None
    if at is None or relation == "none":
        assert at is None and relation == "none"
        return
    dx, dy = at[0] - base[0], at[1] - base[1]
    offset = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    other = abs(dy) if relation in ("left of", "right of") else abs(dx)
    assert offset >= 0.15 and offset >= 1.5 * other


def check_direction(scene: Scene, name: str, direction: str) -> None:
    at = find(scene, name)
    if at is None or direction == "none":
        assert at is None and direction == "none"
        return
    low, high = {"left": (0.0, 0.36), "straight": (0.43, 0.57), "right": (0.64, 1.0)}[direction]
    assert low <= at[0] / scene.aspect <= high


def check_count(scene: Scene, phrase_: str, count: int) -> None:
    words = set(phrase_.replace("crosses", "cross").split())
    words = {word.removesuffix("s") if word not in ("cross",) else word for word in words} - {"object"}
    assert count == sum(words <= {o.color, o.shape, o.size} for o in scene.objects)


def check_contents(scene: Scene, found: dict[str, int]) -> None:
    assert found == dict(Counter(f"{o.color} {o.shape}" for o in scene.objects))


def check_sentence(example: Example) -> None:
    """Read a plain answer back and hold it to the scene."""
    scene, text = example.scene, example.answer
    if example.kind == "what":
        body = re.fullmatch(r"I see (.*)\.", text)
        assert body
        parts = [] if body[1] == "nothing" else re.split(r", | and ", body[1])
        found = {}
        for part in parts:
            number, color, shape = part.split()
            shape = shape if number in ("a", "an") else {"crosses": "cross"}.get(shape, shape.removesuffix("s"))
            found[f"{color} {shape}"] = NUMBERS[number]
        check_contents(scene, found)
    elif example.kind == "count":
        count = re.fullmatch(r"There (?:is|are) (\w+) (.*)\.", text)
        assert count
        check_count(scene, count[2], NUMBERS[count[1]])
    elif missing := re.fullmatch(rf"I do not see an? {NAME}\.", text):
        assert find(scene, missing[1]) is None
    elif example.kind == "where":
        place = re.fullmatch(rf"The {NAME} is (left of|right of|above|below) the {NAME}\.", text)
        assert place
        check_relation(scene, place[1], place[2], place[3])
    else:
        steer = re.fullmatch(rf"(?:Steer|Go) (left|straight|right) to reach the {NAME}\.", text)
        assert steer
        check_direction(scene, steer[2], steer[1])


def check_json(example: Example) -> None:
    scene, reply = example.scene, json.loads(example.answer)
    if example.kind == "what_json":
        check_contents(scene, reply["objects"])
    elif example.kind == "count_json":
        check_count(scene, reply["of"], reply["count"])
    elif example.kind == "where_json":
        check_relation(scene, reply["object"], reply["relation"], reply["reference"])
    else:
        check_direction(scene, reply["target"], reply["steer"])


def test_answers_are_right_by_geometry() -> None:
    data = list(examples("test", 1200))
    assert Counter(e.kind for e in data) == dict.fromkeys(KINDS, 150)
    for example in data:
        (check_json if example.kind.endswith("_json") else check_sentence)(example)
        assert ("JSON" in example.question) == example.kind.endswith("_json")


def test_answers_are_balanced() -> None:
    steer = Counter(e.answer.split()[1] for e in examples("test", 2400) if e.kind == "steer")
    assert min(steer[word] for word in ("left", "straight", "right")) > 30
    where = Counter(json.loads(e.answer)["relation"] for e in examples("test", 2400) if e.kind == "where_json")
    assert min(where[word] for word in ("left of", "right of", "above", "below", "none")) > 15


def test_examples_are_the_same_every_time_in_every_style() -> None:
    plain, again = list(examples("held_out", 40)), list(examples("held_out", 40))
    assert plain == again
    for style in STYLES[1:]:
        for one, other in zip(plain, examples("held_out", 40, style), strict=True):
            assert (one.scene, one.question) == (other.scene, other.question)
            assert (one.answer == other.answer) == one.kind.endswith("_json")


def place(scene: Scene, x: float, y: float) -> Scene:
    """`scene` with its first object alone at (x, y)."""
    scene.objects = scene.objects[:1]
    scene.objects[0].x, scene.objects[0].y = x, y
    return scene


@pytest.mark.parametrize(
    ("share", "direction"), [(0.1, "left"), (0.36, "left"), (0.4, None), (0.5, "straight"), (0.6, None), (0.9, "right")]
)
def test_steering_is_open_only_away_from_the_borders(share: float, direction: str | None) -> None:
    scene = next(s for s in (sample_scene(scene_rng("test", i)) for i in range(99)) if s.objects)
    place(scene, share * scene.aspect, 0.5)
    target = Noun(scene.objects[0].color, scene.objects[0].shape)
    reply = answer(scene, Query("steer", target, as_json=True))
    assert (json.loads(reply)["steer"] if reply else None) == direction


def test_a_moving_scene_says_which_questions_are_clear() -> None:
    scenes = (sample_scene(scene_rng("test", i)) for i in range(99))
    scene = next(s for s in scenes if len({(o.color, o.shape) for o in s.objects}) == 5)
    seen = set()
    for _ in range(300):
        scene.step(0.1)
        queries = clear_queries(scene)
        seen.add(len(queries))
        assert all(answer(scene, query, style) for query in queries for style in STYLES)
    assert len(seen) > 3  # 'where' and 'steer' questions come and go


def test_unclear_scenes_and_bad_names_are_refused() -> None:
    rng = scene_rng("test", 0)
    empty = next(s for s in (sample_scene(scene_rng("test", i)) for i in range(999)) if not s.objects)
    with pytest.raises(NotAskableError, match="where"):
        ask(empty, "where", rng)
    with pytest.raises(ValueError, match="'who'.*what, count"):
        ask(empty, "who", rng)
    with pytest.raises(ValueError, match="'opera'.*plain, terse, pirate"):
        answer(empty, Query("what"), "opera")
    assert answer(empty, Query("what")) == "I see nothing."


def test_ground_truth_is_json_with_a_summary() -> None:
    scene = next(examples("test", 1)).scene
    truth = json.loads(json.dumps(ground_truth(scene)))
    assert truth["summary"] == answer(scene, Query("what"))
    assert len(truth["objects"]) == len(scene.objects)


def test_first_wording_is_fixed() -> None:
    query = Query("where", Noun("orange", "star"), Noun("blue", "cross"), as_json=True)
    assert phrase(query) == "Where is the orange star relative to the blue cross? Answer as JSON."
