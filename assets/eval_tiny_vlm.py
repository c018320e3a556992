"""Measure the tiny reference model on held-out scenes with plain `transformers`, fp32, greedy, on the CPU.

    python -m assets.eval_tiny_vlm                                   # 1,000 held-out scene-question pairs
    python -m assets.eval_tiny_vlm --adapter terse                   # the same scenes, asked in the adapter's style
    python -m assets.eval_tiny_vlm --size 384x256 --jpeg 80 --count 200
    python -m assets.eval_tiny_vlm --split live --count 8 --sheet docs/tiny_vlm.png  # a picture of them

Run from the repository root. Nothing here uses edgellm: the model, tokenizer and image processor are those of
`transformers`, the adapters are loaded by `peft`, and the answer must equal the right one character for character.
"""

from __future__ import annotations

import argparse
import io
import math
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageOps
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from edgellm_ros.scene_questions import KINDS, STYLES, Example, examples
from edgellm_ros.scene_render import render
from edgellm_ros.scene_world import SPLITS

MODEL = Path(__file__).parent / "tiny_vlm"


class Asker:
    """The checkpoint as plain `transformers` runs it, with one of its adapters where asked for."""

    def __init__(self, folder: Path = MODEL, adapter: str | None = None) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        # AutoImageProcessor wants torchvision; the PIL processor does without.
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.model: Any = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        if adapter:
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, folder / "lora" / adapter).eval()
        self.image_id = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def prompt(self, image_tokens: int, question: str) -> str:
        """The chat prompt of one image and one question."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return text.replace("<|image_pad|>", "<|image_pad|>" * image_tokens)

    @torch.inference_mode()
    def ask(self, images: list[Image.Image], questions: list[str], max_new_tokens: int = 96) -> list[str]:
        """Greedy answers to one question about each of some equally sized images."""
        pixels = self.processor(images=images, return_tensors="pt")
        tokens = int(pixels["image_grid_thw"][0].prod()) // 4
        text = [self.prompt(tokens, question) for question in questions]
        inputs = self.tokenizer(text, return_tensors="pt", padding=True, padding_side="left")
        is_image = (inputs["input_ids"] == self.image_id).int()
        output = self.model.generate(
            **inputs, **pixels, mm_token_type_ids=is_image, max_new_tokens=max_new_tokens, do_sample=False
        )
        answers: list[str] = self.tokenizer.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return answers


def picture(example: Example, size: tuple[int, int], jpeg: int = 0) -> Image.Image:
    """The example's camera frame, through JPEG compression of the given quality if not 0."""
    frame = Image.fromarray(render([example.scene], size)[0].numpy())
    if not jpeg:
        return frame
    packed = io.BytesIO()
    frame.save(packed, "JPEG", quality=jpeg)
    return Image.open(packed).convert("RGB")


def results(asker: Asker, data: list[Example], size: tuple[int, int], jpeg: int, batch: int) -> Iterator[str]:
    """The model's answers to `data`, in order."""
    for start in range(0, len(data), batch):
        part = data[start : start + batch]
        yield from asker.ask([picture(e, size, jpeg) for e in part], [e.question for e in part])


def write_sheet(path: Path, data: list[Example], replies: list[str]) -> None:
    """A contact sheet: each frame with its question, the model's answer and, where they differ, the right one."""
    columns, width, height, caption, chars = 4, 246, 198, 66, 42
    sheet = Image.new("RGB", (columns * width, math.ceil(len(data) / columns) * (height + caption)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (example, reply) in enumerate(zip(data, replies, strict=True)):
        left, top = number % columns * width, number // columns * (height + caption)
        # Five bits per colour: sensor noise would make the file several times larger.
        frame = ImageOps.posterize(picture(example, (320, 256)).resize((width - 6, height - 6)), 5)
        sheet.paste(frame, (left + 3, top + 3))
        said = reply if reply == example.answer else f"{reply} (WRONG: {example.answer})"
        lines = textwrap.wrap(f"Q: {example.question}", chars) + textwrap.wrap(f"A: {said}", chars)
        draw.multiline_text((left + 5, top + height), "\n".join(lines), fill="black", font_size=11, spacing=2)
    sheet.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--adapter", choices=STYLES[1:], help="measure this adapter, in its answer style")
    parser.add_argument("--split", choices=SPLITS, default="held_out")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--size", default="320x256", help="frame size, WIDTHxHEIGHT in pixels")
    parser.add_argument("--jpeg", type=int, default=0, help="compress the frames with this JPEG quality first")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch likes")
    parser.add_argument("--sheet", type=Path, help="also draw the scenes, questions and answers into this PNG file")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    width, height = map(int, args.size.split("x"))
    data = list(examples(args.split, args.count, args.adapter or "plain", width / height))
    right, total = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    asker = Asker(args.model, args.adapter)
    replies = []
    for example, reply in zip(data, results(asker, data, (width, height), args.jpeg, args.batch), strict=True):
        replies.append(reply)
        total[example.kind] += 1
        right[example.kind] += reply == example.answer
        if reply != example.answer:
            print(f"wrong: {example.question!r} -> {reply!r}, right is {example.answer!r}", flush=True)
    for kind in KINDS:
        if total[kind]:
            print(f"{kind:12} {right[kind]:4} / {total[kind]:4} = {100 * right[kind] / total[kind]:.1f} %")
    print(
        f"{'all':12} {sum(right.values()):4} / {sum(total.values()):4} = {100 * sum(right.values()) / len(data):.1f} %"
    )
    if args.sheet:
        write_sheet(args.sheet, data, replies)


if __name__ == "__main__":
    main()
