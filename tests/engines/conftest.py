"""Engine directories of the tiny model, one for each backend that this machine has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from edgellm.build.builder import build
from edgellm.config import BuildConfig

CASES = {
    "null": ("null", {}),
    "onnxruntime": ("onnxruntime", {}),
    "torch-cpu": ("torch", {"device": "cpu"}),
    "torch-cuda": ("torch", {"device": "cuda"}),
    "torch-cuda-float32": ("torch", {"device": "cuda", "dtype": "float32"}),
}
"""Name of a case → backend and its build options."""


@pytest.fixture(scope="session")
def engine_of(
    tmp_path_factory: pytest.TempPathFactory, tiny_vlm: Path, request: pytest.FixtureRequest
) -> Callable[[str], Path]:
    """The tiny model's engine directory for a case, built when first asked for; skips what the machine lacks."""
    root = tmp_path_factory.mktemp("engines")

    def engine(case: str) -> Path:
        backend, options = CASES[case]
        if options.get("device") == "cuda" and not torch.cuda.is_available():
            pytest.skip("this machine has no CUDA GPU")
        if backend == "onnxruntime":
            directory: Path = request.getfixturevalue("tiny_engine")
            return directory
        if not (root / case).exists():
            build(tiny_vlm, root / case, backend, BuildConfig(), options)
        return root / case

    return engine
