"""LLM(model=CHECKPOINT): built once into a cache, built again when anything changed, nothing half-built."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgellm import LLM, BuildConfig, SamplingParams
from edgellm.errors import CheckpointError, ConfigError
from edgellm.llm import built_engine


def test_builds_once_and_reuses(tiny_vlm: Path, tmp_path: Path) -> None:
    model, cache = tmp_path / "model", tmp_path / "cache"
    shutil.copytree(tiny_vlm, model, ignore=shutil.ignore_patterns("lora"))
    limits = BuildConfig(max_batch_size=1)
    with LLM(model=model, build_config=limits, cache_dir=cache) as llm:
        assert llm.config.limits == limits
        assert llm.generate("Hello.", SamplingParams(max_tokens=3, ignore_eos=True)).usage.completion_tokens == 3
    (engine,) = cache.iterdir()
    built_at = (engine / "config.json").stat().st_mtime_ns
    assert built_engine(model, limits, "onnxruntime", cache) == engine
    assert (engine / "config.json").stat().st_mtime_ns == built_at
    (model / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert built_engine(model, limits, "onnxruntime", cache) != engine


def test_wrong_use(tiny_vlm: Path, tiny_engine: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give either an engine directory or model=CHECKPOINT"):
        LLM()
    with pytest.raises(ConfigError, match="give either"):
        LLM(tiny_engine, model=tiny_vlm)
    with pytest.raises(ConfigError, match="build_config goes with model"):
        LLM(tiny_engine, build_config=BuildConfig())
    with pytest.raises(CheckpointError, match="is not a directory"):
        LLM(model=tmp_path / "none", cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
