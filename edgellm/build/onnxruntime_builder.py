"""`edgellm build --backend onnxruntime`: ONNX directory → engine directory for a CPU.

The graphs are made to compute in fp32 and the custom operators are lowered to ONNX Runtime's fused ones; normalization,
activation and skip fusions are left to ONNX Runtime's own optimizer when the engine is loaded.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgellm.build.fusions import fuse
from edgellm.build.precision import to_float32
from edgellm.build.source import MAKE_ONNX, Source
from edgellm.config import BuildConfig
from edgellm.engine_dir import EMBEDDING, SCHEMA_VERSION, EngineConfig, write_manifest
from edgellm.errors import BuildError
from edgellm.export.graph import save
from edgellm.files import whole_directory
from edgellm_plugins.attention import onnxruntime as attention_lowering

DECODER, VISUAL = "llm.onnx", "visual/visual.onnx"


def build(source: Source, engine_dir: Path, limits: BuildConfig, options: Mapping[str, Any]) -> None:
    """Write the engine directory; it appears whole or not at all. Raises BuildError for a graph it cannot lower."""
    onnx_dir, onnx = source.directory, source.onnx
    if source.checkpoint is not None:
        raise BuildError(f"{onnx_dir / 'config.json'} is not an ONNX directory of this edgellm; {MAKE_ONNX}")
    if options:
        raise BuildError(f"backend onnxruntime takes no options, but got {', '.join(options)}")
    vision = source.limited_vision(limits)
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
        source.copy_text_files(out)
        shutil.copyfile(onnx_dir / EMBEDDING, out / EMBEDDING)
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
