"""Model families by `model_type`, imported when asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from edgellm.checkpoint import Checkpoint
from edgellm.config import DecoderConfig
from edgellm.errors import CheckpointError
from edgellm.models.layers import EdgeLLMForCausalLM, VisualEncoder


class ModelFamily(Protocol):
    """What a family's file provides: it reads the checkpoint's configuration and says where its weights are."""

    def decoder_config(self, hf_config: Mapping[str, Any]) -> DecoderConfig:
        """The decoder's dimensions; raises CheckpointError for a feature that is not supported."""

    def decoder(self, config: DecoderConfig) -> EdgeLLMForCausalLM:
        """The decoder with its head, weights not loaded."""

    def decoder_weight_name(self, name: str, config: DecoderConfig) -> str:
        """The checkpoint's name of the decoder parameter `name`."""

    def embedding_name(self) -> str:
        """The checkpoint's name of the token embedding."""

    def visual(self, hf_config: Mapping[str, Any]) -> VisualEncoder | None:
        """The visual encoder, weights not loaded, or None for a text model."""

    def visual_weight_name(self, name: str) -> str:
        """The checkpoint's name of the visual encoder's parameter `name`."""


F = TypeVar("F", bound=Callable[[], ModelFamily])

_BUILT_IN = {"qwen3": "edgellm.models.qwen3", "qwen3_vl": "edgellm.models.qwen3_vl"}
_REGISTERED: dict[str, Callable[[], ModelFamily]] = {}


def register_model(model_type: str) -> Callable[[F], F]:
    """Class decorator: the family that loads checkpoints whose `config.json` says `model_type`."""

    def decorate(family: F) -> F:
        _REGISTERED[model_type] = family
        return family

    return decorate


def model_types() -> list[str]:
    """Every known `model_type`, sorted."""
    return sorted({*_BUILT_IN, *_REGISTERED})


def family_of(checkpoint: Checkpoint) -> ModelFamily:
    """The family of a checkpoint; raises CheckpointError that lists the known ones."""
    model_type = checkpoint.model_type
    if model_type not in _REGISTERED and model_type in _BUILT_IN:
        importlib.import_module(_BUILT_IN[model_type])
    if model_type not in _REGISTERED:
        raise CheckpointError(
            f"{checkpoint.directory / 'config.json'}: unknown model_type {model_type!r}; known are "
            f"{', '.join(model_types())}"
        )
    return _REGISTERED[model_type]()


def load_decoder(checkpoint: Checkpoint) -> EdgeLLMForCausalLM:
    """The decoder with the checkpoint's weights mapped in, in the checkpoint's dtype."""
    family = family_of(checkpoint)
    config = family.decoder_config(checkpoint.hf_config)
    with torch.device("meta"):
        module = family.decoder(config)
    _load(module, checkpoint, lambda name: family.decoder_weight_name(name, config))
    return module


def load_visual(checkpoint: Checkpoint) -> VisualEncoder | None:
    """The visual encoder with the checkpoint's weights mapped in, or None for a text model."""
    family = family_of(checkpoint)
    with torch.device("meta"):
        module = family.visual(checkpoint.hf_config)
    if module is not None:
        _load(module, checkpoint, family.visual_weight_name)
    return module


def _load(module: nn.Module, checkpoint: Checkpoint, rename: Callable[[str], str]) -> None:
    """Put mapped tensors in place of the module's parameters: no weight is held in memory of its own."""

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in module.named_parameters():
            source = rename(name)
            tensor = checkpoint.tensor(source)
            if tensor.numel() != parameter.numel():
                raise CheckpointError(
                    f"checkpoint {checkpoint.directory}: {source} is {list(tensor.shape)}, but config.json implies "
                    f"{list(parameter.shape)}; the files do not belong together"
                )
            yield name, tensor.view(parameter.shape)

    module.load_state_dict(dict(weights()), strict=True, assign=True)
    module.requires_grad_(False).eval()
