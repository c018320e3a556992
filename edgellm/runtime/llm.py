"""`LLM`: the runtime's front door. Prompts come in as text, chat messages or token ids; answers stream out."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np

from edgellm import progress
from edgellm.config import KvCacheConfig
from edgellm.engine_dir import EngineConfig, read_manifest, verify
from edgellm.errors import RequestError
from edgellm.runtime import prompt_cache_file
from edgellm.runtime.chat_template import ChatTemplate, collect_images
from edgellm.runtime.detokenizer import Detokenizer
from edgellm.runtime.engine_loop import EngineLoop
from edgellm.runtime.lora import LoraAdapter
from edgellm.runtime.model_runner import ModelRunner
from edgellm.runtime.prompt_cache import Entry, PromptCache, common_prefix, prompt_key
from edgellm.runtime.request import Increment, Request, RequestHandle, RequestOutput
from edgellm.runtime.sampling import SamplingParams
from edgellm.runtime.scheduler import Scheduler
from edgellm.runtime.tokenizer import Tokenizer
from edgellm.vision.base import PreparedImage, VisualRunner, load_visual_runner

Prompt: TypeAlias = "str | Sequence[int] | Sequence[Mapping[str, Any]]"
"""Text (used as it is, without a chat template), token ids, or chat messages, which may hold images."""


@dataclass(frozen=True)
class SystemPromptInfo:
    """A pinned system prompt: its tokens and the memory of its KV."""

    name: str
    tokens: int
    nbytes: int
    already_cached: bool


class LLM:
    """A loaded engine directory. Safe to use from several threads; requests share the batch of one engine thread.

    `num_threads` bounds the CPU threads of a step (None: every core this process may use); `max_queue` the requests
    that may wait; `prefill_chunk` the prompt tokens that are prefilled between two decode steps. With
    `skip_tokenizer_init` prompts are token ids and answers carry no text.
    Raises EngineDirError for a directory that is missing, changed or of another version.
    """

    def __init__(
        self,
        engine_dir: str | Path,
        *,
        tokenizer: Any = None,
        skip_tokenizer_init: bool = False,
        num_threads: int | None = None,
        max_queue: int = 64,
        kv_cache_config: KvCacheConfig | None = None,
        prefill_chunk: int = 256,
    ) -> None:
        directory = self._directory = Path(engine_dir).resolve()
        self.config: EngineConfig = read_manifest(directory)
        verify(directory, self.config)
        self.tokenizer: Tokenizer | None = None
        self._chat_template: ChatTemplate | None = None
        if not skip_tokenizer_init:
            self.tokenizer = Tokenizer.from_dir(directory) if tokenizer is None else Tokenizer.wrap(tokenizer)
            if (directory / "chat_template.jinja").exists() or (directory / "tokenizer_config.json").exists():
                self._chat_template = ChatTemplate.from_dir(directory, self.tokenizer.special_tokens)
        self._visual_runner: VisualRunner | None = None
        if self.config.vision is not None:
            self._visual_runner = load_visual_runner(self.config.model_type, self.config.vision)
        with progress.steps(2, f"loading {directory.name}") as steps:
            steps.start("reading the engine")
            runner = ModelRunner(directory, self.config, self._visual_runner, num_threads)
            steps.start("warming up")
            runner.warm_up()
        self._runner = runner
        self._scheduler = Scheduler(self.config.limits.max_batch_size, max_queue, runner.lora.fits)
        eos = self.tokenizer.eos_token_ids if self.tokenizer is not None else frozenset[int]()
        self._counter = itertools.count()
        self._prompt_cache = PromptCache((kv_cache_config or KvCacheConfig()).prompt_cache_bytes)
        self._loop = EngineLoop(self._scheduler, runner, self._prompt_cache, eos, prefill_chunk)
        self._thread = threading.Thread(target=self._loop.run, name="edgellm-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora: str | Sequence[str | None] | None = None,
    ) -> Any:
        """Answer one prompt (a RequestOutput), or a list of prompts together (a list of them, in order); waits.

        `lora` is as in `generate_async`, one for all prompts or one for each.
        Raises RequestError for a prompt that cannot be accepted; then none of the list has been started.
        """
        if _is_one_prompt(prompts):
            if isinstance(sampling_params, Sequence):
                raise RequestError(f"one prompt came with {len(sampling_params)} sampling_params; give one")
            if not (lora is None or isinstance(lora, str)):
                raise RequestError(f"one prompt came with {len(lora)} adapters in lora; give one name")
            return self.generate_async(prompts, sampling_params, lora=lora).result()
        params = list(sampling_params) if isinstance(sampling_params, Sequence) else [sampling_params] * len(prompts)
        if len(params) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts came with {len(params)} sampling_params; give one or as many")
        loras = [lora] * len(prompts) if lora is None or isinstance(lora, str) else list(lora)
        if len(loras) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts came with {len(loras)} adapters in lora; give one or as many")
        prepared = [self._prepare(p, s, lora=a) for p, s, a in zip(prompts, params, loras, strict=True)]
        return self._run_all(prepared)

    def generate_async(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        on_increment: Callable[[Increment], None] | None = None,
        request_id: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        client: str = "",
        lora: str | None = None,
    ) -> RequestHandle:
        """Start answering `prompt` and return at once. Tokenizing and image preprocessing happen in this thread.

        `on_increment` is called on the engine's thread right after each token; it must be short. A request of higher
        `priority` goes first and displaces one of lower priority, which goes on later; among equals the `client` that
        has been served least goes first. After `deadline_s` seconds the request ends with what it has ("deadline").
        `lora` names a loaded adapter; None is the default adapter, "" the base model without one.
        Raises RequestError for a prompt or image that cannot be accepted, QueueFullError when too many are waiting.
        """
        request = self._prepare(prompt, sampling_params, on_increment, request_id, lora)
        request.priority, request.client = _checked_priority(priority), client
        if deadline_s is not None:
            request.deadline_at = request.submitted_at + _checked_deadline(deadline_s)
        self._scheduler.submit(request)
        return request.handle

    def cache_system_prompt(self, name: str, text: str, *, lora: str | None = None) -> SystemPromptInfo:
        """Prefill the system prompt `text` now and keep its KV, pinned under `name`: conversations that begin with it
        start sooner, if they use the same adapter (`lora` as in `generate_async`). Waits until it is done; at once if
        that name already holds that text.

        Raises RequestError when it does not fit into the prompt cache or the model's input.
        """
        ids = self._system_prompt_ids(text)
        request = self._prepare(ids, SamplingParams(max_tokens=1), lora=lora)
        for info, entry in self._pinned():
            if info.name == name and entry.adapter == request.adapter and np.array_equal(entry.key, ids):
                return dataclasses.replace(info, already_cached=True)
        request.pin_as = name
        self._scheduler.submit(request)
        request.handle.result()
        return next(info for info in self.system_prompts() if info.name == name)

    def system_prompts(self) -> list[SystemPromptInfo]:
        """The pinned system prompts."""
        return [info for info, _ in self._pinned()]

    def drop_system_prompt(self, name: str) -> None:
        """Forget a pinned system prompt; raises RequestError when there is none of that name."""
        if not self._loop.call(lambda: self._prompt_cache.drop(name)).result():
            known = ", ".join(sorted(i.name for i in self.system_prompts())) or "none"
            raise RequestError(f"no system prompt {name!r} is cached; cached are: {known}")

    def clear_prompt_cache(self) -> None:
        """Forget earlier turns; pinned system prompts stay."""
        self._loop.call(self._prompt_cache.clear).result()

    def save_prompt_cache(self, path: str | Path | None = None) -> Path:
        """Write the prompt cache to a file, by default `NAME.prompt_cache.safetensors` beside the engine."""
        target = Path(path) if path is not None else self._default_prompt_cache_file()
        entries = self._loop.call(lambda: self._prompt_cache.entries).result()
        prompt_cache_file.save(target, entries, self.config)
        return target

    def load_prompt_cache(self, path: str | Path | None = None) -> int:
        """Take entries from a file that `save_prompt_cache` wrote, as far as they fit; returns how many.

        Raises EngineDirError for a file that is missing, damaged or of another engine.
        """
        source = Path(path) if path is not None else self._default_prompt_cache_file()
        entries = prompt_cache_file.load(source, self.config, self._runner.device)
        return self._loop.call(lambda: sum(self._prompt_cache.insert(e) for e in entries)).result()

    def _default_prompt_cache_file(self) -> Path:
        return self._directory.with_name(f"{self._directory.name}.prompt_cache.safetensors")

    def _pinned(self) -> list[tuple[SystemPromptInfo, Entry]]:
        entries = self._loop.call(lambda: [e for e in self._prompt_cache.entries if e.name is not None]).result()
        return [(SystemPromptInfo(str(e.name), len(e.key), e.slot.nbytes, False), e) for e in entries]

    def _system_prompt_ids(self, text: str) -> list[int]:
        """What every conversation with this system prompt begins with: the common tokens of two of them."""
        conversations = [
            self._tokenize([{"role": "system", "content": text}, {"role": "user", "content": user}])[1]
            for user in ("a", "b")
        ]
        return conversations[0][: common_prefix(*(np.asarray(c) for c in conversations))]

    def load_lora(self, name: str, path: str | Path) -> LoraAdapter:
        """Make the adapter in `path` (a PEFT directory or a converted file) available to requests as `name`.

        Raises LoraError for an adapter that cannot be used with this engine, or a name that is taken.
        """
        return self._runner.lora.load(name, path)

    def unload_lora(self, name: str) -> None:
        """Take an adapter away from new requests; those that have begun with it end with it. Raises LoraError."""
        self._runner.lora.unload(name)

    def list_loras(self) -> list[LoraAdapter]:
        """The adapters that requests can name, in the order of their loading."""
        return self._runner.lora.list()

    def set_default_lora(self, name: str | None) -> None:
        """The adapter of requests that name none; None is the base model. Raises LoraError for an unknown name."""
        self._runner.lora.set_default(name)

    @property
    def queue_depth(self) -> int:
        """Requests that wait for a place in the batch."""
        return self._scheduler.queue_depth

    @property
    def kv_cache_bytes(self) -> int:
        """Memory of the KV cache."""
        return self._runner.kv_cache.nbytes

    def close(self) -> None:
        """End open requests as cancelled, stop the engine's thread and free the engine. Can be called twice."""
        self._scheduler.stop()
        self._thread.join()
        self._runner.close()

    def _run_all(self, requests: list[Request]) -> list[RequestOutput]:
        """Submit in order, never more than the queue takes: a long list waits for itself, not fails."""
        outputs: list[RequestOutput] = []
        open_requests: list[Request] = []
        for request in requests:
            if len(open_requests) == self._scheduler.max_queue:
                outputs.append(open_requests.pop(0).handle.result())
            self._scheduler.submit(request)
            open_requests.append(request)
        return outputs + [r.handle.result() for r in open_requests]

    def _prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        on_increment: Callable[[Increment], None] | None = None,
        request_id: str | None = None,
        lora: str | None = None,
    ) -> Request:
        params = params or SamplingParams()
        adapter = self._runner.lora.get(lora)
        text, token_ids, images = self._tokenize(prompt)
        positions, next_position = None, len(token_ids)
        if self._visual_runner is not None:
            token_ids = self._visual_runner.expand_image_tokens(token_ids, images)
        if images and self._visual_runner is not None:
            positions, next_position = self._visual_runner.mrope_positions(token_ids, [i.grid_thw for i in images])
        limits = self.config.limits
        if len(token_ids) > limits.max_input_len:
            of_images = f" ({sum(i.num_tokens for i in images)} of images)" if images else ""
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens{of_images}, the engine takes {limits.max_input_len}; shorten "
                "it, send smaller images, or build with a larger --max-input-len"
            )
        image_token_id = self._visual_runner.image_token_id if self._visual_runner is not None else -1
        identity = request_id or f"request-{next(self._counter)}"
        request = Request(
            request_id=identity,
            prompt=text,
            token_ids=token_ids,
            key=prompt_key(token_ids, images, image_token_id),
            images=images,
            image_token_id=image_token_id,
            positions_3S=positions,
            next_position=next_position,
            params=params,
            seed=params.resolved_seed(),
            max_new_tokens=min(params.max_tokens, limits.max_kv_cache_capacity - len(token_ids)),
            detokenizer=Detokenizer(self.tokenizer, params.stop_strings) if self.tokenizer is not None else None,
            handle=RequestHandle(identity, on_increment, lambda: setattr(request, "cancelled", True)),
            lora=adapter,
        )
        return request

    def _tokenize(self, prompt: Any) -> tuple[str | None, list[int], list[PreparedImage]]:
        """The prompt's text if it has one, its token ids, and its images, prepared for the encoder."""
        if not isinstance(prompt, str) and all(isinstance(x, int) for x in prompt):
            return None, self._checked_ids(prompt), []
        if self.tokenizer is None:
            raise RequestError("this LLM has no tokenizer (skip_tokenizer_init); pass the prompt as token ids")
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("the prompt is empty; give it at least one character")
            return prompt, self.tokenizer.encode(prompt, add_special_tokens=True), []
        if self._chat_template is None:
            raise RequestError("the model has no chat template; pass the prompt as text")
        text = self._chat_template.render(prompt)
        references = collect_images(prompt)
        if references and self._visual_runner is None:
            raise RequestError(f"{references[0].where} is an image, but {self.config.model_type} takes text only")
        runner = self._visual_runner
        images = [runner.prepare(r.image, r.where) for r in references] if runner is not None else []
        return text, self.tokenizer.encode(text), images

    def _checked_ids(self, prompt: Any) -> list[int]:
        ids, size = list(prompt), self.config.decoder.vocab_size
        if not ids:
            raise RequestError("the prompt is empty; give it at least one token")
        bad = next((i for i in ids if not 0 <= i < size), None)
        if bad is not None:
            raise RequestError(f"the prompt holds token id {bad}, the model's vocabulary has 0 to {size - 1}")
        return ids


def _checked_priority(priority: int) -> int:
    if not isinstance(priority, int) or not -(2**31) <= priority < 2**31:
        raise RequestError(f"priority is {priority!r}; it must be a whole number, higher for more urgent")
    return priority


def _checked_deadline(deadline_s: float) -> float:
    if not isinstance(deadline_s, (int, float)) or not deadline_s > 0:
        raise RequestError(f"deadline_s is {deadline_s!r}; it must be a number of seconds above 0")
    return float(deadline_s)


def _is_one_prompt(prompts: Any) -> bool:
    """Text, a list of token ids, or a list of messages; anything else is a list of those."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, Mapping)))
