"""The tensors of a running batch: assembles what a prefill or decode step needs and calls the engines.

Shape letters: B running requests, S prompt tokens, H hidden size, V vocabulary, N tokens of one image.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from edgellm.engine_dir import EMBEDDING, EngineConfig
from edgellm.engines.base import Engine, backend
from edgellm.runtime.kv_cache import KVCache
from edgellm.runtime.lora import LoraAdapter, LoraManager
from edgellm.runtime.request import Request
from edgellm.runtime.rope import RopeTable
from edgellm.vision.base import PreparedImage, VisualFeatures, VisualRunner

FEATURE_CACHE_IMAGES = 8
"""Encoder results kept by content hash: the images of a conversation's earlier turns need not be encoded again."""


class ModelRunner:
    """Owns the engines, the KV cache and the step buffers. Used by one thread. Slots 0 … B − 1 are in use."""

    def __init__(
        self, directory: Path, config: EngineConfig, visual_runner: VisualRunner | None, num_threads: int | None
    ) -> None:
        self._config = config
        loader = backend(config.backend)
        self._engine: Engine = loader.load_decoder(directory, num_threads)
        self._visual_runner = visual_runner
        self._visual = loader.load_visual(directory, num_threads) if visual_runner is not None else None
        # mapped, not read: a step touches a few rows of it
        embedding: Any = safe_open(directory / EMBEDDING, framework="pt")
        self._embedding_VH: torch.Tensor = embedding.get_tensor("weight")
        limits, device = config.limits, self._engine.device
        self.kv_cache = KVCache(self._engine.inputs, limits.max_batch_size, limits.max_kv_cache_capacity, device)
        self.lora = LoraManager(self._engine.inputs, limits.max_lora_rank or 0, device)
        rope_names = tuple(n for n in self._engine.inputs if n.startswith("rope_rotary_"))
        self._rope = RopeTable(
            config.decoder.rope, rope_names, limits.max_batch_size, limits.max_kv_cache_capacity, device
        )
        self._features: OrderedDict[str, VisualFeatures] = OrderedDict()
        self._allocate(limits.max_batch_size, device)

    def _allocate(self, batch: int, device: torch.device) -> None:
        """Step buffers for decode; a step of B < batch rows uses their leading rows, at the same address."""
        self._dtype = self._engine.inputs["inputs_embeds"].dtype
        hidden, vocab = self._config.decoder.hidden_size, self._config.decoder.vocab_size
        self._embeds_B1H = torch.zeros(batch, 1, hidden, dtype=self._dtype, device=device)
        self._lengths_B = torch.zeros(batch, dtype=torch.int32, device=device)
        self._starts_B = torch.zeros(batch, dtype=torch.int32, device=device)
        self._last_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._logits_B1V = torch.zeros(batch, 1, vocab, dtype=torch.float32, device=device)
        levels = range(self._config.decoder.num_deepstack)
        self._no_deepstack = {f"deepstack_embeds_{i}": torch.zeros_like(self._embeds_B1H) for i in levels}
        self._decode_io: dict[int, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = {}

    def warm_up(self) -> None:
        """Run one prefill and one decode step on zeros, so that the first request does not pay for first use."""
        embeds = torch.zeros(1, 2, self._config.decoder.hidden_size, dtype=self._dtype, device=self._engine.device)
        self._rope.set_slot(0, None, 0)
        self._prefill(0, embeds, {name: torch.zeros_like(embeds) for name in self._no_deepstack}, 0, None)
        self.decode([0], [2], [None])

    @property
    def device(self) -> torch.device:
        """Where the KV cache is."""
        return self._engine.device

    def begin(self, slot: int, request: Request) -> None:
        """Prepare the slot for the request's tokens: the rotary positions of its prompt and answer."""
        self._rope.set_slot(slot, request.positions_3S, request.next_position)

    def encode_images(self, request: Request) -> None:
        """Run the visual encoder on the images that the rest of the prefill needs, unless their features are known."""
        if self._visual is None or self._visual_runner is None or request.features:
            return
        start = time.perf_counter()
        request.features = [
            self._encode(image) if end > request.prefilled else None
            for image, (_, end) in zip(request.images, request.image_spans, strict=True)
        ]
        request.vision_s += time.perf_counter() - start

    def _encode(self, image: PreparedImage) -> VisualFeatures:
        assert self._visual is not None
        assert self._visual_runner is not None
        features = self._features.get(image.key)
        if features is None:
            features = self._visual_runner.encode(self._visual, image)
            self._features[image.key] = features
            while len(self._features) > FEATURE_CACHE_IMAGES:
                self._features.popitem(last=False)
        else:
            self._features.move_to_end(image.key)
        return features

    def prefill(self, slot: int, request: Request, end: int) -> torch.Tensor:
        """Fill the slot with prompt tokens `request.prefilled` … `end − 1`; returns the logits [1, V] of the last."""
        start = request.prefilled
        embeds_1SH = self._embed(torch.tensor(request.token_ids[start:end]))[None]
        deepstack = {name: torch.zeros_like(embeds_1SH) for name in self._no_deepstack}
        for features, (first, past) in zip(request.features, request.image_spans, strict=False):
            low, high = max(first, start), min(past, end)
            if features is not None and low < high:
                rows, target = slice(low - first, high - first), slice(low - start, high - start)
                embeds_1SH[0, target] = features.image_embeds[rows].to(self._dtype)
                for level, values in zip(deepstack.values(), features.deepstack_embeds, strict=True):
                    level[0, target] = values[rows].to(self._dtype)
        return self._prefill(slot, embeds_1SH, deepstack, start, request.lora)

    def _prefill(
        self,
        slot: int,
        embeds_1SH: torch.Tensor,
        deepstack: dict[str, torch.Tensor],
        start: int,
        lora: LoraAdapter | None,
    ) -> torch.Tensor:
        length = embeds_1SH.shape[1]
        logits_11V = torch.empty_like(self._logits_B1V[:1])
        inputs = {
            "inputs_embeds": embeds_1SH,
            "context_lengths": torch.tensor([start + length], dtype=torch.int32),
            "kvcache_start_index": torch.tensor([start], dtype=torch.int32),
            "last_token_ids": torch.tensor([[length - 1]]),
            **deepstack,
            **self.lora.inputs([lora]),
            **self._rope.inputs(slot, 1),
            **self.kv_cache.inputs(slot, 1),
        }
        self._engine.run("prefill", inputs, {"logits": logits_11V, **self.kv_cache.outputs(slot, 1)})
        return logits_11V[:, 0]

    def decode(
        self, last_tokens: list[int], cached_tokens: list[int], loras: Sequence[LoraAdapter | None]
    ) -> torch.Tensor:
        """One step for slots 0 … B − 1, whose caches hold `cached_tokens`; returns logits [B, V], valid until the next.

        Token `last_tokens[i]` is written at cache index `cached_tokens[i]`; row i uses the adapter `loras[i]`.
        """
        rows = len(last_tokens)
        self._embeds_B1H[:rows, 0] = self._embed(torch.tensor(last_tokens))
        self._starts_B[:rows] = torch.tensor(cached_tokens, dtype=torch.int32)
        torch.add(self._starts_B[:rows], 1, out=self._lengths_B[:rows])
        inputs, outputs = self._decode_tensors(rows)
        self._engine.run("generation", {**inputs, **self.lora.inputs(loras)}, outputs)
        return self._logits_B1V[:rows, 0]

    def _decode_tensors(self, rows: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Inputs and outputs of a decode step of `rows` rows: the same tensors every time, so they stay bound."""
        if rows not in self._decode_io:
            inputs = {
                "inputs_embeds": self._embeds_B1H[:rows],
                "context_lengths": self._lengths_B[:rows],
                "kvcache_start_index": self._starts_B[:rows],
                "last_token_ids": self._last_B1[:rows],
                **{name: tensor[:rows] for name, tensor in self._no_deepstack.items()},
                **self._rope.inputs(0, rows),
                **self.kv_cache.inputs(0, rows),
            }
            self._decode_io[rows] = inputs, {"logits": self._logits_B1V[:rows], **self.kv_cache.outputs(0, rows)}
        return self._decode_io[rows]

    def move_slot(self, source: int, target: int, cached_tokens: int) -> None:
        """Slot `target` takes over the request of slot `source`."""
        self.kv_cache.move(source, target, cached_tokens)
        self._rope.move(source, target)

    def close(self) -> None:
        """Free the engines."""
        self._engine.close()
        if self._visual is not None:
            self._visual.close()

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self._embedding_VH[ids].to(self._dtype)
