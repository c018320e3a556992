"""Imports go one way: plugins <- edgellm/{models,quantize,export,build,engines} <- runtime <- edgellm_ros.

Read from the source text of every file, so that an import inside a function counts too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"edgellm": "edgellm", "edgellm_plugins": "plugins", "edgellm_ros": "edgellm_ros"}
GENERATED = ("edgellm_ros.msg", "edgellm_ros.srv", "edgellm_ros.action")
OFFLINE_STEPS = ("edgellm.export", "edgellm.build", "edgellm.cli")
ROS = ("rclpy", "ament_index_python", "launch", "launch_ros", "sensor_msgs", "std_msgs", "action_msgs")
# Libraries that the offline steps may use and a robot does not have.
OFFLINE = ("transformers", "peft", "onnx", "onnx_ir", "onnxscript", "modelopt")

# Package -> what its modules must not import. The longest prefix that fits a module counts, with all shorter ones.
FORBIDDEN = {
    "edgellm_plugins": ("edgellm", "edgellm_ros", *ROS),
    "edgellm": ("edgellm_ros", *ROS),
    "edgellm.errors": ("edgellm", "torch"),
    "edgellm.files": ("torch",),
    "edgellm.progress": ("edgellm", "torch"),
    "edgellm.models": ("edgellm.engines", "edgellm.runtime", *OFFLINE_STEPS, *OFFLINE),
    "edgellm.quantize": ("edgellm.build", "edgellm.engines", "edgellm.runtime", "edgellm.cli"),
    "edgellm.export": ("edgellm.build", "edgellm.engines", "edgellm.runtime", "edgellm.cli", "transformers"),
    "edgellm.build": ("edgellm.engines", "edgellm.runtime", "edgellm.cli", "transformers"),
    "edgellm.engines": ("edgellm.runtime", *OFFLINE_STEPS, *OFFLINE),
    "edgellm.vision": ("edgellm.models", "edgellm.runtime", *OFFLINE_STEPS, *OFFLINE),
    "edgellm.runtime": OFFLINE,
    "edgellm_ros": ("edgellm_plugins", "edgellm.cli", *OFFLINE),
}
# Inside edgellm, these packages import only this.
ALLOWED = {
    "edgellm.runtime": (
        "edgellm.runtime", "edgellm.engines", "edgellm.engine_dir", "edgellm.vision",
        "edgellm.config", "edgellm.errors", "edgellm.files", "edgellm.lora", "edgellm.progress",
    ),
}  # fmt: skip
# The one backend that runs a model definition itself.
MODELS_FROM_ENGINES = "edgellm.engines.torch_engine"


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            if not name.startswith(GENERATED):
                yield name, path


def imported(name: str, path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import; `from a import b` counts as a.b, which may be a module or a name in one."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            yield from ((node.lineno, ".".join((*base, alias.name))) for alias in node.names)


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def violations(name: str, path: Path) -> list[str]:
    found = []
    for line, target in imported(name, path):
        where = f"{path.relative_to(ROOT)}:{line}: {name} imports {target}"
        for package, forbidden in FORBIDDEN.items():
            if inside(name, package) and any(inside(target, f) for f in forbidden):
                found.append(f"{where}, but {package} must not import it")
        for package, allowed in ALLOWED.items():
            if inside(name, package) and inside(target, "edgellm") and not any(inside(target, a) for a in allowed):
                found.append(f"{where}; {package} imports only {', '.join(allowed)}")
        if inside(name, "edgellm.engines") and inside(target, "edgellm.models") and name != MODELS_FROM_ENGINES:
            found.append(f"{where}; of the engines only {MODELS_FROM_ENGINES} does")
    return found


def test_imports_go_one_way() -> None:
    found = [violation for name, path in modules() for violation in violations(name, path)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("source", "bad"),
    [
        ("import rclpy", True),
        ("def f():\n    from edgellm.models import qwen3_vl", True),
        ("from .. import models", True),
        ("from ..engines import base", False),
        ("import transformers.utils", True),
        ("from edgellm import engine_dir", False),
    ],
)
def test_the_check_sees_a_violation(source: str, bad: bool) -> None:
    path = ROOT / "edgellm" / "runtime" / "llm.py"

    class Text(type(path)):  # the path of a real module with another text
        def read_text(self, encoding: str | None = None) -> str:
            return source

    assert bool(violations("edgellm.runtime.llm", Text(path))) == bad


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("edgellm", ("onnxruntime", "tensorrt", "onnx", "onnxscript", "transformers", "rclpy", "torch")),
        ("edgellm.cli", ("onnxruntime", "tensorrt", "onnx", "onnxscript", "transformers", "rclpy")),
        ("edgellm.runtime.llm", ("tensorrt", "onnx", "onnxscript", "transformers", "rclpy")),
        ("edgellm_plugins", ("onnxruntime", "tensorrt", "onnx", "onnxscript", "transformers", "rclpy")),
        ("edgellm_ros", ("torch", "rclpy")),
        ("edgellm_ros.scenes", ("rclpy",)),
    ],
)
def test_import_loads_no_heavy_library(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


def rooms() -> list[Path]:
    return sorted(p for p in (ROOT / "plugins").iterdir() if p.is_dir() and p.name not in ("include", "__pycache__"))


@pytest.mark.parametrize("room", rooms(), ids=lambda room: room.name)
def test_every_op_has_its_room_complete(room: Path) -> None:
    from edgellm_plugins import OPS

    assert (room / "op.py").is_file(), f"plugins/{room.name} has no op.py"
    ops = [op for op in OPS.values() if op.reference.__module__ == f"edgellm_plugins.{room.name}.op"]
    assert ops, f"plugins/{room.name}/op.py registers no op, or plugins/__init__.py does not list it in OPS"
    for op in ops:
        assert op.tolerance.relative, f"{op.name}: no tolerance"
        assert set(op.updates.values()) <= set(op.tensor_names()), f"{op.name}: `updates` names an unknown tensor"
        functions = (op.fake, op.validate, op.samples)
        assert all(f.__module__.startswith("edgellm_plugins.") for f in functions), f"{op.name}: declared elsewhere"
