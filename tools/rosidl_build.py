"""Turn this package's msg/, srv/ and action/ files into an importable Python package, without CMake.

`build()` calls the rosidl generators (Python functions; from a sourced ROS, else from the PyPI wheels) in the order
that rosidl's CMake code does: .msg -> .idl -> type hashes -> C structs -> type supports -> Python, then compiles
everything into one extension module, `<package>_s__rosidl_typesupport_c.<abi>.so`. It needs gcc and g++, nothing else.
Messages built this way and by `colcon build` have the same type hashes, so the two talk to each other.

    python tools/rosidl_build.py                    # in-tree, only if something changed: edgellm_ros/{msg,srv,action}
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import importlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "edgellm_ros"
KINDS = ("msg", "srv", "action")
STAMP = ".interfaces.json"
# Both are needed: rmw_fastrtps registers types through introspection; other middlewares use introspection alone.
TYPESUPPORTS = ("rosidl_typesupport_fastrtps_c", "rosidl_typesupport_introspection_c")
# Interface packages that generated services and actions refer to without being named in package.xml.
IMPLICIT_DEPENDENCIES = ("builtin_interfaces", "service_msgs", "unique_identifier_msgs", "action_msgs")


class RosidlMissingError(Exception):
    """The interfaces cannot be built on this machine; the message is one line that says what is missing."""


def interface_files(root: Path = ROOT) -> list[str]:
    """Interface files relative to `root`, sorted: msg/*.msg, srv/*.srv, action/*.action."""
    return [str(p.relative_to(root)) for kind in KINDS for p in sorted((root / kind).glob(f"*.{kind}"))]


def sourced_ros_paths() -> list[str]:
    """site-packages folders of a sourced ROS (AMENT_PREFIX_PATH) that fit this Python.

    pip's build isolation hides PYTHONPATH but not AMENT_PREFIX_PATH; a sourced ROS must win there too."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    found = []
    for prefix in filter(None, os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)):
        for folder in (f"lib/{version}/site-packages", f"local/lib/{version}/dist-packages"):
            if Path(prefix, folder).is_dir():
                found.append(str(Path(prefix, folder)))
    return found


def use_sourced_ros() -> bool:
    """Put a sourced ROS first on sys.path; true if it provides the rosidl generators."""
    paths = sourced_ros_paths()
    if not any(Path(p, "rosidl_generator_py").is_dir() for p in paths):
        return False
    sys.path[:0] = [p for p in paths if p not in sys.path]
    return True


def missing_parts() -> str | None:
    """What keeps this machine from building the interfaces, in one line; None if nothing does."""
    use_sourced_ros()
    for module in ("rosidl_adapter", "rosidl_generator_py", "rosidl_typesupport_fastrtps_c", "rosidl_parser", "numpy"):
        if importlib.util.find_spec(module) is None:
            return f"Python module {module} not found (source a ROS 2, or install the `ros` extra)"
    for tool in (os.environ.get("CC", "gcc"), os.environ.get("CXX", "g++")):
        if shutil.which(tool) is None:
            return f"compiler {tool} not found"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return f"Python.h not found in {sysconfig.get_paths()['include']} (install python3-dev)"
    return None


def _prefixes() -> list[Path]:
    """Installation prefixes to look in: a sourced ROS's, then the one the generators were imported from."""
    import rosidl_adapter

    named = [Path(p) for p in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if p]
    # <prefix>/lib/pythonX.Y/site-packages/rosidl_adapter/__init__.py
    own = [Path(rosidl_adapter.__file__).parents[4], Path(sys.prefix)]
    return list(dict.fromkeys(p.resolve() for p in (*named, *own) if p.is_dir()))


def _package_prefix(package: str) -> Path:
    for prefix in _prefixes():
        if (prefix / "share" / package / "package.xml").is_file():
            return prefix
    raise RosidlMissingError(f"ROS package {package} not found in {', '.join(map(str, _prefixes()))}")


def _idl_dependencies(package_xml: Path) -> list[str]:
    """Interface packages that `package_xml` depends on, also through others."""
    todo, found = list(IMPLICIT_DEPENDENCIES), dict.fromkeys(())
    todo += [e.text or "" for e in ElementTree.parse(package_xml).getroot().iterfind("depend")]
    while todo:
        name = todo.pop()
        try:
            share = _package_prefix(name) / "share" / name
        except RosidlMissingError:
            if name in IMPLICIT_DEPENDENCIES:  # e.g. service_msgs, which Humble does not have
                continue
            raise
        if name in found or not any(share.glob("*/*.idl")):
            continue
        found[name] = None
        todo += [e.text or "" for e in ElementTree.parse(share / "package.xml").getroot().iterfind("depend")]
    return sorted(found)


def fingerprint(root: Path = ROOT) -> str:
    """Hash of everything the built interfaces depend on: sources, this builder, Python, generators and their prefix."""
    digest = hashlib.sha256()
    here = Path(__file__)
    sources = [root / f for f in (*interface_files(root), "package.xml")]
    for path in (*sources, here, here.with_name("one_so_dispatch.h")):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    digest.update(repr([sysconfig.get_config_var("EXT_SUFFIX"), *map(str, _prefixes())]).encode())
    for generator in ("rosidl_generator_c", "rosidl_generator_py", *TYPESUPPORTS):
        digest.update((_package_prefix(generator) / "share" / generator / "package.xml").read_bytes())
    return digest.hexdigest()


class _Builder:
    """One run: generated sources go to `work`, the Python package to `out`/<PACKAGE>."""

    def __init__(self, root: Path, out: Path, work: Path) -> None:
        self.root, self.package, self.work = root, out / PACKAGE, work
        self.files = [Path(f) for f in interface_files(root)]
        self.dependencies = _idl_dependencies(root / "package.xml")
        # One common include tree, as the generated `#include "edgellm_ros/msg/..."` lines want; type supports that
        # generate files of equal names get a tree of their own.
        self.include = work / "include" / PACKAGE
        self.introspection = work / "introspection" / PACKAGE
        self.dispatch = work / "dispatch" / PACKAGE
        self.python = work / "python"
        self.idl_tuples: list[str] = []

    def generate(self) -> None:
        from rosidl_adapter import convert_to_idl

        for file in self.files:
            with contextlib.redirect_stdout(io.StringIO()):  # it reports every file it reads and writes
                convert_to_idl(self.root, PACKAGE, file, self.work / "idl")
            self.idl_tuples.append(f"{self.work / 'idl'}:{file.with_suffix('.idl').as_posix()}")
            for tree in (self.include, self.introspection, self.dispatch):
                (tree / file.parent / "detail").mkdir(parents=True, exist_ok=True)
            (self.python / file.parent).mkdir(parents=True, exist_ok=True)
        jobs: list[tuple[object, ...]] = [
            ("rosidl_generator_c", "generate_c", self.include, self._type_descriptions()),
            ("rosidl_generator_py", "generate_py", self.python, {}, ["rosidl_typesupport_c"]),
            ("rosidl_typesupport_fastrtps_c", "generate_typesupport_fastrtps_c", self.include, {}),
            ("rosidl_typesupport_introspection_c", "generate_c", self.introspection, {}),
            ("rosidl_typesupport_c", "generate_c", self.dispatch, {}, list(TYPESUPPORTS)),
        ]
        # Template expansion is slow Python and the generators do not need each other's output.
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
            for done in [pool.submit(self._generate_one, *job) for job in jobs]:
                done.result()
        self._visibility_headers()

    def _generate_one(
        self, generator: str, function: str, output: Path, more: dict[str, list[str]], *positional: list[str]
    ) -> None:
        run = getattr(importlib.import_module(generator), function)
        run(self._arguments(generator, output, **more), *positional)

    def _type_descriptions(self) -> dict[str, list[str]]:
        """Type hashes (REP-2016); ROS distributions before Iron have none."""
        if importlib.util.find_spec("rosidl_generator_type_description") is None:
            return {}
        from rosidl_generator_type_description import generate_type_hash

        out = self.work / "type_description"
        shares = [f"{d}:{_package_prefix(d) / 'share' / d}" for d in self.dependencies]
        generate_type_hash(self._arguments("rosidl_generator_type_description", out, include_paths=shares))
        names = [t.rsplit(":", 1)[1] for t in self.idl_tuples]
        return {"type_description_tuples": [f"{n}:{(out / n).with_suffix('.json')}" for n in names]}

    def _arguments(self, generator: str, output: Path, **more: list[str]) -> str:
        """Write the argument file that rosidl generators take; returns its path."""
        shares = {d: _package_prefix(d) / "share" / d for d in self.dependencies}
        idls = [f"{d}:{idl}" for d, share in shares.items() for idl in sorted(share.glob("*/*.idl"))]
        arguments = {
            "package_name": PACKAGE,
            "output_dir": str(output),
            "idl_tuples": self.idl_tuples,
            "target_dependencies": [],
            "ros_interface_dependencies": idls,
            "ros_interface_files": [str(self.root / f) for f in self.files],
            "template_dir": str(_package_prefix(generator) / "share" / generator / "resource"),
            **more,
        }
        path = self.work / f"{generator}_arguments.json"
        path.write_text(json.dumps(arguments))
        return str(path)

    def _visibility_headers(self) -> None:
        (self.include / "msg").mkdir(exist_ok=True)
        for generator in ("rosidl_generator_c", *TYPESUPPORTS):
            name = f"{generator}__visibility_control.h"
            text = (_package_prefix(generator) / "share" / generator / "resource" / f"{name}.in").read_text()
            text = text.replace("@PROJECT_NAME@", PACKAGE).replace("@PROJECT_NAME_UPPER@", PACKAGE.upper())
            (self.include / "msg" / name).write_text(text)

    def compile(self) -> Path:
        """Compile all generated C and C++ into one extension module in the package; returns its path."""
        units = self._translation_units()
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(self._compile_one, units))
        libs = [Path(p, "lib") for p in _prefixes()]
        names = [
            f"{d}__{s}" for d in self.dependencies
            for s in ("rosidl_generator_c", "rosidl_generator_py", "rosidl_typesupport_c", *TYPESUPPORTS)
        ]
        names += ["rosidl_runtime_c", "rosidl_typesupport_c", "rosidl_typesupport_fastrtps_cpp", *TYPESUPPORTS]
        names += ["fastcdr", "rcutils", "rmw", "dl"]
        library = self.package / f"{PACKAGE}_s__rosidl_typesupport_c{sysconfig.get_config_var('EXT_SUFFIX')}"
        fresh = library.with_suffix(".new")
        run = [_tool("CXX", "g++"), "-shared", "-s", "-o", str(fresh), *objects, "-Wl,--as-needed"]
        for lib in libs:
            run += [f"-L{lib}", f"-Wl,-rpath-link,{lib}"]
        # The wheels put shared libraries into <prefix>/lib, three levels above site-packages/edgellm_ros.
        run += ["-Wl,-rpath,$ORIGIN/../../..", *(f"-l{n}" for n in names)]
        _run(run)
        fresh.replace(library)  # never truncate a library that a running process has mapped
        return library

    def _translation_units(self) -> list[tuple[Path, bool]]:
        """(source, needs the dispatch header). Files are joined, as parsing their headers takes most of the time;
        the type descriptions cannot be, they define equal static names."""
        units = []
        for tree in (self.include, self.introspection, self.dispatch, self.python):
            for suffix in (".cpp", ".c"):
                sources = sorted(tree.rglob(f"*{suffix}"))
                single = [p for p in sources if p.name.endswith("__description.c")]
                units += [(p, False) for p in single]
                if len(sources) > len(single):
                    joined = self.work / f"{tree.parent.name}_{tree.name}{suffix}"
                    joined.write_text("".join(f'#include "{p}"\n' for p in sources if p not in single))
                    units.append((joined, tree == self.dispatch))
        return units

    def _compile_one(self, unit: tuple[Path, bool]) -> str:
        import numpy

        source, dispatch = unit
        target = source.with_suffix(f"{source.suffix}.o")
        includes = [self.include.parent, self.introspection.parent, Path(sysconfig.get_paths()["include"])]
        includes.append(Path(numpy.get_include()))
        for prefix in _prefixes():
            packages = [p for p in (prefix / "include").glob("*") if p.is_dir() and not p.name.startswith("python")]
            includes += [prefix / "include", *sorted(packages)]
        run = [_tool("CXX", "g++"), "-std=c++17"] if source.suffix == ".cpp" else [_tool("CC", "gcc"), "-std=gnu11"]
        run += ["-O1", "-fPIC", f'-DROS_PACKAGE_NAME="{PACKAGE}"', *(f"-I{i}" for i in includes)]
        if dispatch:
            run += ["-include", str(Path(__file__).with_name("one_so_dispatch.h"))]
        _run([*run, "-c", str(source), "-o", str(target)])
        return str(target)

    def install_python(self) -> None:
        """Copy the generated modules beside the extension; modules of interfaces that are gone go too."""
        for kind in KINDS:
            shutil.rmtree(self.package / kind, ignore_errors=True)
            if (self.python / kind).is_dir():
                shutil.copytree(self.python / kind, self.package / kind, ignore=shutil.ignore_patterns("*.c", "*.em"))


def _tool(variable: str, default: str) -> str:
    return os.environ.get(variable, default)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RosidlMissingError(f"`{command[0]}` failed while building the ROS interfaces:\n{done.stdout[:2000]}")


def build(out: Path, root: Path = ROOT, *, force: bool = False) -> bool:
    """Build the interfaces into `out`/edgellm_ros. In-tree (`out` is `root`) only if something changed since the last
    time, or with `force`. Returns whether it built.

    Raises RosidlMissingError if a generator, a compiler or a ROS package is missing or a compiler fails."""
    reason = missing_parts()
    if reason:
        raise RosidlMissingError(reason)
    stamp, want = root / PACKAGE / STAMP, fingerprint(root)
    if out == root and not force and stamp.is_file() and json.loads(stamp.read_text()) == want:
        return False
    (out / PACKAGE).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="rosidl_") as work:
        builder = _Builder(root, out, Path(work).resolve())
        builder.generate()
        builder.compile()
        builder.install_python()
    if out == root:
        stamp.write_text(json.dumps(want))
    return True


def main() -> int:
    try:
        changed = build(ROOT, force="--force" in sys.argv[1:])
    except RosidlMissingError as error:
        print(f"edgellm: ROS interfaces not built: {error}", file=sys.stderr)
        return 1
    print(f"edgellm: ROS interfaces {'built' if changed else 'up to date'}: {len(interface_files())} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
