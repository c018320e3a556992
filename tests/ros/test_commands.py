"""The commands of a person: the terminal chat and the demo, run as they are run, with their failures."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PilImage

from edgellm_ros import msg
from edgellm_ros.chat import follow
from edgellm_ros.processes import free_domain_id, wait_until

WAIT_S = 90.0
GONE_S = 25.0


def test_chat_answers_what_is_typed(live: Any) -> None:
    typed = "What do you see?\n/reset\n\nHow many objects are there?\n/quit\nnever asked\n"
    command = [sys.executable, "-m", "edgellm_ros.chat", "--node", f"/{live.namespace}/vlm_node"]
    done = subprocess.run(command, input=typed, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith("I see ") and lines[0].endswith(".")
    assert lines[1].startswith("(first token ") and lines[1].endswith(" ms old)") and "tokens/s" in lines[1]
    assert lines[2] == "(forgotten)"
    assert lines[3].startswith("There ") and len(lines) == 5


def test_ctrl_c_stops_an_answer(live: Any) -> None:
    asked = live.model.ask("Hello", sampling=msg.SamplingParams(max_tokens=100_000, ignore_eos=True))
    assert wait_until(lambda: asked.chunks, WAIT_S)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    result = follow(asked)
    assert result.status == msg.GenerateResult.STATUS_CANCELED and result.text


def test_chat_without_a_node_is_one_line() -> None:
    command = [sys.executable, "-m", "edgellm_ros.chat", "--node", "/nobody/vlm_node", "--wait", "1"]
    done = subprocess.run(command, input="hello\n", capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: no node /nobody/vlm_node found within 1 s; start it")


def _port_files() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("*fastrtps_port*")}


class Demo:
    """The demo as a process, in a ROS domain of its own; everything that it starts carries a mark."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.mark = uuid.uuid4().hex
        self.domain = free_domain_id()
        self.port_files_before = _port_files()
        self.picture = folder / "demo.png"
        self.log = folder / "demo.log"
        words = ["--folder", str(folder), "--picture", str(self.picture), *arguments]
        # A shell starts background jobs with SIGINT ignored; this test may run in one.
        env = {**os.environ, "EDGELLM_TEST_MARK": self.mark, "ROS_DOMAIN_ID": str(self.domain)}
        env.pop("ROS_LOG_DIR", None)
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-m", "edgellm_ros.demo", *words],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=env,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    def said(self) -> str:
        """Its output so far."""
        return self.log.read_text()

    def marked(self, command: str = "") -> list[int]:
        """Process ids of what it started and is still there (and of itself), with `command` in the command line."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                ours = f"EDGELLM_TEST_MARK={self.mark}".encode() in (entry / "environ").read_bytes()
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if ours and command in words:
                found.append(int(entry.name))
        return found

    def wait(self, timeout_s: float = WAIT_S) -> int:
        """Its exit code; by then nothing that it started may be left."""
        code = self.process.wait(timeout_s)
        assert self.marked() == []
        ports = range(7400 + 250 * self.domain, 7400 + 250 * (self.domain + 1))
        left = _port_files() - self.port_files_before  # a killed process of another run may have left some
        assert not [name for name in left if int(re.findall(r"port(\d+)", name)[0]) in ports]
        return code


@pytest.fixture
def folder(tmp_path: Path, tiny_engine: Path) -> Path:
    """Where the demo finds the engine already built."""
    shutil.copytree(tiny_engine, tmp_path / "engine")
    return tmp_path


@pytest.fixture
def demo(request: pytest.FixtureRequest, folder: Path) -> Iterator[Demo]:
    started = Demo(folder, *getattr(request, "param", ()))
    yield started
    for pid in started.marked():
        os.kill(pid, signal.SIGKILL)


def test_the_demo_is_right_and_leaves_a_picture_and_nothing_else(demo: Demo) -> None:
    assert demo.wait(180.0) == 0, demo.said()
    said = demo.said()
    right = int(re.findall(r"(\d+) of 10 right", said)[0])
    assert right >= 9
    assert said.count("truth: ") == 10 and said.count("first token ") == 11 and said.count("ms old") == 11
    with PilImage.open(demo.picture) as picture:
        assert picture.width > 1500 and picture.height > 800


@pytest.mark.parametrize("demo", [["--chat"]], indirect=True)
def test_the_demo_chats_until_ctrl_c(demo: Demo) -> None:
    assert wait_until(lambda: "camera and model run in ROS_DOMAIN_ID" in demo.said(), WAIT_S), demo.said()
    assert demo.process.stdin is not None
    demo.process.stdin.write(b"What do you see?\n")
    demo.process.stdin.flush()
    assert wait_until(lambda: "ms old" in demo.said(), WAIT_S), demo.said()
    assert "I see " in demo.said()
    demo.process.send_signal(signal.SIGINT)
    demo.wait(GONE_S)
    assert "Traceback" not in demo.said()


def test_the_demo_stops_what_it_has_started_when_it_is_stopped(demo: Demo) -> None:
    assert wait_until(lambda: demo.marked("vlm_node"), WAIT_S)
    time.sleep(0.5)
    demo.process.send_signal(signal.SIGTERM)
    assert demo.wait(GONE_S) == 130
    assert demo.said().splitlines()[-1] == "stopped"


def test_the_demo_says_which_process_died(demo: Demo) -> None:
    assert wait_until(lambda: demo.marked("vlm_node"), WAIT_S)
    for pid in demo.marked("vlm_node"):
        os.kill(pid, signal.SIGKILL)
    assert demo.wait(GONE_S + WAIT_S) == 1
    assert demo.said().splitlines()[-1].startswith("demo: error: model ended with exit code -9: ")


def test_the_demo_without_a_checkpoint_is_one_line(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    started = Demo(tmp_path, "--model", str(nothing))
    assert started.wait() == 1
    expected = f"demo: error: there is no checkpoint in {nothing}; run the demo in the repository, or give --model"
    assert started.said().strip() == expected
