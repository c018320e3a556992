"""LoRA adapters on the tiny engine: equal to PEFT's merged weights, mixed in one batch, switched, unloaded, refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from edgellm import LLM, EdgeLLMError, SamplingParams
from edgellm.engine_dir import read_manifest
from edgellm.engines.base import Engine, TensorSpec, backend
from edgellm.errors import LoraError, RequestError
from edgellm.lora import read_adapter, write_adapter
from edgellm.runtime.kv_cache import KVCache
from edgellm.runtime.lora import LoraAdapter, LoraManager
from edgellm.runtime.rope import RopeTable
from edgellm_ros import scenes

LIMIT = 1e-4
CAPACITY = 48
ADAPTERS = ("terse", "pirate")
HELD_OUT = 40
IDS = [5, 700, 33, 1200, 64, 9, 410, 77, 1031]
LONG = SamplingParams(max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(lora_engine: Path, tiny_vlm: Path) -> Iterator[LLM]:
    with LLM(lora_engine, num_threads=2) as llm:
        for name in ADAPTERS:
            llm.load_lora(name, tiny_vlm / "lora" / name)
        yield llm


@pytest.fixture(scope="module")
def decoder(lora_engine: Path) -> Engine:
    return backend("onnxruntime").load_decoder(lora_engine, 1)


@pytest.fixture(scope="module")
def merged(tiny_vlm: Path) -> Callable[[Path | None], Any]:
    """transformers' model in fp32 with an adapter merged into its weights by PEFT, or without one."""

    def load(adapter: Path | None) -> Any:
        from peft import PeftModel
        from transformers import Qwen3VLForConditionalGeneration

        model = Qwen3VLForConditionalGeneration.from_pretrained(tiny_vlm, dtype=torch.float32)
        return model.eval() if adapter is None else PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()

    return load


RANDOM = {
    "r1": {"r": 1, "lora_alpha": 3},
    "r5": {"r": 5, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]},
    "r16_rslora": {"r": 16, "lora_alpha": 8, "use_rslora": True},
    "r32": {"r": 32, "lora_alpha": 16, "bias": "lora_only"},
    "patterns": {
        "r": 8,
        "lora_alpha": 16,
        "rank_pattern": {"layers.1.self_attn.q_proj": 3, r"layers\.[24]\.mlp\.up_proj": 12},
        "alpha_pattern": {"v_proj": 40, "layers.2.mlp.up_proj": 1},
        "use_rslora": True,
    },
}


@pytest.fixture(scope="module")
def random_adapters(tiny_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of several ranks and features with random A and B, as PEFT saves them."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3VLForConditionalGeneration

    root, everything = tmp_path_factory.mktemp("adapters"), "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    for seed, (name, options) in enumerate(RANDOM.items()):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration.from_pretrained(tiny_vlm, dtype=torch.float32)
        config = LoraConfig(**{"target_modules": everything.split(), "init_lora_weights": False, **options})
        model = get_peft_model(model, config)
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.04)
        model.save_pretrained(root / name)
    return {name: root / name for name in RANDOM}


def logits_of_prompt(engine: Engine, directory: Path, manager: LoraManager, adapter: LoraAdapter | None) -> Any:
    """The engine's logits [S, V] after every prefix of IDS: all but the last two by prefill, those by decode."""
    config = read_manifest(directory).decoder
    embedding = load_file(directory / "embedding.safetensors")["weight"].float()
    cache = KVCache(engine.inputs, 1, CAPACITY, engine.device)
    rope = RopeTable(config.rope, ("rope_rotary_cos", "rope_rotary_sin"), 1, CAPACITY, engine.device)
    rope.set_slot(0, None, 0)
    result, start = [], 0
    for new in (len(IDS) - 2, 1, 1):
        embeds = embedding[torch.tensor(IDS[start : start + new])][None]
        logits = torch.full((1, new, config.vocab_size), torch.nan)
        inputs = {
            "inputs_embeds": embeds,
            "context_lengths": torch.tensor([start + new], dtype=torch.int32),
            "kvcache_start_index": torch.tensor([start], dtype=torch.int32),
            "last_token_ids": torch.arange(new)[None],
            **{f"deepstack_embeds_{i}": torch.zeros_like(embeds) for i in range(config.num_deepstack)},
            **rope.inputs(0, 1),
            **cache.inputs(0, 1),
            **manager.inputs([adapter]),
        }
        engine.run("prefill" if new > 1 else "generation", inputs, {"logits": logits, **cache.outputs(0, 1)})
        result.append(logits[0])
        start += new
    return torch.cat(result)


@pytest.mark.parametrize("name", [*ADAPTERS, *RANDOM])
def test_logits_equal_merged_weights(
    name: str,
    decoder: Engine,
    lora_engine: Path,
    tiny_vlm: Path,
    random_adapters: dict[str, Path],
    merged: Callable[[Path | None], Any],
) -> None:
    path = random_adapters.get(name, tiny_vlm / "lora" / name)
    manager = LoraManager(decoder.inputs, 32, decoder.device)
    adapter = manager.load(name, path)
    with torch.no_grad():
        expected = merged(path)(input_ids=torch.tensor([IDS])).logits[0]
        without = merged(None)(input_ids=torch.tensor([IDS])).logits[0]
    ours = logits_of_prompt(decoder, lora_engine, manager, adapter)
    assert (ours - expected).abs().max() <= LIMIT
    assert (expected - without).abs().max() > 100 * LIMIT, "the adapter does nothing"
    assert (logits_of_prompt(decoder, lora_engine, manager, None) - without).abs().max() <= LIMIT


def test_inactive_is_exactly_an_engine_without_lora(decoder: Engine, lora_engine: Path, tiny_engine: Path) -> None:
    plain = backend("onnxruntime").load_decoder(tiny_engine, 1)
    no_lora = LoraManager(plain.inputs, 0, plain.device)
    expected = logits_of_prompt(plain, tiny_engine, no_lora, None)
    manager = LoraManager(decoder.inputs, 32, decoder.device)
    assert torch.equal(logits_of_prompt(decoder, lora_engine, manager, None), expected)


@pytest.mark.parametrize("name", ADAPTERS)
def test_answers_in_the_adapters_style(
    name: str, llm: LLM, tiny_vlm: Path, merged: Callable[[Path | None], Any]
) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    examples = list(scenes.examples("held_out", HELD_OUT, name))
    frames = [scenes.render([e.scene], (320, 256))[0].numpy() for e in examples]
    prompts = [ask(e.question, f) for e, f in zip(examples, frames, strict=True)]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=64), lora=name)
    right = sum(o.text == e.answer for o, e in zip(outputs, examples, strict=True))
    assert right >= 0.9 * HELD_OUT, f"only {right} of {HELD_OUT} answers are right"
    plain = llm.generate(prompts[:10], SamplingParams(max_tokens=64))
    assert [o.text for o in plain] != [o.text for o in outputs[:10]]
    model, processor = merged(tiny_vlm / "lora" / name), Qwen2VLImageProcessorPil.from_pretrained(tiny_vlm)
    for frame, output in zip(frames[:8], outputs, strict=False):
        # one forward pass over prompt and answer shows what greedy decoding picks after each of its prefixes
        ids = torch.tensor([output.prompt_token_ids + output.outputs[0].token_ids])
        with torch.no_grad():
            logits = model(
                input_ids=ids,
                mm_token_type_ids=(ids == model.config.image_token_id).int(),
                **processor(images=[Image.fromarray(frame)], return_tensors="pt"),
            ).logits[0]
        picked = logits[len(output.prompt_token_ids) - 1 : -1].argmax(-1).tolist()
        assert picked == output.outputs[0].token_ids


def ask(question: str, *images: Any) -> list[dict[str, Any]]:
    content = [*({"type": "image", "image": i} for i in images), {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def questions() -> list[Any]:
    """Questions about pictures, one without, and token ids."""
    examples = [e for e in scenes.examples("held_out", 30) if e.kind in ("what", "steer")][:3]
    frames = [scenes.render([e.scene], (320, 256))[0].numpy() for e in examples]
    looks = [ask(e.question, f) for e, f in zip(examples, frames, strict=True)]
    return [*looks, ask("What is there?"), [5, 6, 7]]


QUESTIONS = questions()


def token_ids(outputs: Sequence[Any]) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in outputs]


def test_different_adapters_in_one_batch_answer_as_alone(llm: LLM) -> None:
    prompts = [prompt for prompt in QUESTIONS for _ in range(3)]
    loras = [*("terse", None, "pirate")] * len(QUESTIONS)
    alone = [llm.generate(p, LONG, lora=a).outputs[0].token_ids for p, a in zip(prompts, loras, strict=True)]
    assert token_ids(llm.generate(prompts, LONG, lora=loras)) == alone
    for i in range(0, 9, 3):
        assert len({tuple(ids) for ids in alone[i : i + 3]}) == 3, "the adapters must answer differently"


def test_requests_wait_until_their_rank_fits(
    lora_engine: Path, random_adapters: dict[str, Path], tiny_vlm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["r32", "r16_rslora", "terse", "r16_rslora", "r5", "r32", "terse", "r1"]
    with LLM(lora_engine, num_threads=2) as llm:
        for name in dict.fromkeys(names):
            llm.load_lora(name, random_adapters.get(name, tiny_vlm / "lora" / name))
        alone = [llm.generate(QUESTIONS[0], LONG, lora=name).outputs[0].token_ids for name in names]
        inputs, seen = llm._runner.lora.inputs, set()

        def watched(rows: Any) -> dict[str, torch.Tensor]:
            result = inputs(rows)
            seen.add(tuple(result["lora_rank_mask"].shape))
            return result

        monkeypatch.setattr(llm._runner.lora, "inputs", watched)
        assert token_ids(llm.generate([QUESTIONS[0]] * len(names), LONG, lora=names)) == alone
    assert max(ranks for _, ranks in seen) <= 32
    assert any(rows > 1 and ranks > 16 for rows, ranks in seen), "nothing was batched"


def test_an_unloaded_adapter_stays_with_its_requests(
    lora_engine: Path, tiny_vlm: Path, random_adapters: dict[str, Path]
) -> None:
    long = SamplingParams(max_tokens=300, ignore_eos=True)
    with LLM(lora_engine, num_threads=2) as llm:
        terse = llm.load_lora("style", tiny_vlm / "lora" / "terse")
        expected = llm.generate(QUESTIONS[0], long, lora="style").outputs[0].token_ids
        handle = llm.generate_async(QUESTIONS[0], long, lora="style")
        next(iter(handle))
        llm.unload_lora("style")
        assert llm.list_loras() == []
        with pytest.raises(RequestError, match="there is no LoRA adapter 'style'; none is loaded"):
            llm.generate_async(QUESTIONS[0], lora="style")
        other = llm.load_lora("style", random_adapters["r5"])
        assert other.digest != terse.digest
        second = llm.generate_async(QUESTIONS[0], long, lora="style")
        assert handle.result().outputs[0].token_ids == expected
        assert second.result().outputs[0].token_ids != expected


def test_default_adapter(llm: LLM) -> None:
    base, terse = (llm.generate(QUESTIONS[0], LONG, lora=a).outputs[0].token_ids for a in ("", "terse"))
    assert base != terse
    llm.set_default_lora("terse")
    try:
        assert llm.generate(QUESTIONS[0], LONG).outputs[0].token_ids == terse
        assert llm.generate(QUESTIONS[0], LONG, lora="").outputs[0].token_ids == base
        with pytest.raises(LoraError, match="adapter 'terse' is the default"):
            llm.unload_lora("terse")
    finally:
        llm.set_default_lora(None)
    assert llm.generate(QUESTIONS[0], LONG).outputs[0].token_ids == base
    assert [a.name for a in llm.list_loras()] == [*ADAPTERS]
    with pytest.raises(LoraError, match="there is no adapter 'gone'; loaded are pirate, terse"):
        llm.set_default_lora("gone")
    with pytest.raises(LoraError, match="there is no adapter 'gone' to unload"):
        llm.unload_lora("gone")
    with pytest.raises(RequestError, match="there is no LoRA adapter 'gone'; loaded are pirate, terse"):
        llm.generate(QUESTIONS, LONG, lora=["terse", "pirate", "", None, "gone"])
    with pytest.raises(RequestError, match="5 prompts came with 1 adapters"):
        llm.generate(QUESTIONS, LONG, lora=["terse"])


def test_one_file_form(random_adapters: dict[str, Path], tmp_path: Path) -> None:
    for path in random_adapters.values():
        adapter = read_adapter(path)
        write_adapter(adapter, tmp_path / "adapter.safetensors")
        again = read_adapter(tmp_path / "adapter.safetensors")
        assert (again.digest, again.rank, again.base_model) == (adapter.digest, adapter.rank, adapter.base_model)
        assert adapter.matrices.keys() == again.matrices.keys()
        for module, pair in adapter.matrices.items():
            assert all(torch.equal(x, y) for x, y in zip(pair, again.matrices[module], strict=True))


def copied(tiny_vlm: Path, target: Path, **config: Any) -> Path:
    """A copy of an adapter with some keys of its configuration replaced."""
    shutil.copytree(tiny_vlm / "lora" / "terse", target)
    file = target / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return target


def edited(tiny_vlm: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of an adapter whose tensors `edit` has changed in place."""
    copied(tiny_vlm, target)
    tensors = load_file(target / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, target / "adapter_model.safetensors")
    return target


KEY = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "uses use_dora, which is not supported: DoRA rescales the base weights"),
        ({"peft_type": "LOHA"}, "is of type LOHA, not LORA; merge it"),
        ({"modules_to_save": ["lm_head"]}, "uses modules_to_save, .*replaces whole modules"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the base weights"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "uses layer_replication"),
        ({"use_hyper_lora": True}, "uses use_hyper_lora, which is not supported: this edgellm does not know"),
        ({"lora_alpha": "big"}, "alpha of .* is 'big'; it must be a number"),
    ],
)
def test_unsupported_features(tiny_vlm: Path, tmp_path: Path, llm: LLM, config: Any, message: str) -> None:
    refused(llm, copied(tiny_vlm, tmp_path / "adapter", **config), message)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{KEY}.lora_B.weight"), "q_proj has lora_A or lora_B only; the file is incomplete"),
        (lambda t: t.clear(), "holds no LoRA matrices"),
        (lambda t: t.update({f"{KEY}.lora_magnitude_vector": torch.ones(3)}), "which is no LoRA matrix"),
        (lambda t: t[f"{KEY}.lora_A.weight"].fill_(torch.nan), "not finite"),
        (lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(4, 256)}), r"lora_A \[4, 256\] and lora_B \[256, 8\]"),
        (
            lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(8, 300)}),
            r"model\.layers\.0\.self_attn\.q_proj is 300 -> 256, this model's is 256 -> 256; .*made for tiny_vlm",
        ),
        (
            lambda t: t.update({k.replace("layers.5", "layers.6"): t[k].clone() for k in [*t] if "layers.5" in k}),
            r"has weights for model\.layers\.6\.[a-z_.]+, which this model does not have; .*another base model",
        ),
        (
            lambda t: t.update({k.replace("language_model.layers", "visual.blocks"): t[k].clone() for k in [*t]}),
            r"trains model\.visual\.blocks\.0\.[a-z_.]+; only linear layers of the decoder's layers",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    tiny_vlm: Path, tmp_path: Path, llm: LLM, edit: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    refused(llm, edited(tiny_vlm, tmp_path / "adapter", edit), message)


def test_files_that_are_missing_or_damaged(tiny_vlm: Path, tmp_path: Path, llm: LLM) -> None:
    refused(llm, tmp_path / "gone", "gone does not exist; pass a directory")
    refused(llm, tmp_path, r"adapter_config\.json does not exist")
    path = copied(tiny_vlm, tmp_path / "adapter")
    weights = path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(llm, path, "is truncated or damaged")
    weights.unlink()
    refused(llm, path, r"adapter_model\.safetensors does not exist; the adapter is incomplete")
    (path / "adapter_model.bin").touch()
    refused(llm, path, r"holds adapter_model\.bin")
    (path / "adapter_config.json").write_text("{")
    refused(llm, path, "cannot be read as JSON")
    refused(llm, tiny_vlm / "model.safetensors", "is no adapter file of edgellm")


def test_rank_and_names(
    tiny_vlm: Path, tiny_engine: Path, lora_engine: Path, llm: LLM, random_adapters: dict[str, Path]
) -> None:
    terse = tiny_vlm / "lora" / "terse"
    manager = LoraManager(llm._runner._engine.inputs, 16, torch.device("cpu"))
    with pytest.raises(
        LoraError, match="'r32' has rank 32, this engine takes up to 16; make it again .*--max-lora-rank 32"
    ):
        manager.load("r32", random_adapters["r32"])
    with pytest.raises(LoraError, match="adapter 'terse' is already loaded; unload it first"):
        llm.load_lora("terse", terse)
    with pytest.raises(LoraError, match="name must not be empty"):
        llm.load_lora("", terse)
    with LLM(tiny_engine) as plain:
        refused(plain, terse, "takes no LoRA adapters; make it again with --max-lora-rank R")


def refused(llm: LLM, path: Path, message: str) -> None:
    before = [a.name for a in llm.list_loras()]
    with pytest.raises(EdgeLLMError, match=message) as caught:
        llm.load_lora("bad", path)
    assert "\n" not in str(caught.value)
    assert [a.name for a in llm.list_loras()] == before


def test_sets_of_adapters(tiny_vlm: Path, random_adapters: dict[str, Path], llm: LLM) -> None:
    """What a batch gets: concatenated once per set whatever the rows' order, forgotten when an adapter goes."""
    specs: dict[str, TensorSpec] = dict(llm._runner._engine.inputs)
    manager = LoraManager(specs, 32, torch.device("cpu"))
    assert manager.inputs([None, None])["lora_rank_mask"].shape == (2, 0)
    a, b = manager.load("a", random_adapters["r5"]), manager.load("b", tiny_vlm / "lora" / "terse")
    name = "model.layers.3.mlp.down_proj.lora_A.weight"
    assert manager.inputs([b])[name] is b.tensors[name], "one adapter is not copied"
    both = manager.inputs([b, None, a, b])
    assert torch.equal(both[name], torch.cat((a.tensors[name], b.tensors[name]), 1))
    mask = both["lora_rank_mask"]
    assert mask.tolist() == [[0.0] * 5 + [1.0] * 8, [0.0] * 13, [1.0] * 5 + [0.0] * 8, [0.0] * 5 + [1.0] * 8]
    assert manager.inputs([b, None, a, b]) is both
    assert manager.inputs([a, b])[name] is both[name]
    assert manager.fits([a, b, b, None], a)
    assert not manager.fits([a, b], manager.load("c", random_adapters["r32"]))
    manager.unload("b")
    assert manager.inputs([a, b])[name] is both[name], "the rows that run keep it"
    assert manager.inputs([a])[name] is a.tensors[name]
    assert manager.inputs([a, b])[name] is not both[name], "it was forgotten"


def test_prompt_cache_keeps_adapters_apart(lora_engine: Path, tiny_vlm: Path, random_adapters: dict[str, Path]) -> None:
    prompt = QUESTIONS[0]
    with LLM(lora_engine, num_threads=2) as llm:
        llm.load_lora("style", tiny_vlm / "lora" / "terse")
        first = llm.generate(prompt, LONG, lora="style")
        assert first.usage.reused_tokens == 0
        again = llm.generate(prompt, LONG, lora="style")
        assert again.usage.reused_tokens > 0
        assert llm.generate(prompt, LONG).usage.reused_tokens == 0
        llm.unload_lora("style")
        llm.load_lora("style", random_adapters["r5"])
        assert llm.generate(prompt, LONG, lora="style").usage.reused_tokens == 0, "the name means other weights now"
        assert token_ids([first]) == token_ids([again])


def test_an_urgent_request_displaces_the_adapter_in_its_way(
    lora_engine: Path, random_adapters: dict[str, Path]
) -> None:
    long = SamplingParams(max_tokens=400, ignore_eos=True)
    with LLM(lora_engine, num_threads=2) as llm:
        for name in ("r32", "r5"):
            llm.load_lora(name, random_adapters[name])
        alone = llm.generate([5, 6, 7], long, lora="r32").outputs[0].token_ids
        llm.clear_prompt_cache()
        slow = llm.generate_async([5, 6, 7], long, lora="r32")
        next(iter(slow))
        urgent = llm.generate_async([8, 9], SamplingParams(max_tokens=5, ignore_eos=True), lora="r5", priority=1)
        urgent.result(30)
        assert not slow.done(), "the urgent request has waited for the slow one"
        assert slow.result(60).outputs[0].token_ids == alone
