"""What ROS adds to the library: time to the first token, time from sampling to arrival of every token, memory.

    python benchmarks/ros_latency.py ENGINE_DIR [--requests 50]

Camera (30 Hz), model node and this client are three processes. In turn, one request goes to the node (image_source
latest) and the same question about a frame of the same size to the library in this process, so that both see the same
load. Exits 0 if the medians are within the limits below.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgellm import LLM, SamplingParams
from edgellm.errors import EdgeLLMError
from edgellm_ros import msg
from edgellm_ros.client import ClientError, Connection, Goal, ModelClient
from edgellm_ros.frames import SceneSource
from edgellm_ros.paths import use_fastdds_profile
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
            self.latencies_s.append((now_ns - chunk.sampled_at.sec * 10**9 - chunk.sampled_at.nanosec) / 1e9)


def library_first_token_s(llm: LLM, frame: Any) -> float:
    """Seconds from calling the library to its first increment, image preprocessing included."""
    first = threading.Event()
    at: list[float] = []

    def on_increment(increment: Any) -> None:
        if not at:
            at.append(time.perf_counter())
            first.set()

    content = [{"type": "image", "image": frame}, {"type": "text", "text": QUESTION}]
    start = time.perf_counter()
    handle = llm.generate_async(
        [{"role": "user", "content": content}], SamplingParams(max_tokens=MAX_TOKENS), on_increment=on_increment
    )
    handle.result(TIMEOUT_S)
    first.wait(TIMEOUT_S)
    return at[0] - start


def measure(engine: Path, requests: int) -> bool:
    """Run everything, print the figures; whether they are within the limits."""
    os.environ.update(own_domain(os.environ))
    use_fastdds_profile()
    over_ros: list[float] = []
    in_library: list[float] = []
    with tempfile.TemporaryDirectory() as logs, Children(Path(logs)) as children:
        os.environ["ROS_LOG_DIR"] = logs
        children.start("camera", "edgellm_ros.sim_camera")
        parameters = ["-p", f"engine_dir:={engine.resolve()}", "-p", "autostart:=true"]
        node = children.start("model", "edgellm_ros.vlm_node", "--ros-args", *parameters)
        source = SceneSource(320, 256, seed=0, period_s=1.0)
        with LLM(engine) as llm, Connection("ros_latency") as connection:
            model = ModelClient(connection.node)
            tokens = TokenLog(connection, model)
            model.wait(TIMEOUT_S)
            if not wait_until(lambda: model.status is not None and model.status.images_received > 0, TIMEOUT_S):
                raise ClientError("no camera image reached the model node")
            for number in range(WARM_UP + requests):
                children.check()
                if number == WARM_UP:
                    over_ros, in_library, tokens.latencies_s = [], [], []
                over_ros.append(ros_first_token_s(model))
                in_library.append(library_first_token_s(llm, source.next(1.0)[0]))
                time.sleep(PAUSE_S)
            time.sleep(0.5)
            memory = node.peak_memory()
    return report(over_ros, in_library, tokens.latencies_s, memory)


def ros_first_token_s(model: ModelClient) -> float:
    """Seconds from sending a goal to the arrival of its first feedback."""
    sampling = msg.SamplingParams(max_tokens=MAX_TOKENS)
    answer = model.ask(QUESTION, image_source=Goal.IMAGE_LATEST, sampling=sampling)
    result = answer.wait(TIMEOUT_S)
    if result.error:
        raise ClientError(f"a request failed: {result.error}")
    return answer.first_token_s


def report(over_ros: list[float], in_library: list[float], latencies: list[float], memory: int) -> bool:
    """Print the figures beside their limits; whether all are kept."""
    added = statistics.median(over_ros) - statistics.median(in_library)
    token = statistics.median(latencies)
    worst = sorted(latencies)[int(0.99 * (len(latencies) - 1))]
    print(f"first token, median of {len(over_ros)}: over ROS {1e3 * statistics.median(over_ros):.1f} ms, ", end="")
    print(f"in the library {1e3 * statistics.median(in_library):.1f} ms")
    lines = [
        ("first token over ROS after the library's", added, FIRST_TOKEN_LIMIT_S, 1e3, "ms"),
        (f"sampled to arrived, median of {len(latencies)} tokens", token, TOKEN_LIMIT_S, 1e3, "ms"),
        ("peak memory of the node", memory, MEMORY_LIMIT, 1e-6, "MB"),
    ]
    for name, value, limit, factor, unit in lines:
        verdict = "ok" if value <= limit else "TOO MUCH"
        print(f"{name}: {factor * value:.2f} {unit} (limit {factor * limit:g} {unit}) {verdict}")
    print(f"sampled to arrived, 99th percentile: {1e3 * worst:.2f} ms")
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
