"""LoRA adapters: what PEFT writes, read, checked and converted to the tensors that an engine takes.

An adapter gives each of some linear layers two matrices; the layer's output gains x·A·B (Hu et al., LoRA, 2021,
arXiv:2106.09685). Here A is [K, r] and B [r, M], for K inputs and M outputs, with the scaling (alpha / r, or alpha / √r
for rsLoRA: Kalajdzievski, 2023, arXiv:2312.03732) folded into B. Converted, an adapter is one safetensors file that
holds them under the engine's input names, `<module>.lora_A.weight` and `<module>.lora_B.weight`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from edgellm.errors import LoraError
from edgellm.files import sha256

FORMAT = "edgellm_lora_1"
"""Value of the key "format" in the metadata of a converted file."""

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")
"""Where checkpoints keep the decoder whose layers are `model.layers.<i>` here; the longest that fits is stripped."""

# Keys of adapter_config.json that change nothing in what the tensors mean.
_HARMLESS = {
    "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "lora_dropout",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "loftq_config",
    "eva_config", "qalora_group_size", "runtime_config", "auto_mapping", "ensure_weight_tying",
}  # fmt: skip
# Keys that are read here.
_READ = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias",
}  # fmt: skip
# Features that are refused, with the reason; every other key is refused too when it holds more than an empty value.
_REFUSED = {
    "use_dora": "DoRA rescales the base weights themselves, which one running engine cannot do per request",
    "modules_to_save": "it replaces whole modules of the base model",
    "trainable_token_indices": "it replaces rows of the token embedding",
    "target_parameters": "it trains parameters that are not linear layers",
    "layer_replication": "it changes the number of layers",
    "lora_bias": "it adds biases, which the engine has no inputs for",
    "fan_in_fan_out": "it is for layers with transposed weights",
    "alora_invocation_tokens": "activated LoRA switches the adapter on within a prompt",
}
# Initializations that leave the base weights as they are; PiSSA, OLoRA, LoftQ, CorDA and others change them.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter's matrices (A [K, r], B [r, M], fp32, scaling in B) by module; ranks may differ between modules.

    `digest` tells two adapters with different weights apart. `base_model` is what the adapter says it was made for.
    """

    matrices: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    digest: str
    base_model: str | None

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(a.shape[1] for a, _ in self.matrices.values())


def read_adapter(path: Path) -> AdapterWeights:
    """Read a directory that PEFT has written, or a file from `write_adapter`.

    Raises LoraError in one line: what is missing or damaged, or which feature is not supported and why.
    """
    if not path.exists():
        raise LoraError(f"adapter {path} does not exist; pass a directory written by PEFT's save_pretrained")
    return _read_peft(path) if path.is_dir() else _read_converted(path)


def write_adapter(adapter: AdapterWeights, path: Path) -> None:
    """Write the one-file form, which `read_adapter` reads."""
    tensors = {}
    for module, (a_KR, b_RM) in adapter.matrices.items():
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = a_KR, b_RM
    save_file(tensors, path, {"format": FORMAT, "digest": adapter.digest, "base_model": adapter.base_model or ""})


def _read_converted(path: Path) -> AdapterWeights:
    tensors, metadata = _tensors(path)
    if metadata.get("format") != FORMAT:
        raise LoraError(f"{path} is no adapter file of edgellm; pass the directory that holds {CONFIG}")
    pairs = _pairs(path, tensors)
    return AdapterWeights(pairs, metadata.get("digest", ""), metadata.get("base_model") or None)


def _read_peft(directory: Path) -> AdapterWeights:
    config = _read_config(directory / CONFIG)
    _refuse_unsupported(directory, config)
    if not (directory / WEIGHTS).exists() and (directory / "adapter_model.bin").exists():
        raise LoraError(f"{directory} holds adapter_model.bin; save it as {WEIGHTS} (safe_serialization=True)")
    tensors, _ = _tensors(directory / WEIGHTS)
    matrices = {}
    for name, (a_RK, b_MR) in _pairs(directory, tensors).items():
        if a_RK.dim() != 2 or b_MR.dim() != 2 or a_RK.shape[0] != b_MR.shape[1]:
            raise LoraError(
                f"adapter {directory}: {name} has lora_A {list(a_RK.shape)} and lora_B {list(b_MR.shape)}, which do "
                "not fit together; expected [r, K] and [M, r]"
            )
        b_RM = b_MR.float().t() * _scaling(directory, config, name, a_RK.shape[0])
        matrices[_module(directory, name)] = a_RK.float().t().contiguous(), b_RM.contiguous()
    files = sha256(directory, [CONFIG, WEIGHTS])
    digest = hashlib.sha256("".join(files.values()).encode()).hexdigest()
    return AdapterWeights(matrices, digest, config.get("base_model_name_or_path") or None)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoraError(f"{path} does not exist; pass a directory written by PEFT's save_pretrained") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise LoraError(f"{path} cannot be read as JSON ({e}); save the adapter again") from None
    if not isinstance(config, dict) or "peft_type" not in config:
        raise LoraError(f"{path} is no adapter configuration of PEFT; it has no peft_type")
    return config


def _refuse_unsupported(directory: Path, config: Mapping[str, Any]) -> None:
    """Everything in the configuration is known to be harmless, or is read, or is off; else LoraError."""
    merge = "merge it into the checkpoint instead"
    if config["peft_type"] != "LORA":
        raise LoraError(f"adapter {directory} is of type {config['peft_type']}, not LORA; {merge}")
    if config.get("init_lora_weights") not in _PLAIN_INITS:
        raise LoraError(
            f"adapter {directory}: init_lora_weights {config['init_lora_weights']!r} changes the base weights; save it "
            "as plain LoRA (path_initial_model_for_weight_conversion of PEFT's save_pretrained)"
        )
    for key, value in config.items():
        if key in _HARMLESS or key in _READ or not value:
            continue
        why = _REFUSED.get(key, "this edgellm does not know this feature")
        raise LoraError(f"adapter {directory} uses {key}, which is not supported: {why}; {merge}")


def _tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata."""
    try:
        with safe_open(path, framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise LoraError(f"{path} does not exist; the adapter is incomplete, copy it again") from None
    except (SafetensorError, OSError) as e:
        raise LoraError(f"{path} is truncated or damaged ({e}); copy the adapter again") from None


def _pairs(where: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The tensors' (A, B) by module; raises LoraError for a tensor that is neither, or has no partner."""
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if match is None:
            raise LoraError(
                f"adapter {where} holds {name}, which is no LoRA matrix of a linear layer; train without it, or merge "
                "the adapter into the checkpoint"
            )
        if not tensor.isfinite().all():
            raise LoraError(f"adapter {where}: {name} holds values that are not finite; the training has diverged")
        modules.setdefault(match[1], {})[match[2]] = tensor
    for module, matrices in modules.items():
        if len(matrices) < 2:
            raise LoraError(f"adapter {where}: {module} has lora_A or lora_B only; the file is incomplete")
    if not modules:
        raise LoraError(f"adapter {where} holds no LoRA matrices; was it saved before training?")
    return {module: (matrices["A"], matrices["B"]) for module, matrices in modules.items()}


def _scaling(directory: Path, config: Mapping[str, Any], name: str, rank: int) -> float:
    """What PEFT multiplies the update of module `name` by; `rank` is the module's own, whatever the patterns say."""
    module = name.removeprefix("base_model.model.")
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise LoraError(f"{directory / CONFIG}: alpha of {module} is {alpha!r}; it must be a number")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _module(directory: Path, name: str) -> str:
    """Our name of the linear layer that PEFT calls `name`."""
    module = name.removeprefix("base_model.model.")
    prefix = next(p for p in _PREFIXES if module.startswith(p))
    inner = module.removeprefix(prefix)
    if not inner.startswith("layers."):
        raise LoraError(
            f"adapter {directory} trains {module}; only linear layers of the decoder's layers take adapters, so limit "
            "target_modules to the language model, or merge the adapter into the checkpoint"
        )
    return f"model.{inner}"
