"""`make setup`: a virtual environment with everything to run, test and develop edgellm.

Idempotent, and quick when there is nothing to do (a hash of what each stage depends on is kept in the environment):

1. create .venv: a plain one with ROS 2 wheels, or, where a ROS is sourced, one that sees it and gets no ROS wheels;
2. install the dependencies, when constraints.txt or pyproject.toml changed;
3. build the ROS interfaces and install this repository editable, when interfaces or packaging files changed.

Standard library only; runs with the system's Python.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path
from shutil import which
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
# What each stage depends on, as glob patterns.
DEPENDENCY_FILES = ("constraints.txt", "pyproject.toml")
PACKAGE_FILES = ("setup.py", "pyproject.toml", "package.xml", "tools/*", "launch/*", "config/*", "plugins/__init__.py")
EXTRAS = ["export", "test", "dev"]


def fail(message: str) -> NoReturn:
    raise SystemExit(f"edgellm: {message}")


def ros_source(folder: Path) -> str:
    """Where rclpy comes from: "sourced" (AMENT_PREFIX_PATH), "wheels" (PyPI), or "none" (the library alone).

    `folder` itself in AMENT_PREFIX_PATH, set so that ROS tools find this package in it, is no sourced ROS."""
    prefixes = os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)
    if any(Path(p).resolve() != folder for p in prefixes if p):
        if subprocess.run([sys.executable, "-c", "import rclpy"], stderr=subprocess.DEVNULL, check=False).returncode:
            fail(
                f"a ROS is sourced ({os.environ['AMENT_PREFIX_PATH']}), but Python {platform.python_version()} "
                f"({sys.executable}) cannot import its rclpy: run make with PYTHON=<the Python of that ROS>, or unset "
                "AMENT_PREFIX_PATH and PYTHONPATH to use ROS wheels"
            )
        return "sourced"
    return "wheels" if sys.platform == "linux" and platform.machine() == "x86_64" else "none"


def check_tools(ros: str) -> None:
    """End with one line that names everything missing and how to install it."""
    missing = {}
    if importlib.util.find_spec("ensurepip") is None:
        missing["the venv module"] = "python3-venv"
    if ros != "none":
        missing.update({tool: tool for tool in ("gcc", "g++") if which(tool) is None})
        if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
            missing["Python.h"] = "python3-dev"
    if missing:
        fail(f"missing: {', '.join(missing)}; on Debian/Ubuntu: sudo apt install {' '.join(missing.values())}")


def digest(*parts: str, patterns: tuple[str, ...]) -> str:
    """Hash of strings and of the names and contents of the files that match."""
    total = hashlib.sha256(repr(parts).encode())
    for path in sorted({p for pattern in patterns for p in ROOT.glob(pattern) if p.is_file()}):
        total.update(f"{path.relative_to(ROOT)}\0{path.stat().st_mode}\0".encode() + path.read_bytes())
    return total.hexdigest()


class Environment:
    """The virtual environment and its record of the stages that are done."""

    def __init__(self, folder: Path, ros: str) -> None:
        self.folder, self.ros = folder, ros
        self.record = folder / "edgellm-setup.json"
        self.done: dict[str, str] = json.loads(self.record.read_text()) if self.record.is_file() else {}

    def stage(self, name: str, key: str, what: str) -> bool:
        """True if the stage has to run; until `finish` it counts as not done."""
        if self.done.get(name) == key:
            return False
        print(f"edgellm: set-up: {what}", flush=True)
        self.done.pop(name, None)
        if self.record.is_file():
            self._save()
        return True

    def finish(self, name: str, key: str) -> None:
        self.done[name] = key
        self._save()

    def _save(self) -> None:
        self.record.write_text(json.dumps(self.done, indent=1))

    def pip(self, *arguments: str, ros_parts: bool) -> None:
        """Run the environment's pip; its progress shows on a terminal, only its errors elsewhere."""
        quiet = [] if sys.stdout.isatty() else ["-qq"]
        command = [str(self.folder / "bin/python"), "-m", "pip", "install", "--no-input", *quiet]
        variables = {
            **os.environ,
            "EDGELLM_ROS": "1" if ros_parts else "0",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PYTHONWARNINGS": "ignore:Editable installation.",  # 10 lines that say that it is one
        }
        run = subprocess.run([*command, *arguments], cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, check=False)
        if run.returncode:
            reason = f"pip ended with status {run.returncode}, see above (is the network there?)"
            fail(f"set-up failed: {reason}; run make again to resume")


def set_up(folder: Path) -> None:
    ros = ros_source(folder)
    check_tools(ros)
    environment = Environment(folder, ros)
    constraints = str(ROOT / "constraints.txt")

    base = repr((sys.version, sys.base_prefix, ros, os.environ.get("AMENT_PREFIX_PATH") if ros == "sourced" else None))
    if environment.stage("base", base, f"creating {folder.name} (Python {platform.python_version()}, ROS: {ros})"):
        environment.done.clear()
        # A sourced ROS takes numpy, yaml, lark and empy from the system's packages.
        venv.create(folder, system_site_packages=ros == "sourced", clear=True, symlinks=True, with_pip=True)
        environment.pip("-c", constraints, "pip", "setuptools", ros_parts=False)
        environment.finish("base", base)

    key = digest(base, patterns=DEPENDENCY_FILES)
    if environment.stage("dependencies", key, "installing dependencies (at first some minutes of downloads)"):
        extras = ",".join([*EXTRAS, "ros"] if ros == "wheels" else EXTRAS)
        environment.pip("-c", constraints, "--no-build-isolation", "-e", f".[{extras}]", ros_parts=False)
        environment.done.pop("package", None)  # the editable install above has no ROS parts
        environment.finish("dependencies", key)

    key = digest(base, patterns=(*PACKAGE_FILES, "msg/*", "srv/*", "action/*"))
    if environment.stage("package", key, "building ROS interfaces, installing this repository"):
        environment.pip("--no-deps", "--no-build-isolation", "-e", ".", ros_parts=ros != "none")
        if ros == "none":
            print(f"edgellm: ROS parts not built: no ROS is sourced and {platform.machine()} has no ROS wheels")
        environment.finish("package", key)


def main() -> None:
    folder = Path(os.environ.get("VENV", ROOT / ".venv")).resolve()
    lock = ROOT / "build" / "setup.lock"
    lock.parent.mkdir(exist_ok=True)
    begin = time.monotonic()
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # `make demo` and `make test` may be started together
        set_up(folder)
    if time.monotonic() - begin > 2:
        print(f"edgellm: set-up done in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
