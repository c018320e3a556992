"""`edgellm export`: checkpoint → ONNX directory (decoder, visual encoder, embedding, tokenizer, configuration)."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from edgellm.checkpoint import Checkpoint, read_json
from edgellm.config import ONNX_SCHEMA_VERSION, DecoderConfig, OnnxConfig
from edgellm.errors import ExportError
from edgellm.export import graph
from edgellm.files import whole_directory, write_json
from edgellm.models.registry import family_of, load_decoder, load_visual
from edgellm.vision.base import vision_config_from_checkpoint

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
"""Text-side files of a checkpoint that travel to the engine directory; only the first is required."""

EMBEDDING = "embedding.safetensors"
"""The token embedding, one tensor `weight` [V, H]."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def export(checkpoint_dir: str | Path, onnx_dir: str | Path) -> None:
    """Write the ONNX directory of a checkpoint; it appears whole or not at all.

    Weights keep the checkpoint's dtype and are read from its mapped files while they are written.
    Raises CheckpointError, ExportError or ConfigError, each one line.
    """
    checkpoint = Checkpoint(checkpoint_dir)
    family = family_of(checkpoint)
    if not (checkpoint.directory / "tokenizer.json").exists():
        raise ExportError(f"{checkpoint.directory} has no tokenizer.json; copy the checkpoint's tokenizer files")
    decoder, config = load_decoder(checkpoint)
    visual = load_visual(checkpoint)
    vision = None
    if visual is not None:
        preprocessor = read_json(checkpoint.directory / "preprocessor_config.json")
        vision = vision_config_from_checkpoint(checkpoint.model_type, checkpoint.hf_config, preprocessor)
    dtype = decoder.lm_head.weight.dtype
    names = {v: k for k, v in DTYPES.items()}
    if dtype not in names:
        raise ExportError(f"{checkpoint.directory}: weights are {dtype}; supported are {', '.join(DTYPES)}")
    manifest = OnnxConfig(ONNX_SCHEMA_VERSION, checkpoint.model_type, names[dtype], config, vision)
    with whole_directory(Path(onnx_dir), "config.json") as out:
        graph.save(decoder_graph(decoder, config, dtype), out / "model.onnx")
        if visual is not None:
            (out / "visual").mkdir()
            graph.save(visual_graph(visual, config), out / "visual" / "model.onnx")
        save_file({"weight": checkpoint.tensor(family.embedding_name())}, out / EMBEDDING)
        for name in TOKENIZER_FILES:
            if (checkpoint.directory / name).exists():
                shutil.copyfile(checkpoint.directory / name, out / name)
        write_json(out / "config.json", dataclasses.asdict(manifest))


def decoder_graph(decoder: nn.Module, config: DecoderConfig, dtype: torch.dtype) -> Any:
    """The decoder's ONNX graph; input and output names as in the design's list of engine I/O."""
    dim = torch.export.Dim
    batch, seq, capacity = dim("batch"), dim("seq_len"), dim("kv_capacity")
    b, s, c = 2, 3, 5  # any sizes above 1: the exporter would take 0 and 1 for constants
    layers, levels = range(config.num_hidden_layers), range(config.num_deepstack)
    cache = (b, 2, config.num_key_value_heads, c, config.head_dim)
    inputs = {
        "inputs_embeds": torch.zeros(b, s, config.hidden_size, dtype=dtype),
        "past_key_values": [torch.zeros(cache, dtype=dtype) for _ in layers],
        "rope_rotary_cos_sin": torch.zeros(b, c, config.rope.rotary_dim),
        "context_lengths": torch.full((b,), s, dtype=torch.int32),
        "kvcache_start_index": torch.zeros(b, dtype=torch.int32),
        "last_token_ids": torch.zeros(b, 2, dtype=torch.int64),
        "deepstack_embeds": [torch.zeros(b, s, config.hidden_size, dtype=dtype) for _ in levels],
    }
    dynamic = {
        "inputs_embeds": {0: batch, 1: seq},
        "past_key_values": [{0: batch, 3: capacity} for _ in layers],
        "rope_rotary_cos_sin": {0: dim("rope_batch"), 1: capacity},
        "context_lengths": {0: batch},
        "kvcache_start_index": {0: batch},
        "last_token_ids": {0: batch, 1: dim("num_selected")},
        "deepstack_embeds": [{0: batch, 1: seq} for _ in levels],
    }
    return graph.trace(decoder, inputs, dynamic, ["logits", *(f"present_key_values_{i}" for i in layers)])


def visual_graph(visual: nn.Module, config: DecoderConfig) -> Any:
    """The visual encoder's ONNX graph, for one image of any size."""
    patches = torch.export.Dim("num_image_tokens") * visual.config.merge_unit
    head_dim = visual.config.hidden_size // visual.config.num_heads
    p = 2 * visual.config.merge_unit
    inputs = {
        "pixel_values": torch.zeros(p, visual.config.patch_dim),
        "pos_embed_indices": torch.zeros(4, p, dtype=torch.int64),
        "pos_embed_weights": torch.zeros(4, p),
        "rotary_cos_sin": torch.zeros(p, head_dim),
    }
    dynamic = {
        "pixel_values": {0: patches},
        "pos_embed_indices": {1: patches},
        "pos_embed_weights": {1: patches},
        "rotary_cos_sin": {0: patches},
    }
    levels = [f"deepstack_embeds_{i}" for i in range(config.num_deepstack)]
    return graph.trace(visual, inputs, dynamic, ["image_embeds", *levels])
