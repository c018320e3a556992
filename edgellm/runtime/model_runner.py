"""The tensors of a running batch: assembles what a prefill or decode step needs and calls the engines.

Shape letters: B running requests, S prompt tokens, H hidden size, V vocabulary, N tokens of one image.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from edgellm.engine_dir import EMBEDDING, EngineConfig
from edgellm.engines.base import Engine, backend
from edgellm.runtime.kv_cache import KVCache
from edgellm.runtime.request import Request
from edgellm.runtime.rope import RopeTable
from edgellm.vision.base import VisualFeatures, VisualRunner, load_visual_runner


class ModelRunner:
    """Owns the engines, the KV cache and the step buffers. Used by one thread. Slots 0 … B − 1 are in use."""

    def __init__(self, directory: Path, config: EngineConfig, num_threads: int | None) -> None:
        self._config = config
        loader = backend(config.backend)
        self._engine: Engine = loader.load_decoder(directory, num_threads)
        self.visual_runner: VisualRunner | None = None
        self._visual: Engine | None = None
        if config.vision is not None:
            self._visual = loader.load_visual(directory, num_threads)
            self.visual_runner = load_visual_runner(
                config.model_type,
                config.vision,
                device=self._visual.device,
                output_dtype=self._visual.outputs["image_embeds"].dtype,
            )
        limits, device = config.limits, self._engine.device
        embedding: Any = safe_open(directory / EMBEDDING, framework="pt")
        # on a CPU mapped, not read: a step touches a few rows of it
        self._embedding_VH: torch.Tensor = embedding.get_tensor("weight").to(device)
        self.kv_cache = KVCache(self._engine.inputs, limits.max_batch_size, limits.max_kv_cache_capacity, device)
        rope_names = tuple(n for n in self._engine.inputs if n.startswith("rope_rotary_"))
        self._rope = RopeTable(
            config.decoder.rope, rope_names, limits.max_batch_size, limits.max_kv_cache_capacity, device
        )
        self._allocate(limits.max_batch_size, device)

    def _allocate(self, batch: int, device: torch.device) -> None:
        """Step buffers for decode; a step of B < batch rows uses their leading rows, at the same address."""
        self._dtype = self._engine.inputs["inputs_embeds"].dtype
        hidden, vocab = self._config.decoder.hidden_size, self._config.decoder.vocab_size
        self._embeds_B1H = torch.zeros(batch, 1, hidden, dtype=self._dtype, device=device)
        self._lengths_B = torch.zeros(batch, dtype=torch.int32, device=device)
        self._starts_B = torch.zeros(batch, dtype=torch.int32, device=device)
        # What the host says of a step, tokens and starts, goes to a GPU in one copy. The host may write it again: the
        # tokens that it has read from the step before tell that the copy is over.
        self._step_2B = torch.zeros(2, batch, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device_step_2B = self._step_2B.to(device)
        self._last_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._logits_B1V = torch.zeros(batch, 1, vocab, dtype=torch.float32, device=device)
        levels = range(self._config.decoder.num_deepstack)
        self._no_deepstack = {f"deepstack_embeds_{i}": torch.zeros_like(self._embeds_B1H) for i in levels}

    def warm_up(self) -> None:
        """Run one prefill and one decode step on zeros, so that the first request does not pay for first use."""
        embeds = torch.zeros(1, 2, self._config.decoder.hidden_size, dtype=self._dtype, device=self._engine.device)
        self._rope.set_slot(0, None, 0)
        self._prefill(0, embeds, {name: torch.zeros_like(embeds) for name in self._no_deepstack})
        self.decode([0], [2])

    def encode_images(self, request: Request) -> list[VisualFeatures]:
        """Run the visual encoder on the request's images; adds the time to `request.vision_s`."""
        if self._visual is None or self.visual_runner is None or not request.images:
            return []
        start = time.perf_counter()
        features = [self.visual_runner.encode(self._visual, image) for image in request.images]
        request.vision_s += time.perf_counter() - start
        return features

    def prefill(self, slot: int, request: Request, features: list[VisualFeatures]) -> torch.Tensor:
        """Fill the slot with the request's prompt; returns the logits [1, V] of its last token."""
        ids = torch.tensor(request.token_ids, device=self._engine.device)
        embeds_1SH = self._embed(ids)[None]
        deepstack = {name: torch.zeros_like(embeds_1SH) for name in self._no_deepstack}
        if features and self.visual_runner is not None:
            where = ids == self.visual_runner.image_token_id
            embeds_1SH[0, where] = torch.cat([f.image_embeds for f in features]).to(self._dtype)
            for i, target in enumerate(deepstack.values()):
                target[0, where] = torch.cat([f.deepstack_embeds[i] for f in features]).to(self._dtype)
        self._rope.set_slot(slot, request.positions_3S, request.next_position)
        return self._prefill(slot, embeds_1SH, deepstack)

    def _prefill(self, slot: int, embeds_1SH: torch.Tensor, deepstack: dict[str, torch.Tensor]) -> torch.Tensor:
        length, device = embeds_1SH.shape[1], embeds_1SH.device
        logits_11V = torch.empty_like(self._logits_B1V[:1])
        inputs = {
            "inputs_embeds": embeds_1SH,
            "context_lengths": torch.full((1,), length, dtype=torch.int32, device=device),
            "kvcache_start_index": torch.zeros(1, dtype=torch.int32, device=device),
            "last_token_ids": torch.full((1, 1), length - 1, device=device),
            **deepstack,
            **self._rope.inputs(slot, 1),
            **self.kv_cache.inputs(slot, 1),
        }
        self._engine.run("prefill", inputs, {"logits": logits_11V, **self.kv_cache.outputs(slot, 1)})
        return logits_11V[:, 0]

    def decode(self, last_tokens: list[int], cached_tokens: list[int]) -> torch.Tensor:
        """One step for slots 0 … B − 1, whose caches hold `cached_tokens`; returns logits [B, V], valid until the next.

        Token `last_tokens[i]` is written at cache index `cached_tokens[i]`.
        """
        rows = len(last_tokens)
        self._step_2B[:, :rows] = torch.tensor([last_tokens, cached_tokens], dtype=torch.int32)
        self._device_step_2B.copy_(self._step_2B, non_blocking=True)
        tokens_B, starts_B = self._device_step_2B[:, :rows]
        self._embeds_B1H[:rows, 0] = self._embed(tokens_B)
        self._starts_B[:rows] = starts_B
        self._lengths_B[:rows] = starts_B + 1
        inputs = {
            "inputs_embeds": self._embeds_B1H[:rows],
            "context_lengths": self._lengths_B[:rows],
            "kvcache_start_index": self._starts_B[:rows],
            "last_token_ids": self._last_B1[:rows],
            **{name: tensor[:rows] for name, tensor in self._no_deepstack.items()},
            **self._rope.inputs(0, rows),
            **self.kv_cache.inputs(0, rows),
        }
        self._engine.run("generation", inputs, {"logits": self._logits_B1V[:rows], **self.kv_cache.outputs(0, rows)})
        return self._logits_B1V[:rows, 0]

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
