"""`edgellm export`: checkpoint → ONNX directory (decoder, visual encoder, embedding, tokenizer, configuration)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from edgellm import progress
from edgellm.checkpoint import Checkpoint, copy_text_files
from edgellm.config import ONNX_SCHEMA_VERSION, OnnxConfig
from edgellm.errors import ExportError
from edgellm.export import graph
from edgellm.files import whole_directory, write_json
from edgellm.models.layers import ExportSpec
from edgellm.models.registry import family_of, load_decoder, load_visual
from edgellm.vision.base import read_preprocessor_config, vision_config_from_checkpoint

EMBEDDING = "embedding.safetensors"
"""The token embedding, one tensor `weight` [V, H]."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def export(checkpoint_dir: str | Path, onnx_dir: str | Path, *, max_lora_rank: int = 0) -> None:
    """Write the ONNX directory of a checkpoint; it appears whole or not at all.

    Weights keep the checkpoint's dtype and are read from its mapped files while they are written. With `max_lora_rank`
    above 0 every linear layer of the decoder takes LoRA weights as inputs, up to this rank in total of a batch.
    Raises CheckpointError, ExportError or ConfigError, each one line.
    """
    if max_lora_rank < 0:
        raise ExportError(f"max_lora_rank is {max_lora_rank}; it must be a whole number of at least 0 (no LoRA)")
    checkpoint = Checkpoint(checkpoint_dir)
    family = family_of(checkpoint)
    if not (checkpoint.directory / "tokenizer.json").exists():
        raise ExportError(f"{checkpoint.directory} has no tokenizer.json; copy the checkpoint's tokenizer files")
    decoder = load_decoder(checkpoint)
    visual = load_visual(checkpoint)
    vision = None
    if visual is not None:
        preprocessor = read_preprocessor_config(checkpoint.directory)
        vision = vision_config_from_checkpoint(checkpoint.model_type, checkpoint.hf_config, preprocessor)
    dtype = decoder.lm_head.weight.dtype
    names = {v: k for k, v in DTYPES.items()}
    if dtype not in names:
        raise ExportError(f"{checkpoint.directory}: weights are {dtype}; supported are {', '.join(DTYPES)}")
    manifest = OnnxConfig(
        ONNX_SCHEMA_VERSION, checkpoint.model_type, names[dtype], decoder.config, vision, max_lora_rank
    )
    with whole_directory(Path(onnx_dir)) as out:
        spec = decoder.export_spec(lora=max_lora_rank > 0)
        modules: dict[str, tuple[nn.Module, ExportSpec]] = {"model.onnx": (decoder, spec)}
        if visual is not None:
            modules["visual/model.onnx"] = (visual, visual.export_spec())
            (out / "visual").mkdir()
        with progress.steps(2 * len(modules), f"exporting {checkpoint.directory.name}") as steps:
            for name, (module, spec) in modules.items():
                steps.start(f"tracing {name}")
                traced = graph.trace(module, spec)
                steps.start(f"writing {name}")
                graph.save(traced, out / name)
        save_file({"weight": checkpoint.tensor(family.embedding_name())}, out / EMBEDDING)
        copy_text_files(checkpoint, out)
        write_json(out / "config.json", dataclasses.asdict(manifest))
