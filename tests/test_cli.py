"""The command line as a user types it: separate processes, exit codes, one-line errors, nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgellm.cli import main
from edgellm_ros import scenes


def edgellm(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgellm.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)


@pytest.fixture
def failure(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail, in this process; returns the one line that it prints."""

    def run(*arguments: object) -> str:
        assert main([str(a) for a in arguments]) == 1
        captured = capfd.readouterr()
        lines = captured.err.strip().splitlines()
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("edgellm: error: ")
        return lines[0]

    return run


@pytest.fixture(scope="module")
def frame(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("frame") / "frame.png"
    scene = scenes.sample_scene(scenes.scene_rng("test", 2))
    Image.fromarray(scenes.render([scene], (320, 256))[0].numpy()).save(path)
    return path


def test_export_build_run(tiny_vlm: Path, frame: Path, tmp_path: Path) -> None:
    onnx, engine = tmp_path / "onnx", tmp_path / "engine"
    done = edgellm("export", tiny_vlm, onnx)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "the exporter's own chatter is not for users"
    for _ in range(2):  # again, over its own output
        done = edgellm("build", onnx, engine, "--max-batch-size", 2, "--max-image-tokens", 40)
        assert done.returncode == 0, done.stderr
    limits = json.loads((engine / "config.json").read_text())["limits"]
    assert (limits["max_batch_size"], limits["max_image_tokens"]) == (2, 40)
    done = edgellm("run", engine, "--prompt", "What is there?", "--image", frame, "--max-tokens", 40)
    assert done.returncode == 0, done.stderr
    answer, summary = done.stdout.strip().splitlines()
    assert answer
    assert "completion tokens" in summary
    assert "tokens/s" in summary
    prompt_tokens = int(summary.split("[")[1].split()[0])
    assert prompt_tokens < 60, "the image was not reduced to 40 tokens"
    assert {p.name for p in tmp_path.iterdir()} == {"onnx", "engine"}


def test_batch_file(tiny_engine: Path, frame: Path, tmp_path: Path) -> None:
    shutil.copyfile(frame, tmp_path / "frame.png")
    look = {"role": "user", "content": [{"type": "image", "image": "frame.png"}, {"type": "text", "text": "What?"}]}
    missing = {"role": "user", "content": [{"type": "image", "image": "gone.png"}, {"type": "text", "text": "What?"}]}
    requests = [{"messages": [look]}, {"messages": [missing]}, {"messages": [{"role": "user", "content": "Hello"}]}]
    batch = {"batch_size": 2, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "max_generate_length": 6}
    (tmp_path / "in.json").write_text(json.dumps({**batch, "requests": requests}))
    done = edgellm("run", tiny_engine, "--input-file", tmp_path / "in.json", "--output-file", tmp_path / "out.json")
    assert done.returncode == 1
    assert "answered 2 of 3 requests" in done.stdout
    responses = json.loads((tmp_path / "out.json").read_text())["responses"]
    assert [r["request_idx"] for r in responses] == [0, 1, 2]
    assert responses[0]["output_text"]
    assert "gone.png does not exist" in responses[1]["error"]
    assert responses[2]["usage"]["completion_tokens"] <= 6


def test_adapters(lora_engine: Path, tiny_vlm: Path, frame: Path, tmp_path: Path) -> None:
    run = ("run", lora_engine, "--prompt", "What is there?", "--image", frame)
    adapters = {name: tiny_vlm / "lora" / name for name in ("pirate", "terse")}
    by_flag = {}
    for name, path in adapters.items():
        done = edgellm(*run, "--lora", f"{name}={path}")
        assert done.returncode == 0, done.stderr
        by_flag[name] = done.stdout.splitlines()[0]
    done = edgellm(*run)
    by_flag[None] = done.stdout.splitlines()[0]
    assert len(set(by_flag.values())) == 3
    content = [{"type": "image", "image": str(frame)}, {"type": "text", "text": "What is there?"}]
    requests = [{"messages": [{"role": "user", "content": content}], "lora_name": name} for name in by_flag]
    batch = {"requests": requests, "batch_size": 3, "temperature": 0.0, "top_p": 1.0, "top_k": 0}
    for name, path in adapters.items():
        shutil.copytree(path, tmp_path / name)
    batch["available_lora_weights"] = {name: name for name in adapters}
    (tmp_path / "in.json").write_text(json.dumps(batch))
    done = edgellm("run", lora_engine, "--input-file", tmp_path / "in.json", "--output-file", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    responses = json.loads((tmp_path / "out.json").read_text())["responses"]
    assert [r["output_text"] for r in responses] == [*by_flag.values()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must be a JSON object"),
        ('{"requests": []}', "requests must be a list of at least one"),
        ('{"requests": [{"messages": "hi"}]}', r"requests[0].messages must be a list"),
        ('{"requests": [{"messages": []}], "heat": 1}', "unknown key 'heat'; valid keys are"),
        ('{"requests": [{"messages": []}], "temperature": -1}', "temperature is -1"),
    ],
)
def test_bad_batch_file(
    tiny_engine: Path, tmp_path: Path, failure: Callable[..., str], content: str, message: str
) -> None:
    (tmp_path / "in.json").write_text(content)
    line = failure("run", tiny_engine, "--input-file", tmp_path / "in.json", "--output-file", tmp_path / "out.json")
    assert message in line
    assert not (tmp_path / "out.json").exists()


def test_one_line_errors(tiny_engine: Path, tiny_vlm: Path, tmp_path: Path, failure: Callable[..., str]) -> None:
    assert "does not exist" in failure("run", tmp_path / "none", "--prompt", "hi")
    assert "not an engine's manifest" in failure("run", tiny_vlm, "--prompt", "hi")
    assert "is not a directory" in failure("export", tmp_path / "none", tmp_path / "onnx")
    assert "is no ONNX directory" in failure("build", tmp_path, tmp_path / "engine")
    assert "temperature is nan" in failure("run", tiny_engine, "--prompt", "hi", "--temperature", "nan")
    assert "go together" in failure("run", tiny_engine, "--input-file", tmp_path / "in.json")
    assert "takes no LoRA adapters" in failure("run", tiny_engine, "--prompt", "hi", "--lora", f"a={tiny_vlm}")
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not a picture")
    assert "bad.png" in failure("run", tiny_engine, "--prompt", "hi", "--image", bad)
    huge = tmp_path / "huge.png"
    Image.fromarray(np.zeros((20_000, 20_000), np.uint8)).convert("1").save(huge)
    assert "huge.png has too many pixels" in failure("run", tiny_engine, "--prompt", "hi", "--image", huge)
    assert {p.name for p in tmp_path.iterdir()} == {"bad.png", "huge.png"}
