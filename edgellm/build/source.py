"""What an engine is built from: an ONNX directory, or a checkpoint for the backends that need no ONNX."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellm.checkpoint import Checkpoint, copy_text_files
from edgellm.config import ONNX_SCHEMA_VERSION, BuildConfig, OnnxConfig, from_dict
from edgellm.engine_dir import EMBEDDING
from edgellm.errors import BuildError
from edgellm.models.registry import family_of
from edgellm.vision.base import limit_image_tokens, read_preprocessor_config, vision_config_from_checkpoint

MAKE_ONNX = "make it with `edgellm export`"


@dataclass(frozen=True)
class Source:
    """`onnx` describes the model, as exported or as it would be; `checkpoint` is None for an ONNX directory."""

    directory: Path
    onnx: OnnxConfig
    checkpoint: Checkpoint | None

    def limited_vision(self, limits: BuildConfig) -> dict[str, Any] | None:
        """The visual runner's configuration within the limits; None for a text model."""
        if self.onnx.vision is None:
            return None
        tokens = limits.min_image_tokens, limits.max_image_tokens
        return limit_image_tokens(self.onnx.model_type, self.onnx.vision, *tokens)

    def copy_text_files(self, target: Path) -> None:
        """Tokenizer, chat template and the like; everything of an ONNX directory but graphs and weights."""
        if self.checkpoint is not None:
            copy_text_files(self.checkpoint, target)
            return
        for file in sorted(self.directory.iterdir()):
            if file.is_file() and file.name not in ("config.json", EMBEDDING) and ".onnx" not in file.name:
                shutil.copyfile(file, target / file.name)


def read_source(directory: Path) -> Source:
    """Read a source, checked; raises BuildError, ConfigError or CheckpointError."""
    path = directory / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BuildError(f"{path} does not exist, so {directory} is no ONNX directory; {MAKE_ONNX}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise BuildError(f"{path} cannot be read ({e}); {MAKE_ONNX}") from None
    if isinstance(values, dict) and "schema_version" not in values and "model_type" in values:
        checkpoint = Checkpoint(directory)
        return Source(directory, _describe(checkpoint), checkpoint)
    if not isinstance(values, dict) or values.get("schema_version") != ONNX_SCHEMA_VERSION or "backend" in values:
        raise BuildError(f"{path} is not an ONNX directory of this edgellm; {MAKE_ONNX}")
    return Source(directory, from_dict(OnnxConfig, values, str(path)), None)


def _describe(checkpoint: Checkpoint) -> OnnxConfig:
    """What exporting the checkpoint would say about it."""
    family = family_of(checkpoint)
    decoder = family.decoder_config(checkpoint.hf_config)
    vision = None
    if family.visual(checkpoint.hf_config) is not None:
        preprocessor = read_preprocessor_config(checkpoint.directory)
        vision = vision_config_from_checkpoint(checkpoint.model_type, checkpoint.hf_config, preprocessor)
    dtype = str(checkpoint.tensor(family.decoder_weight_name("lm_head.weight", decoder)).dtype).removeprefix("torch.")
    return OnnxConfig(ONNX_SCHEMA_VERSION, checkpoint.model_type, dtype, decoder, vision)
