"""The tiny model: its configuration, its files, and a batched training forward over the `transformers` modules.

`transformers` runs its vision encoder image by image, which starves a GPU, so training calls the same modules on a
batch of equally sized images, and several questions about one image share that image's tokens (see `PackedBatch`).
tests/assets holds this forward to the one of `transformers`.

Shape letters: B scenes, P patches of an image, T image tokens (P/4), L packed tokens, H text hidden size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from assets.tiny_vlm_tokenizer import VOCAB_SIZE

PATCH, MERGE, TEMPORAL = 16, 2, 2
# Images are resized to between 64 and 96 image tokens: 256x256 up to 384x256, the sizes the model is trained on.
MIN_PIXELS, MAX_PIXELS = 256 * 256, 384 * 256


def make_config(tokenizer: Tokenizer) -> Qwen3VLConfig:
    """The configuration of the tiny model; token ids come from its tokenizer."""
    ids = {
        name: tokenizer.token_to_id(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start", "vision_end")
    }
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [12, 10, 10],
            "mrope_interleaved": True,
        },
        "tie_word_embeddings": True,
        "eos_token_id": end,
        "pad_token_id": pad,
        "dtype": "float16",
    }
    vision = {
        "depth": 6,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
        "out_hidden_size": 256,
        "num_position_embeddings": 16 * 16,
        "deepstack_visual_indexes": [1, 2, 4],
        "dtype": "float16",
    }
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
        eos_token_id=end,
        pad_token_id=pad,
    )


def write_side_files(folder: Path, tokenizer: Tokenizer) -> None:
    """Write preprocessor_config.json and generation_config.json beside the checkpoint."""
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen3VLProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
    }
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    generation = {"do_sample": False, "eos_token_id": [end, pad], "pad_token_id": pad}
    for name, content in (("preprocessor_config", preprocessor), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def save_checkpoint(model: Qwen3VLForConditionalGeneration, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config.json and model.safetensors in fp16 (the model itself keeps its dtype) and the side files."""
    folder.mkdir(parents=True, exist_ok=True)
    # The output head is the embedding (tied weights): stored once.
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    half = {name: tensor.detach().to("cpu", torch.float16) for name, tensor in state.items()}
    model.config.dtype = torch.float16
    model.save_pretrained(folder, state_dict=half)
    write_side_files(folder, tokenizer)


@dataclass(frozen=True)
class Layout:
    """What depends only on the frame size and the prefix of a batch, ready on the device."""

    interpolation: tuple[Tensor, Tensor]  # position grid: indices [P, 4], weights [P, 4]
    vision_rope: tuple[Tensor, Tensor]  # cos, sin [P, head_dim]
    image_start: int  # where the T image tokens stand in a row
    image_tokens: int
    prefix_positions: Tensor  # [3, prefix length]
    next_position: int  # the position of the first token after the prefix


def make_layout(model: Qwen3VLForConditionalGeneration, size: tuple[int, int], prefix: list[int]) -> Layout:
    """Lay out a batch of frames of `size` (width, height) whose rows start with the token ids `prefix`."""
    visual, device = model.model.visual, model.device
    grid = torch.tensor([[1, size[1] // PATCH, size[0] // PATCH]], device=device)
    interpolation = get_vision_interpolation_indices_and_weights(
        grid,
        num_grid_per_side=visual.num_grid_per_side,
        mode=visual.interpolation_mode,
        align_corners=visual.interpolation_align_corners,
        spatial_merge_size=MERGE,
    )
    weight = visual.pos_embed.weight
    cos, sin = visual.rotary_pos_emb(weight, get_vision_position_ids(grid, MERGE))
    ids = torch.tensor([prefix], device=device)
    is_image = (ids == model.config.image_token_id).int()
    positions, delta = model.model.get_rope_index(ids, mm_token_type_ids=is_image, image_grid_thw=grid)
    return Layout(
        interpolation,
        (cos, sin),
        prefix.index(model.config.image_token_id),
        int(is_image.sum()),
        positions[:, 0],
        len(prefix) + int(delta),
    )


def to_patches(frames: Tensor) -> Tensor:
    """uint8 frames [B, height, width, 3] -> normalized patches [B, P, 3*16*16] in the encoder's merge-block order."""
    count, height, width, _ = frames.shape
    pixels = (frames.float() / 255.0 - 0.5) / 0.5
    side = PATCH * MERGE
    blocks = pixels.view(count, height // side, MERGE, PATCH, width // side, MERGE, PATCH, 3)
    return blocks.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(count, -1, 3 * PATCH * PATCH)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-high, low), dim=-1) * sin).to(x.dtype)


def _vision_block(block: torch.nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One encoder block on [B, P, hidden]."""
    count, patches, _ = x.shape
    attn = block.attn
    qkv = attn.qkv(block.norm1(x)).view(count, patches, 3, attn.num_heads, attn.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
    x = x + attn.proj(mixed.transpose(1, 2).reshape(count, patches, -1))
    return x + block.mlp(block.norm2(x))


def _text_layer(layer: torch.nn.Module, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
    """One decoder layer on [B, L, H]; cos and sin are [B, 1, L, head_dim], mask [B, 1, L, L] is True where seen."""
    attn = layer.self_attn
    h = layer.input_layernorm(x)
    shape = (*x.shape[:2], -1, attn.head_dim)
    q = _rotate(attn.q_norm(attn.q_proj(h).view(shape)).transpose(1, 2), cos, sin)
    k = _rotate(attn.k_norm(attn.k_proj(h).view(shape)).transpose(1, 2), cos, sin)
    v = attn.v_proj(h).view(shape).transpose(1, 2)
    k, v = (t.repeat_interleave(attn.num_key_value_groups, dim=1).to(q.dtype) for t in (k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    x = x + attn.o_proj(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))
    return x + layer.mlp(layer.post_attention_layernorm(x))


class PackedForward:
    """The training forward of one model; `compiled` runs its layers through torch.compile."""

    def __init__(self, model: Qwen3VLForConditionalGeneration, compiled: bool = False) -> None:
        self.model = model
        self._vision_block = torch.compile(_vision_block, dynamic=False) if compiled else _vision_block
        self._text_layer = torch.compile(_text_layer, dynamic=False) if compiled else _text_layer

    def encode(self, frames: Tensor, layout: Layout) -> tuple[Tensor, list[Tensor]]:
        """uint8 frames [B, height, width, 3] -> image embeddings [B, T, H] and the deepstack ones, each [B, T, H]."""
        visual = self.model.model.visual
        proj = visual.patch_embed.proj
        # A still image fills both temporal taps with the same patch, so their weights simply add up.
        x = F.linear(to_patches(frames), proj.weight.sum(2).flatten(1), proj.bias)
        indices, weights = layout.interpolation
        x = x + (visual.pos_embed(indices) * weights[:, :, None]).sum(1)
        deepstack = []
        for number, block in enumerate(visual.blocks):
            x = self._vision_block(block, x, *layout.vision_rope)
            if number in visual.deepstack_visual_indexes:
                merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(number)]
                deepstack.append(merger(x.contiguous()).unflatten(0, (len(frames), -1)))
        return visual.merger(x.contiguous()).unflatten(0, (len(frames), -1)), deepstack

    def hidden(
        self, ids: Tensor, group: Tensor, order: Tensor, layout: Layout, image: Tensor, deepstack: list[Tensor]
    ) -> Tensor:
        """Final hidden states [B, L, H] of packed rows; ids, group and order [B, L] as in `PackedBatch`."""
        text = self.model.model.language_model
        start, stop = layout.image_start, layout.image_start + layout.image_tokens
        x = text.embed_tokens(ids)
        x = torch.cat((x[:, :start], image.to(x.dtype), x[:, stop:]), dim=1)
        positions = (order + layout.next_position).expand(3, *ids.shape).clone()
        length = layout.prefix_positions.shape[1]
        positions[:, :, :length] = layout.prefix_positions[:, None]
        cos, sin = (t[:, None] for t in text.rotary_emb(x.float(), positions))
        seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        mask = (seen & ((group[:, None, :] == 0) | (group[:, None, :] == group[:, :, None])))[:, None]
        for number, layer in enumerate(text.layers):
            x = self._text_layer(layer, x, cos, sin, mask)
            if number < len(deepstack):
                x = x + F.pad(deepstack[number], (0, 0, start, ids.shape[1] - stop))
        return text.norm(x)
