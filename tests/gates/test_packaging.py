"""What stands in more than one packaging file says the same in each."""

from __future__ import annotations

import importlib.util
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

import edgellm

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGE_XML = ElementTree.parse(ROOT / "package.xml").getroot()
CMAKE = (ROOT / "CMakeLists.txt").read_text()
NODES = {"vlm_node", "sim_camera", "chat"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_name(requirement: str) -> str:
    return normal(re.match(r"[\w.-]+", requirement).group())


def constraints() -> dict[str, set[str]]:
    pins: dict[str, set[str]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split(";")[0].strip().split("==")
            pins.setdefault(normal(name), set()).add(version)
    return pins


def test_versions_agree() -> None:
    assert PROJECT["project"]["version"] == PACKAGE_XML.findtext("version") == edgellm.__version__


def test_ros_wheels_are_pinned_alike() -> None:
    extra = PROJECT["project"]["optional-dependencies"]["ros"]
    assert [r for r in PROJECT["build-system"]["requires"] if r.startswith("ros-")] == extra
    for requirement in extra:
        version = re.search(r"==([\d.]+);", requirement).group(1)
        assert constraints()[requirement_name(requirement)] == {version}


def test_every_dependency_is_pinned() -> None:
    project = PROJECT["project"]
    declared = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    missing = {requirement_name(r) for r in declared} - constraints().keys()
    assert not missing


def test_nodes_are_named_alike() -> None:
    assert set(re.search(r"foreach\(node ([\w ]+)\)", CMAKE).group(1).split()) == NODES
    in_setup = re.search(r"^NODES = (.*)$", (ROOT / "setup.py").read_text(), re.M).group(1)
    assert set(re.findall(r'"(\w+)"', in_setup)) == NODES
    scripts = {target for target in PROJECT["project"]["scripts"].values() if target.startswith("edgellm_ros.")}
    assert scripts == {f"edgellm_ros.{node}:main" for node in NODES}
    assert {node for node in NODES if (ROOT / "edgellm_ros" / f"{node}.py").is_file()} == NODES


def test_interface_dependencies_agree() -> None:
    depends = {e.text for e in PACKAGE_XML.iterfind("depend")}
    assert set(re.search(r"INTERFACE_DEPENDENCIES ([\w ]+)\)", CMAKE).group(1).split()) == depends
    files = [p for kind in ("msg", "srv", "action") for p in (ROOT / kind).glob(f"*.{kind}")]
    used = {m for p in files for m in re.findall(r"^([a-z]\w*)/", p.read_text(), re.M)}
    assert used - {"edgellm_ros"} <= depends


def test_ament_index_is_installed() -> None:
    if importlib.util.find_spec("edgellm_ros.msg") is None:
        pytest.skip("the ROS interfaces are not built here")
    share = Path(sys.prefix) / "share"
    assert (share / "ament_index/resource_index/packages/edgellm_ros").is_file()
    index = (share / "ament_index/resource_index/rosidl_interfaces/edgellm_ros").read_text().split()
    files = {str(p.relative_to(ROOT)) for kind in ("msg", "srv", "action") for p in (ROOT / kind).glob(f"*.{kind}")}
    assert set(index) == files
    assert (share / "edgellm_ros/package.xml").is_file()
    assert all((Path(sys.prefix) / "lib/edgellm_ros" / node).stat().st_mode & 0o111 for node in NODES)
