"""Settings of every test run, and the checkpoints and engines that several tests share."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

# A ROS domain of its own, whatever the caller's environment says: tests must neither hear nor move a robot on the same
# network, nor a second test run on the same machine. Above 101 the ports would meet Linux's ephemeral ones.
os.environ["ROS_DOMAIN_ID"] = str(random.SystemRandom().randint(1, 101))

TINY_VLM = Path(__file__).resolve().parents[1] / "assets" / "tiny_vlm"


@pytest.fixture(scope="session")
def tiny_vlm() -> Path:
    """The tiny reference model's checkpoint."""
    return TINY_VLM


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX directory of the tiny reference model."""
    from edgellm.export.exporter import export

    directory = tmp_path_factory.mktemp("tiny") / "onnx"
    export(TINY_VLM, directory)
    return directory


@pytest.fixture(scope="session")
def tiny_engine(tiny_onnx: Path) -> Path:
    """The onnxruntime engine directory of the tiny reference model; tests must not change it."""
    from edgellm.build.builder import build
    from edgellm.config import BuildConfig

    directory = tiny_onnx.parent / "engine"
    build(tiny_onnx, directory, "onnxruntime", BuildConfig())
    return directory


@pytest.fixture(scope="session")
def lora_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The onnxruntime engine directory of the tiny reference model, built for LoRA adapters of 32 ranks in total."""
    from edgellm.build.builder import build
    from edgellm.config import BuildConfig
    from edgellm.export.exporter import export

    root = tmp_path_factory.mktemp("lora")
    export(TINY_VLM, root / "onnx", max_lora_rank=32)
    build(root / "onnx", root / "engine", "onnxruntime", BuildConfig())
    return root / "engine"


@pytest.fixture(scope="session")
def random_vlm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A Qwen3-VL model of transformers with random weights in fp32 (other sizes than tiny_vlm), and its checkpoint."""
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 320,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [12, 10, 10]},
            "attention_bias": True,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_heads": 3,
            "patch_size": 16,
            "out_hidden_size": 128,
            "num_position_embeddings": 49,
            "deepstack_visual_indexes": [0, 1, 3],
        },
        image_token_id=300,
        video_token_id=301,
        vision_start_token_id=302,
        vision_end_token_id=303,
        tie_word_embeddings=False,
    )
    torch.manual_seed(7)
    model = Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # transformers starts with zero biases and unit norms, which would hide a forgotten one
            parameter.copy_(torch.randn_like(parameter) * 0.05 + (parameter.dim() == 1) * parameter)
    directory = tmp_path_factory.mktemp("random_vlm")
    model.save_pretrained(directory)
    return model, directory
