"""Train the tiny reference model, or a LoRA adapter for it, on synthetic scenes drawn while it trains.

    python -m assets.train_tiny_vlm init  --out DIR                         # tokenizer, configuration, random weights
    python -m assets.train_tiny_vlm base  --model DIR --out DIR --minutes 9
    python -m assets.train_tiny_vlm lora  --model DIR --out DIR/lora/terse --style terse --minutes 2

Run from the repository root. A run lasts `--minutes` and its learning rate falls to zero over that time, so it fits a
machine that is lent by the minute; `base` started from its own output goes on where it ended (give another
`--first-batch`, so that new scenes are drawn). docs/tiny_vlm.md has the measured results.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import Qwen3VLForConditionalGeneration

from assets.tiny_vlm_data import NO_OBJECT, TURN_KINDS, PackedBatch, Packer, batches
from assets.tiny_vlm_model import Layout, PackedForward, make_config, make_layout, save_checkpoint
from assets.tiny_vlm_tokenizer import write_tokenizer
from edgellm_ros.scene_questions import STYLES
from edgellm_ros.scene_render import render_table

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_CHECK_BATCHES = 4


class _Stream(IterableDataset[PackedBatch]):
    """Packed batches from `first` on, dealt out to the worker processes."""

    def __init__(self, packer: Packer, first: int) -> None:
        self.packer, self.first = packer, first

    def __iter__(self) -> Iterator[PackedBatch]:
        worker = get_worker_info()
        number, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        return batches(self.packer, self.first + number, stride)


class Trainer:
    """Model, optimizer and data of one training run."""

    def __init__(self, model: Qwen3VLForConditionalGeneration, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
        self.args, self.model = args, model
        self.device = model.device
        self.forward = PackedForward(model, compiled=args.compile)
        self.layouts: dict[tuple[tuple[int, int], tuple[int, ...]], Layout] = {}
        # A helper that is thrown away: it says which object each image token holds, so that the encoder learns to see
        # long before the answers can teach it.
        self.sight = nn.Linear(model.model.language_model.config.hidden_size, NO_OBJECT + 1).to(self.device)
        self.sight_weights = torch.ones(NO_OBJECT + 1, device=self.device)
        self.sight_weights[NO_OBJECT] = 0.2
        trained = [p for p in model.parameters() if p.requires_grad] + list(self.sight.parameters())
        decayed = [p for p in trained if p.ndim > 1]
        groups = [
            {"params": decayed, "weight_decay": args.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.trained = trained
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=self.device.type == "cuda")
        self.packer = Packer(tokenizer, args.batch, args.style)
        self.check_packer = Packer(tokenizer, args.batch, args.style, split="test")

    def logits(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Logits [K, vocabulary] where an answer token is predicted, and image embeddings [B, T, H]."""
        key = (batch.size, tuple(batch.prefix))
        if key not in self.layouts:
            self.layouts[key] = make_layout(self.model, batch.size, batch.prefix)
        layout = self.layouts[key]
        frames = render_table(batch.scenes, batch.size, self.device)
        ids, group, order = (self._put(a).long() for a in (batch.ids, batch.group, batch.order))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            image, deepstack = self.forward.encode(frames, layout)
            hidden = self.forward.hidden(ids, group, order, layout, image, deepstack)
            chosen = hidden.flatten(0, 1)[self._put(batch.predict_at)]
            return self.model.lm_head(chosen).float(), image.float()

    def _put(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def step(self, batch: PackedBatch, lr_share: float) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns the answer loss and the sight loss (still on the device)."""
        logits, image = self.logits(batch)
        answer_loss = F.cross_entropy(logits, self._put(batch.predict))
        sight = self.sight(image).flatten(0, 1)
        sight_loss = F.cross_entropy(sight, self._put(batch.cells).flatten(), self.sight_weights)
        (answer_loss + self.args.sight * sight_loss).backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * lr_share
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return answer_loss.detach(), sight_loss.detach()

    @torch.no_grad()
    def check(self) -> str:
        """Exact-match rate per kind on scenes that are neither trained on nor held out (teacher-forced, so greedy)."""
        right, total = np.zeros(len(TURN_KINDS)), np.zeros(len(TURN_KINDS))
        for number in range(_CHECK_BATCHES):
            batch = self.check_packer.draw(number, (320, 256))
            wrong = (self.logits(batch)[0].argmax(-1) != self._put(batch.predict)).cpu().numpy()
            failed = np.bincount(batch.question[wrong], minlength=len(batch.kinds)) > 0
            right += np.bincount(batch.kinds[~failed], minlength=len(TURN_KINDS))
            total += np.bincount(batch.kinds, minlength=len(TURN_KINDS))
        parts = [f"{kind} {r / max(t, 1):.3f}" for kind, r, t in zip(TURN_KINDS, right, total, strict=True)]
        return f"exact {right.sum() / total.sum():.4f} of {int(total.sum())} | " + " ".join(parts)

    def run(self) -> None:
        """Train for `--minutes` (or `--steps`), printing losses and exact-match rates."""
        args = self.args
        loader = DataLoader(
            _Stream(self.packer, args.first_batch),
            batch_size=None,
            collate_fn=_as_is,
            num_workers=args.workers,
            prefetch_factor=4 if args.workers else None,
        )
        begin = time.monotonic()
        losses: list[tuple[Tensor, Tensor]] = []
        for step, batch in enumerate(loader):
            elapsed = time.monotonic() - begin
            share = step / args.steps if args.steps else elapsed / (args.minutes * 60)
            if share >= 1:
                break
            losses.append(self.step(batch, min(1.0, (step + 1) / args.warmup) * 0.5 * (1 + math.cos(math.pi * share))))
            if (step + 1) % args.log_every == 0:
                answer_loss, sight_loss = (torch.stack(part).mean().item() for part in zip(*losses, strict=True))
                losses.clear()
                print(f"{elapsed:6.0f} s step {step + 1} loss {answer_loss:.4f} sight {sight_loss:.4f}", flush=True)
            if (step + 1) % args.check_every == 0:
                print(f"{elapsed:6.0f} s step {step + 1} {self.check()}", flush=True)
        print(f"end: next --first-batch {args.first_batch + step + 1000}; {self.check()}", flush=True)


def _as_is(batch: Any) -> Any:
    return batch


def init(args: argparse.Namespace) -> None:
    """Write an untrained checkpoint: tokenizer, configuration, random weights."""
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(args.out)
    torch.manual_seed(0)
    save_checkpoint(Qwen3VLForConditionalGeneration(make_config(tokenizer)), tokenizer, args.out)


def load(args: argparse.Namespace) -> tuple[Qwen3VLForConditionalGeneration, Tokenizer]:
    """The model to start from, in fp32 on the chosen device, and its tokenizer."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32)
    return model.to(args.device).train(), Tokenizer.from_file(str(args.model / "tokenizer.json"))


def base(args: argparse.Namespace) -> None:
    """Train all weights and write the checkpoint (fp16)."""
    model, tokenizer = load(args)
    Trainer(model, tokenizer, args).run()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (args.out / name).write_bytes((args.model / name).read_bytes())
    save_checkpoint(model, tokenizer, args.out)


def lora(args: argparse.Namespace) -> None:
    """Train an adapter for another answer style and write it in PEFT format."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load(args)
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    Trainer(model, tokenizer, args).run()
    adapted.half().save_pretrained(args.out, save_embedding_layers=False)
    (args.out / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    path = args.out / "adapter_config.json"
    written = json.loads(path.read_text())
    written |= {"base_model_name_or_path": "tiny_vlm", "target_modules": LORA_TARGETS}
    path.write_text(json.dumps(written, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("init", "base", "lora"))
    parser.add_argument("--model", type=Path, help="checkpoint to start from")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--style", choices=STYLES, default="plain")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps instead of --minutes")
    parser.add_argument("--batch", type=int, default=256, help="scenes per step; each carries about nine turns")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--sight", type=float, default=0.3, help="weight of the auxiliary sight loss")
    parser.add_argument("--warmup", type=int, default=300, help="steps")
    parser.add_argument("--first-batch", type=int, default=0, help="number of the first batch to draw")
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--check-every", type=int, default=500)
    parser.add_argument("--compile", action="store_true", help="run the layers through torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    {"init": init, "base": base, "lora": lora}[args.job](args)


if __name__ == "__main__":
    main()
