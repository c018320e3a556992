"""Child processes for the demo, the benchmarks and the tests: started apart, watched, and stopped for certain."""

from __future__ import annotations

import fcntl
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from edgellm.errors import EdgeLLMError

STOP_S = 10.0
POLL_S = 0.02
# Domains whose UDP ports (7400 + 250 * id ...) lie below the range that Linux gives to outgoing connections.
DOMAIN_IDS = range(1, 101)
DISCOVER_LOCALLY = ("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
SHARED_MEMORY = re.compile(r"/dev/shm/fastrtps_\S+")


class ChildError(EdgeLLMError):
    """A child process ended although it should not have; one line with its last words."""


class Child:
    """One process in its own session, its output in a file."""

    def __init__(self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        self.name, self.log = name, log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=dict(env),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    def last_line(self) -> str:
        """The last line of its output that is not empty."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "no output")

    def check(self) -> None:
        """Raises ChildError if the process has ended."""
        code = self.process.poll()
        if code is not None:
            raise ChildError(f"{self.name} ended with exit code {code}: {self.last_line()} (log: {self.log})")

    def peak_memory(self) -> int:
        """The most memory it has had resident so far, bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))

    def interrupt(self) -> None:
        """Ask it to end (SIGINT); returns at once."""
        self._signal(signal.SIGINT)

    def stop(self, timeout_s: float = STOP_S) -> int:
        """Ask it to end, insist after `timeout_s`; returns its exit code."""
        self.interrupt()
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
        return self.process.wait()

    def kill(self) -> None:
        """End it and whatever it started, at once, and remove the shared memory that it can no longer remove itself."""
        mapped = self.mapped_shared_memory()
        self._signal(signal.SIGKILL)
        self.process.wait()
        for path in mapped:
            _remove_if_dead(path)

    def _signal(self, number: int) -> None:
        if self.process.poll() is None:
            os.killpg(self.pid, number)

    def mapped_shared_memory(self) -> set[Path]:
        """Fast DDS shared-memory files that it uses now, its own and its peers'."""
        try:
            return {Path(name) for name in SHARED_MEMORY.findall(Path(f"/proc/{self.pid}/maps").read_text())}
        except OSError:
            return set()


def _remove_if_dead(path: Path) -> None:
    """Remove a Fast DDS shared-memory file unless a living process holds its lock file NAME_el."""
    lock = path.with_name(f"{path.name}_el")
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (FileNotFoundError, BlockingIOError):
        return
    for name in (path.name, lock.name, f"sem.{path.name}_mutex"):
        path.with_name(name).unlink(missing_ok=True)


class Children:
    """Starts children with one environment; on leaving the `with` block all of them are stopped."""

    def __init__(self, logs: Path, env: Mapping[str, str] | None = None) -> None:
        self._logs = logs
        self._env = dict(os.environ if env is None else env)
        self._children: list[Child] = []
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, module: str, *arguments: str) -> Child:
        """Run `python -m module arguments` as child `name`."""
        command = [sys.executable, "-u", "-m", module, *arguments]
        child = Child(name, command, self._logs / f"{name}.log", self._env)
        self._children.append(child)
        return child

    def check(self) -> None:
        """Raises ChildError if one of them has ended."""
        for child in self._children:
            child.check()

    def __enter__(self) -> Children:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A second Ctrl-C must not leave anything behind.
        mapped = {path for child in self._children for path in child.mapped_shared_memory()}
        handlers = [(number, signal.signal(number, signal.SIG_IGN)) for number in (signal.SIGINT, signal.SIGTERM)]
        for child in self._children:
            child.interrupt()
        give_up = time.monotonic() + STOP_S
        for child in self._children:
            child.stop(max(0.0, give_up - time.monotonic()))
        for path in mapped:  # of a child that was killed by someone else
            _remove_if_dead(path)
        for number, handler in handlers:
            signal.signal(number, handler)


def own_domain(environ: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for a ROS graph of our own on this machine: a free domain, no other machines. What the user
    has set stays."""
    local = ("ROS_LOCALHOST_ONLY", "1") if environ.get("ROS_DISTRO") == "humble" else DISCOVER_LOCALLY
    own = dict([local])
    if not environ.get("ROS_DOMAIN_ID"):
        own["ROS_DOMAIN_ID"] = str(free_domain_id())
    return {**own, **{name: environ[name] for name in own if environ.get(name)}}


def free_domain_id() -> int:
    """A random ROS domain in which this machine has no participant yet (as far as its UDP port tells)."""
    for domain in random.sample(DOMAIN_IDS, len(DOMAIN_IDS)):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(("0.0.0.0", 7400 + 250 * domain + 10))
            except OSError:
                continue
            return domain
    raise ChildError("no free ROS domain on this machine; set ROS_DOMAIN_ID")


def wait_until(condition: Callable[[], object], timeout_s: float) -> bool:
    """Poll `condition()` until it is true or the time is over."""
    give_up = time.monotonic() + timeout_s
    while time.monotonic() < give_up:
        if condition():
            return True
        time.sleep(POLL_S)
    return bool(condition())
