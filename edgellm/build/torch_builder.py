"""`edgellm build --backend torch`: checkpoint → engine directory whose weights are the checkpoint's own files.

Nothing is converted: the engine reads the checkpoint's weights under their names and in their dtype, and computes in
the dtype that the manifest names. Files are hard-linked where the file system allows it, else copied.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from edgellm.build.source import Source
from edgellm.config import BuildConfig, from_dict
from edgellm.engine_dir import CHECKPOINT, EMBEDDING, SCHEMA_VERSION, EngineConfig, write_manifest
from edgellm.errors import BuildError
from edgellm.files import whole_directory
from edgellm.models.registry import family_of

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class TorchOptions:
    """Where the engine runs and what it computes in.

    `device` "cuda" or "cpu"; "auto": a GPU if this machine has one. `dtype` one of `DTYPES`; "auto": the checkpoint's
    on a GPU, float32 on a CPU.
    """

    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name, value, valid in (
            ("device", self.device, ("auto", "cuda", "cpu")),
            ("dtype", self.dtype, ("auto", *DTYPES)),
        ):
            if value not in valid:
                raise BuildError(f"{name} is {value!r}; valid values are {', '.join(valid)}")

    def resolve(self, checkpoint_dtype: str) -> tuple[str, str]:
        """Device and dtype with "auto" replaced."""
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        device = automatic if self.device == "auto" else self.device
        dtype = checkpoint_dtype if device == "cuda" else "float32"
        return device, dtype if self.dtype == "auto" else self.dtype


def build(source: Source, engine_dir: Path, limits: BuildConfig, options: Mapping[str, Any]) -> None:
    """Write the engine directory; it appears whole or not at all. Raises BuildError for what is no checkpoint."""
    checkpoint, onnx = source.checkpoint, source.onnx
    if checkpoint is None:
        raise BuildError(
            f"{source.directory} is an ONNX directory; backend torch takes the checkpoint that it was exported from"
        )
    device, dtype = from_dict(TorchOptions, options, "options of backend torch").resolve(onnx.dtype)
    if dtype not in DTYPES:
        raise BuildError(f"{checkpoint.directory}: weights are {dtype}; supported are {', '.join(DTYPES)}")
    vision = source.limited_vision(limits)
    with whole_directory(engine_dir) as out:
        (out / CHECKPOINT).mkdir()
        for file in (checkpoint.directory / "config.json", *checkpoint.files()):
            _link(file, out / CHECKPOINT / file.name)
        embedding = checkpoint.tensor(family_of(checkpoint).embedding_name())
        save_file({"weight": embedding}, out / EMBEDDING)
        source.copy_text_files(out)
        write_manifest(
            out,
            EngineConfig(
                schema_version=SCHEMA_VERSION,
                model_type=onnx.model_type,
                backend="torch",
                backend_version=torch.__version__,
                device=device,
                dtype=dtype,
                decoder=onnx.decoder,
                limits=limits,
                vision=vision,
                files={},
            ),
        )


def _link(file: Path, target: Path) -> None:
    """Hard-link, or copy to another file system."""
    try:
        os.link(file.resolve(), target)
    except OSError:
        shutil.copyfile(file, target)
