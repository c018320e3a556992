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

    rng = scenes.scene_rng("test", 1)
    sampled = [scenes.sample_scene(rng) for _ in range(SCENES)]
    frames = [scenes.render([scene], (320, 256))[0].numpy() for scene in sampled]
    questions = [scenes.ask(scene, scenes.KINDS[i % len(scenes.KINDS)], rng)[0] for i, scene in enumerate(sampled)]
    prompts = [
        [{"role": "user", "content": [{"type": "image", "image": f}, {"type": "text", "text": q}]}]
        for f, q in zip(frames, questions, strict=True)
    ]
    with LLM(tiny_engine, max_queue=SCENES) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=MAX_TOKENS))
        eos = sorted(llm.tokenizer.eos_token_ids) if llm.tokenizer else []
    model = Qwen3VLForConditionalGeneration.from_pretrained(tiny_vlm, dtype=torch.float32).eval()
    processor = Qwen2VLImageProcessorPil.from_pretrained(tiny_vlm)
    for frame, question, output in zip(frames, questions, outputs, strict=True):
        inputs = processor(images=[Image.fromarray(frame)], return_tensors="pt")
        ids = torch.tensor([output.prompt_token_ids])
        with torch.no_grad():
            reference = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == model.config.image_token_id).int(),
                pixel_values=inputs["pixel_values"],
                image_grid_thw=inputs["image_grid_thw"],
                max_new_tokens=MAX_TOKENS,
                do_sample=False,
            )[0, ids.shape[1] :].tolist()
        if reference[-1] in eos:
            reference.pop()
        assert output.outputs[0].token_ids == reference, question
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) > SCENES // 4, "the answers hardly differ"
