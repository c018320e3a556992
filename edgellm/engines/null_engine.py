"""Fake answers with a settable step time, to test schedulers and nodes without a model.

The next token is a fixed function (`next_token`) of all tokens of the context and their places, so a test can say what
every request must answer. It is computed from what the KV cache holds: plane 0 has the tokens, plane 1 the running
digest up to each of them. A cache slot that was mixed up, cut short or not moved gives other tokens.

An input's embedding is the token's id; the visual encoder returns zeros, so that image tokens count as token 0.
Shape letters: B rows, S new tokens per row, N positions whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from edgellm.config import NullConfig, from_dict
from edgellm.engine_dir import NULL_CONFIG, EngineConfig, read_manifest
from edgellm.engines.base import TensorSpec

PEAK = 8.0
"""Logit of the next token; the others are normally distributed below `PEAK - 1`."""

_Unsigned = npt.NDArray[np.uint64]


def next_token(tokens: Sequence[int], vocab_size: int) -> int:
    """What a null engine answers greedily after the context `tokens`."""
    digests = _digests(np.asarray(tokens), 0, np.uint64(0))
    return int(_mix(digests[-1:])[0] % np.uint64(vocab_size))


class NullDecoder:
    """The decoder. The KV cache is int64 [B, 2, 1, capacity, 1]: tokens, and digests of the context up to each."""

    def __init__(self, config: EngineConfig, null: NullConfig) -> None:
        self._null = null
        self._vocab_size = config.decoder.vocab_size
        cache = TensorSpec(("batch", 2, 1, "kv_capacity", 1), torch.int64)
        row, embeds = ("batch",), TensorSpec(("batch", "seq_len", config.decoder.hidden_size), torch.float32)
        self.inputs: Mapping[str, TensorSpec] = {
            "inputs_embeds": embeds,
            "past_key_values_0": cache,
            "rope_rotary_cos_sin": TensorSpec(
                ("rope_batch", "kv_capacity", config.decoder.rope.rotary_dim), torch.float32
            ),
            "context_lengths": TensorSpec(row, torch.int32),
            "kvcache_start_index": TensorSpec(row, torch.int32),
            "last_token_ids": TensorSpec(("batch", "num_selected"), torch.int64),
            **{f"deepstack_embeds_{i}": embeds for i in range(config.decoder.num_deepstack)},
        }
        self.outputs: Mapping[str, TensorSpec] = {
            "logits": TensorSpec(("batch", "num_selected", self._vocab_size), torch.float32),
            "present_key_values_0": cache,
        }
        self.device = torch.device("cpu")
        random = np.random.default_rng(0)
        others = np.minimum(random.standard_normal(self._vocab_size), PEAK - 1)
        others[0] = PEAK
        # twice, so that every rotation of the row is a slice of it
        self._rows: npt.NDArray[np.float32] = np.tile(others.astype(np.float32), 2)

    def run(self, phase: str, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """See `Engine.run`."""
        tokens_BS = inputs["inputs_embeds"][..., 0].to(torch.int64).numpy()
        starts, ends = (inputs[name].tolist() for name in ("kvcache_start_index", "context_lengths"))
        cache = outputs.get("present_key_values_0", inputs["past_key_values_0"])
        if cache.data_ptr() != inputs["past_key_values_0"].data_ptr():
            cache.copy_(inputs["past_key_values_0"])
        planes_B2C = cache[:, :, 0, :, 0].numpy()
        logits_BNV, picked_BN = outputs["logits"].numpy(), inputs["last_token_ids"].tolist()
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            tokens, digests = planes_B2C[row, 0], planes_B2C[row, 1].view(np.uint64)
            tokens[start:end] = tokens_BS[row, : end - start]
            before = digests[start - 1] if start else np.uint64(0)
            digests[start:end] = _digests(tokens[start:end], start, before)
            for n, picked in enumerate(picked_BN[row]):
                chosen = int(_mix(digests[start + picked : start + picked + 1])[0] % np.uint64(self._vocab_size))
                shift = (self._vocab_size - chosen) % self._vocab_size
                logits_BNV[row, n] = self._rows[shift : shift + self._vocab_size]
        if phase == "prefill":
            _wait(self._null.prefill_s_per_token * sum(end - start for start, end in zip(starts, ends, strict=True)))
        else:
            _wait(self._null.decode_s_per_step)

    def close(self) -> None:
        """See `Engine.close`."""


class NullVisual:
    """The visual encoder: takes any inputs, fills any outputs with zeros."""

    def __init__(self, config: EngineConfig, null: NullConfig) -> None:
        self._null = null
        names = ["image_embeds", *(f"deepstack_embeds_{i}" for i in range(config.decoder.num_deepstack))]
        embeds = TensorSpec(("num_image_tokens", config.decoder.hidden_size), torch.float32)
        self.inputs: Mapping[str, TensorSpec] = {}
        self.outputs: Mapping[str, TensorSpec] = dict.fromkeys(names, embeds)
        self.device = torch.device("cpu")

    def run(self, phase: str, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """See `Engine.run`."""
        for output in outputs.values():
            output.zero_()
        _wait(self._null.encode_s_per_image)

    def close(self) -> None:
        """See `Engine.close`."""


def load_decoder(directory: Path, num_threads: int | None) -> NullDecoder:
    """The decoder; it has one thread, whatever `num_threads` says."""
    return NullDecoder(read_manifest(directory), _read(directory))


def load_visual(directory: Path, num_threads: int | None) -> NullVisual:
    """The visual encoder."""
    return NullVisual(read_manifest(directory), _read(directory))


def _read(directory: Path) -> NullConfig:
    path = directory / NULL_CONFIG
    return from_dict(NullConfig, json.loads(path.read_text(encoding="utf-8")), str(path))


def _wait(seconds: float) -> None:
    if seconds > 0:
        time.sleep(seconds)


def _digests(tokens: npt.NDArray[np.int64], start: int, before: np.uint64) -> _Unsigned:
    """The running digest after each of `tokens`, which begin at place `start` after a context of digest `before`."""
    places = np.arange(start, start + len(tokens), dtype=np.uint64)
    digests: _Unsigned = before + np.cumsum(_mix((places << np.uint64(32)) + tokens.astype(np.uint64)), dtype=np.uint64)
    return digests


def _mix(x: _Unsigned) -> _Unsigned:
    """SplitMix64's finalizer (Steele, Lea, Flood, 2014), after one step of its sequence."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: _Unsigned = x ^ (x >> np.uint64(31))
    return mixed
