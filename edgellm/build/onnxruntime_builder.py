"""`edgellm build --backend onnxruntime`: ONNX directory → engine directory for a CPU.

The graphs are made to compute in fp32 and the custom operators are lowered to ONNX Runtime's fused ones; normalization,
activation and skip fusions are left to ONNX Runtime's own optimizer when the engine is loaded.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

import onnx_ir as ir

from edgellm.build.fusions import fuse
from edgellm.build.precision import to_float32
from edgellm.config import BuildConfig, OnnxConfig
from edgellm.engine_dir import SCHEMA_VERSION, EngineConfig, write_manifest
from edgellm.errors import BuildError
from edgellm.export.graph import save
from edgellm.files import whole_directory
from edgellm.vision.base import limit_image_tokens
from edgellm_plugins.attention import onnxruntime as attention_lowering

DECODER, VISUAL = "llm.onnx", "visual/visual.onnx"


def build(onnx_dir: Path, onnx: OnnxConfig, engine_dir: Path, limits: BuildConfig) -> None:
    """Write the engine directory; it appears whole or not at all. Raises BuildError for a graph it cannot lower."""
    vision = None
    if onnx.vision is not None:
        tokens = limits.min_image_tokens, limits.max_image_tokens
        vision = limit_image_tokens(onnx.model_type, onnx.vision, *tokens)
    with whole_directory(engine_dir) as out:
        decoder = ir.load(onnx_dir / "model.onnx")
        to_float32(decoder)
        fuse(decoder)
        layers = attention_lowering.lower(decoder)
        if layers != onnx.decoder.num_hidden_layers:
            raise BuildError(
                f"{onnx_dir / 'model.onnx'} has {layers} attention nodes, config.json says "
                f"{onnx.decoder.num_hidden_layers} layers; export the checkpoint again"
            )
        save(decoder, out / DECODER)
        if onnx.vision is not None:
            (out / VISUAL).parent.mkdir()
            visual = ir.load(onnx_dir / "visual" / "model.onnx")
            to_float32(visual)
            save(visual, out / VISUAL)
        for source in sorted(onnx_dir.iterdir()):
            if source.is_file() and source.name != "config.json" and ".onnx" not in source.name:
                shutil.copyfile(source, out / source.name)
        write_manifest(
            out,
            EngineConfig(
                schema_version=SCHEMA_VERSION,
                model_type=onnx.model_type,
                backend="onnxruntime",
                backend_version=importlib.metadata.version("onnxruntime"),
                device="cpu",
                dtype="float32",
                decoder=onnx.decoder,
                limits=limits,
                vision=vision,
                files={},
            ),
        )
