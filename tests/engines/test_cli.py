"""`edgellm build` for the backends that take a checkpoint, and `edgellm run` on what it wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgellm.cli import main
from edgellm.engine_dir import read_manifest


def test_build_and_run_from_a_checkpoint(tiny_vlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for backend, option in (("torch", "device=cpu"), ("null", "decode_s_per_step=0.001")):
        engine = tmp_path / backend
        command = ["build", str(tiny_vlm), str(engine), "--backend", backend, "--option", option]
        assert main([*command, "--max-batch-size", "2"]) == 0
        assert read_manifest(engine).limits.max_batch_size == 2
        capsys.readouterr()
        assert main(["run", str(engine), "--prompt", "Hello.", "--max-tokens", "4"]) == 0
        assert "completion tokens" in capsys.readouterr().out


def test_one_line_errors(tiny_vlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["build", str(tiny_vlm), str(tmp_path / "engine"), "--backend", "torch", "--option"]
    assert main([*command, "device=gpu"]) == 1
    assert "device is 'gpu'; valid values are auto, cuda, cpu" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "device"])
    assert "'device' is not KEY=VALUE" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
