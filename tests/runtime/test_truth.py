"""The whole pipeline against the truth: greedy answers equal transformers' token for token on held-out scenes."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from edgellm import LLM, SamplingParams
from edgellm_ros import scenes

SCENES = 100
MAX_TOKENS = 64


def test_greedy_answers_equal_transformers(tiny_engine: Path, tiny_vlm: Path) -> None:
    from transformers import Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    examples = list(scenes.examples("held_out", SCENES))
    frames = [scenes.render([e.scene], (320, 256))[0].numpy() for e in examples]
    prompts = [
        [{"role": "user", "content": [{"type": "image", "image": f}, {"type": "text", "text": e.question}]}]
        for f, e in zip(frames, examples, strict=True)
    ]
    with LLM(tiny_engine, max_queue=SCENES) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=MAX_TOKENS))
        assert llm.tokenizer is not None
        eos = llm.tokenizer.eos_token_ids
    model = Qwen3VLForConditionalGeneration.from_pretrained(tiny_vlm, dtype=torch.float32).eval()
    processor = Qwen2VLImageProcessorPil.from_pretrained(tiny_vlm)
    for frame, example, output in zip(frames, examples, outputs, strict=True):
        inputs = processor(images=[Image.fromarray(frame)], return_tensors="pt")
        # one forward pass over prompt and answer shows what greedy decoding picks after each of its prefixes
        ids = torch.tensor([output.prompt_token_ids + output.outputs[0].token_ids])
        with torch.no_grad():
            logits = model(
                input_ids=ids,
                mm_token_type_ids=(ids == model.config.image_token_id).int(),
                pixel_values=inputs["pixel_values"],
                image_grid_thw=inputs["image_grid_thw"],
            ).logits[0]
        picked = logits[len(output.prompt_token_ids) - 1 :].argmax(-1).tolist()
        assert picked[:-1] == output.outputs[0].token_ids, example.question
        assert picked[-1] in eos, "the answer must end where transformers ends it"
    right = sum(o.text == e.answer for o, e in zip(outputs, examples, strict=True))
    assert right >= 0.9 * SCENES, f"only {right} of {SCENES} answers are right"
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) > SCENES // 4, "the answers hardly differ"
