"""What ROS adds to the library: time to the first token, time from sampling to arrival of every token, memory.

    python benchmarks/ros_latency.py ENGINE_DIR [--requests 50]

Camera (30 Hz), model node and this client are three processes; the client asks one question after the other about the
newest frame. Three figures, each with a limit; exits 0 if all are kept:

- first token: from its sampling inside the library to its arrival as action feedback, and (as a stricter reading) all
  that ROS adds to a request: the client's time to first token minus the node's own, which counts from acceptance;
- every token: from its sampling to its arrival on ~/tokens;
- peak memory of the node.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgellm.errors import EdgeLLMError
from edgellm_ros import msg
from edgellm_ros.client import Answer, ClientError, Connection, Goal, ModelClient
from edgellm_ros.paths import share_file, use_fastdds_profile
from edgellm_ros.processes import Children, own_domain, wait_until

FIRST_TOKEN_LIMIT_S = 0.010
TOKEN_LIMIT_S = 0.003
MEMORY_LIMIT = 600 * 10**6  # bytes
QUESTION = "What do you see?"
MAX_TOKENS = 32
PAUSE_S = 0.05
WARM_UP = 3
TIMEOUT_S = 60.0


class TokenLog:
    """Seconds from sampling to arrival of every token chunk on ~/tokens."""

    def __init__(self, connection: Connection, model: ModelClient) -> None:
        self.latencies_s: list[float] = []
        connection.node.create_subscription(msg.TokenChunk, f"{model.name}/tokens", self._on_chunk, 200)

    def _on_chunk(self, chunk: msg.TokenChunk) -> None:
        now_ns = time.time_ns()
        if chunk.token_ids:
            self.latencies_s.append(now_ns / 1e9 - seconds(chunk.sampled_at))


def measure(engine: Path, requests: int) -> bool:
    """Run everything, print the figures; whether they are within the limits."""
    os.environ.update(own_domain(os.environ))
    use_fastdds_profile()
    with tempfile.TemporaryDirectory() as logs, Children(Path(logs), {**os.environ, "ROS_LOG_DIR": logs}) as children:
        children.start("camera", "edgellm_ros.sim_camera")
        preset = str(share_file("config/tiny_vlm.yaml"))
        parameters = ["--params-file", preset, "-p", f"engine_dir:={engine.resolve()}", "-p", "autostart:=true"]
        node = children.start("model", "edgellm_ros.vlm_node", "--ros-args", *parameters)
        with Connection("ros_latency") as connection:
            model = ModelClient(connection.node)
            tokens = TokenLog(connection, model)
            model.wait(TIMEOUT_S)
            if not wait_until(lambda: model.sees_camera, TIMEOUT_S):
                raise ClientError("no camera image reached the model node")
            for _ in range(WARM_UP):
                ask(model)
            tokens.latencies_s.clear()
            answers = []
            for _ in range(requests):
                children.check()
                answers.append(ask(model))
                time.sleep(PAUSE_S)
            time.sleep(0.5)
            memory = node.peak_memory()
    return report(answers, tokens.latencies_s, memory)


def ask(model: ModelClient) -> tuple[Answer, msg.GenerateResult]:
    """One question about the newest frame, answered."""
    sampling = msg.SamplingParams(max_tokens=MAX_TOKENS)
    answer = model.ask(QUESTION, image_source=Goal.IMAGE_LATEST, sampling=sampling)
    result = answer.wait(TIMEOUT_S)
    if result.error:
        raise ClientError(f"a request failed: {result.error}")
    return answer, result


def seconds(stamp: Any) -> float:
    """A builtin_interfaces/Time as a number."""
    return float(stamp.sec + stamp.nanosec / 1e9)


def report(answers: list[tuple[Answer, msg.GenerateResult]], latencies: list[float], memory: int) -> bool:
    """Print the figures beside their limits; whether all are kept."""
    median = statistics.median
    client_s = median(answer.first_token_s for answer, _ in answers)
    arrival_s = median(answer.arrivals[0] - seconds(answer.chunks[0].sampled_at) for answer, _ in answers)
    added_s = median(answer.first_token_s - result.timing.ttft_s for answer, result in answers)
    print(f"{len(answers)} requests, medians: first token {1e3 * client_s:.1f} ms after the question, of which")
    steps = ("queue_s", "prepare_s", "vision_s", "prefill_s")
    print("  " + ", ".join(f"{s} {1e3 * median(getattr(r.timing, s) for _, r in answers):.1f} ms" for s in steps))
    lines = [
        ("first token, sampled to arrived", arrival_s, FIRST_TOKEN_LIMIT_S, 1e3, "ms"),
        ("first token, all that ROS adds", added_s, FIRST_TOKEN_LIMIT_S, 1e3, "ms"),
        (f"every token ({len(latencies)}), sampled to arrived", median(latencies), TOKEN_LIMIT_S, 1e3, "ms"),
        ("peak memory of the node", memory, MEMORY_LIMIT, 1e-6, "MB"),
    ]
    for name, value, limit, factor, unit in lines:
        verdict = "ok" if value <= limit else "TOO MUCH"
        print(f"{name}: {factor * value:.2f} {unit} (limit {factor * limit:g} {unit}) {verdict}")
    worst = sorted(latencies)[int(0.99 * (len(latencies) - 1))]
    print(f"every token, 99th percentile: {1e3 * worst:.2f} ms")
    return all(value <= limit for _, value, limit, _, _ in lines)


def main(args: Sequence[str] | None = None) -> int:
    """Command line; 0 if the limits are kept, 1 if not or after a one-line error."""
    parser = argparse.ArgumentParser(description="What ROS adds to the library.")
    parser.add_argument("engine_dir", type=Path)
    parser.add_argument("--requests", type=int, default=50)
    options = parser.parse_args(args)
    try:
        return 0 if measure(options.engine_dir, options.requests) else 1
    except EdgeLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
