"""pip side of this repository; metadata stands in pyproject.toml.

This file adds what pyproject.toml cannot say: the ROS interfaces (built by tools/rosidl_build.py) and the files that
make the package visible to ROS tools (ament index, share/edgellm_ros, lib/edgellm_ros). `colcon build` does not come
here, it takes CMakeLists.txt.

Environment: EDGELLM_ROS=auto (default) builds the ROS parts if this machine can, 1 fails if it cannot, 0 leaves them
out.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import rosidl_build  # noqa: E402  (tools/ has to be on sys.path first)

PACKAGE = rosidl_build.PACKAGE
NODES = ("vlm_node", "sim_camera", "chat")  # also in CMakeLists.txt


def why_no_ros() -> str | None:
    """Why the ROS parts are left out of this build, in one line; None if they are built."""
    wanted = os.environ.get("EDGELLM_ROS", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"edgellm: EDGELLM_ROS={wanted}: expected auto, 0 or 1")
    if wanted == "0":
        return "EDGELLM_ROS=0"
    if not rosidl_build.interface_files():
        return "no files in msg/, srv/, action/"
    reason = rosidl_build.missing_parts()
    if reason and wanted == "1":
        raise SystemExit(f"edgellm: ROS parts cannot be built: {reason}")
    return reason


class BuildInterfaces(build_ext):
    """Builds the interfaces in place of the (empty) Extension that marks the wheel as platform-specific."""

    def run(self) -> None:
        try:
            if self.inplace or self.editable_mode:
                rosidl_build.build(ROOT)
            else:
                rosidl_build.build(Path(self.build_lib))
        except rosidl_build.RosidlMissingError as error:
            raise SystemExit(f"edgellm: {error}") from None

    def get_outputs(self) -> list[str]:
        base = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        folders = [base / PACKAGE / kind for kind in rosidl_build.KINDS]
        return [str(p) for folder in folders for p in folder.rglob("*.py")] + [
            str(p) for p in (base / PACKAGE).glob("*_s__rosidl_typesupport_c*.so")
        ]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildPython(build_py):
    """Says, once and where the user can see it with `pip install -v`, that the ROS parts are missing."""

    def run(self) -> None:
        if NO_ROS:
            print(f"edgellm: ROS parts not built: {NO_ROS}", file=sys.stderr)
        super().run()


class EdgeLLMDistribution(Distribution):
    def has_data(self) -> bool:
        """setuptools' editable install asks for this name, does not find it, and would leave out data_files."""
        return bool(self.data_files)


def ros_data_files() -> list[tuple[str, list[str]]]:
    """What ROS tools look for under the installation prefix."""
    interfaces = rosidl_build.interface_files()
    index = "share/ament_index/resource_index"
    files = {
        f"share/{PACKAGE}": ["package.xml"],
        f"{index}/packages": [generated(f"packages/{PACKAGE}", "")],
        f"{index}/rosidl_interfaces": [generated(f"rosidl_interfaces/{PACKAGE}", "\n".join(interfaces))],
        f"lib/{PACKAGE}": [generated(f"lib/{node}", (ROOT / "tools/run_node.sh").read_text(), 0o755) for node in NODES],
    }
    for name in interfaces:
        files.setdefault(f"share/{PACKAGE}/{Path(name).parent}", []).append(name)
    for folder in ("launch", "config"):
        files[f"share/{PACKAGE}/{folder}"] = [str(p.relative_to(ROOT)) for p in sorted((ROOT / folder).glob("*.*"))]
    return list(files.items())


def generated(name: str, text: str, mode: int = 0o644) -> str:
    """Write a file under build/ for installation; returns its path relative to the repository."""
    path = ROOT / "build" / "ros_data" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return str(path.relative_to(ROOT))


NO_ROS = why_no_ros()
# Modules that left the repository would stay in build/lib* and be installed again.
for stale in (ROOT / "build").glob("lib*"):
    shutil.rmtree(stale)

setup(
    distclass=EdgeLLMDistribution,
    packages=[
        *find_packages(include=["edgellm", "edgellm.*", PACKAGE]),
        "edgellm_plugins",
        *(f"edgellm_plugins.{p}" for p in find_packages("plugins")),
    ],
    package_dir={"edgellm_plugins": "plugins"},
    package_data={"edgellm": ["py.typed"], "edgellm_plugins": ["py.typed", "include/*.cuh", "*/*.cu", "*/*.cuh"]},
    ext_modules=[] if NO_ROS else [Extension(f"{PACKAGE}.{PACKAGE}_s__rosidl_typesupport_c", [])],
    data_files=[] if NO_ROS else ros_data_files(),
    cmdclass={"build_ext": BuildInterfaces, "build_py": BuildPython},
    zip_safe=False,
)
