"""The whole system in one command: build the engine, run camera and model as processes, ask ten questions over ROS.

    python -m edgellm_ros.demo            # exits 0 if at least nine answers are right; saves demo.png
    python -m edgellm_ros.demo --chat     # starts the same, then you ask

Truth is the simulated camera's account of the very frame that an answer was made from (matched by its stamp).
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from edgellm.errors import EdgeLLMError
from edgellm_ros import msg
from edgellm_ros.chat import Chat, ChatOptions, figures
from edgellm_ros.client import Answer, Connection, Goal, ModelClient
from edgellm_ros.demo_picture import Panel, save_picture
from edgellm_ros.demo_world import Question, World
from edgellm_ros.paths import share_file, use_fastdds_profile
from edgellm_ros.processes import Children, own_domain

REPOSITORY = Path(__file__).resolve().parents[1]
KINDS = ("what", "count", "where", "steer", "what_json", "count", "where_json", "steer", "what", "count_json")
NEEDED = 9
SCENE_PERIOD_S = 1.0  # of the simulated camera: every question gets another scene
START_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 30.0
ATTEMPTS = 5
GREEN, RED = 32, 31  # ANSI colours


class DemoError(EdgeLLMError):
    """The demo cannot go on; one line."""


def build_engine(checkpoint: Path, folder: Path) -> Path:
    """The engine of `checkpoint` under `folder`, built unless it is there and newer than the checkpoint."""
    engine, onnx = folder / "engine", folder / "onnx"
    if not (checkpoint / "config.json").is_file():
        raise DemoError(f"there is no checkpoint in {checkpoint}; run the demo in the repository, or give --model")
    newest = max(path.stat().st_mtime for path in checkpoint.iterdir())
    manifest = engine / "config.json"
    if manifest.is_file() and manifest.stat().st_mtime > newest:
        return engine
    for verb in (["export", checkpoint, onnx], ["build", onnx, engine, "--backend", "onnxruntime"]):
        words = [str(word) for word in verb]
        print(f"$ edgellm {' '.join(words)}", flush=True)
        if subprocess.run([sys.executable, "-m", "edgellm.cli", *words], check=False).returncode != 0:
            raise DemoError(f"edgellm {words[0]} failed (see above)")
    return engine


def start_nodes(children: Children, engine: Path) -> None:
    """Camera and model, each an operating system process of its own."""
    parameters = ["--ros-args", "--params-file", str(share_file("config/tiny_vlm.yaml"))]
    period, seed = f"scene_period:={SCENE_PERIOD_S}", f"seed:={time.time_ns() % 1_000_000}"
    children.start("camera", "edgellm_ros.sim_camera", *parameters, "-p", period, "-p", seed)
    start = ["-p", f"engine_dir:={engine.resolve()}", "-p", "autostart:=true"]
    children.start("model", "edgellm_ros.vlm_node", *parameters, *start)


def wait_for(what: str, condition: Callable[[], bool], children: Children, timeout_s: float) -> None:
    """Poll `condition`. Raises DemoError after `timeout_s`, ChildError at once when a process has died."""
    give_up = time.monotonic() + timeout_s
    while not condition():
        children.check()
        if time.monotonic() > give_up:
            raise DemoError(f"waited {timeout_s:g} s in vain for {what}")
        time.sleep(0.005)


def wait_for_model(model: ModelClient, children: Children) -> None:
    """Until the model node accepts requests."""

    def settled() -> bool:
        if model.status is not None and model.status.last_error:
            raise DemoError(f"the model node could not start: {model.status.last_error}")
        return model.ready

    wait_for("the model node to become active", settled, children, START_TIMEOUT_S)


@dataclass(frozen=True)
class Outcome:
    """One question of the ten: what the picture shows, and its figures."""

    panel: Panel
    first_token_s: float
    tokens_per_s: float
    image_age_s: float


def ask_about_camera(number: int, kind: str, model: ModelClient, world: World, children: Children) -> Outcome:
    """Ask one question about the live camera, print the answer as it streams, and compare it with the truth."""
    for _ in range(ATTEMPTS):
        asked: list[Question] = []

        def find_question(asked: list[Question] = asked) -> bool:
            question = world.question(kind)
            asked.extend([question] if question else [])
            return bool(asked)

        wait_for(f"a scene with a question of kind {kind}", find_question, children, ANSWER_TIMEOUT_S)
        print(f"\n{number:2}  {asked[0].text}\n    ", end="", flush=True)
        answer = model.ask(asked[0].text, image_source=Goal.IMAGE_LATEST, on_text=print_now)
        wait_for("an answer", answer.done, children, ANSWER_TIMEOUT_S)
        outcome = judge(asked[0], answer, world, children)
        if outcome is not None:
            return outcome
        print("\n    (something moved: by now the question has no clear answer; asking another)")
    raise DemoError(f"{ATTEMPTS} questions of kind {kind} had no clear answer")


def judge(question: Question, answer: Answer, world: World, children: Children) -> Outcome | None:
    """Put the answer beside the truth about the frame it was made from; None if that frame leaves the question open."""
    result = answer.wait(1.0)
    if result.status != msg.GenerateResult.STATUS_SUCCEEDED:
        raise DemoError(f"the model node failed on a question: {result.error}")
    stamp = (result.image_stamps[0].sec, result.image_stamps[0].nanosec)
    wait_for("the camera's account of the answered frame", lambda: world.knows(stamp), children, ANSWER_TIMEOUT_S)
    truth = question.truth(world.scene(stamp))
    if truth is None:
        return None
    panel = Panel(world.picture(stamp), question.text, result.text.strip(), truth, figures(answer, result))
    verdict = colored("right", GREEN) if panel.right else colored("WRONG", RED)
    print(f"\n    truth: {truth}  [{verdict}]\n    {panel.figures}", flush=True)
    return Outcome(panel, answer.first_token_s, result.timing.tokens_per_s, result.image_age)


def ask_ten(model: ModelClient, world: World, children: Children, picture: Path) -> bool:
    """The ten questions, the summary and the picture; whether enough answers are right."""
    outcomes = [ask_about_camera(number, kind, model, world, children) for number, kind in enumerate(KINDS, 1)]
    panels = [outcome.panel for outcome in outcomes]
    right = sum(panel.right for panel in panels)
    medians = (
        f"first token {1000 * statistics.median(o.first_token_s for o in outcomes):.0f} ms after the question, "
        f"{statistics.median(o.tokens_per_s for o in outcomes):.0f} tokens/s, "
        f"image {1000 * statistics.median(o.image_age_s for o in outcomes):.0f} ms old"
    )
    save_picture(
        picture,
        panels,
        f"EdgeLLM: {right} of {len(panels)} answers about the live camera are right",
        f"Frame, question, answer and truth, over ROS 2 on this machine's CPU. Medians: {medians}.",
    )
    print(f"\n{right} of {len(panels)} right; medians: {medians}\nframes, questions and answers: {picture}")
    return right >= NEEDED


def print_now(text: str) -> None:
    """Print without waiting for the end of the line."""
    print(text, end="", flush=True)


def colored(text: str, color: int) -> str:
    """`text` in an ANSI colour, if this is a terminal."""
    return f"\033[{color}m{text}\033[0m" if sys.stdout.isatty() else text


def run(options: argparse.Namespace) -> bool:
    """Build, start, ask, stop; whether the demo is a success."""
    os.environ.update(own_domain(os.environ))
    logs = options.folder / "logs"
    os.environ.setdefault("ROS_LOG_DIR", str(logs.resolve()))
    use_fastdds_profile()
    engine = build_engine(options.model, options.folder)
    with Children(logs) as children:
        print("starting camera and model ...", flush=True)
        start_nodes(children, engine)
        with Connection("demo") as connection:
            model, world = ModelClient(connection.node), World(connection.node, seed=time.time_ns() % 2**32)
            wait_for_model(model, children)
            wait_for("camera frames", lambda: world.frames > 0 and model.sees_camera, children, START_TIMEOUT_S)
            if not options.chat:
                return ask_ten(model, world, children, options.picture)
            print(f"camera and model run in ROS_DOMAIN_ID={os.environ['ROS_DOMAIN_ID']}")
            Chat(model, ChatOptions()).run()
            return True


def main(args: Sequence[str] | None = None) -> int:
    """Run the demo; 0 if it is a success, 1 if not or after a one-line error, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="demo", description="A camera described live, over ROS 2.")
    parser.add_argument("--chat", action="store_true", help="ask the questions yourself")
    parser.add_argument("--model", type=Path, default=REPOSITORY / "assets/tiny_vlm", help="checkpoint (%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("build/demo"), help="for engine and logs (%(default)s)")
    parser.add_argument("--picture", type=Path, default=Path("demo.png"), help="file to save (%(default)s)")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return 0 if run(parser.parse_args(args)) else 1
    except EdgeLLMError as error:
        print(f"\ndemo: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped")
        return 128 + signal.SIGINT


def _interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends the demo as Ctrl-C does: everything that it started is stopped."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
