"""`LLM`: the runtime's front door. Prompts come in as text, chat messages or token ids; answers stream out."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from edgellm import progress
from edgellm.engine_dir import EngineConfig, read_manifest, verify
from edgellm.errors import RequestError
from edgellm.runtime.chat_template import ChatTemplate, collect_images
from edgellm.runtime.detokenizer import Detokenizer
from edgellm.runtime.engine_loop import EngineLoop
from edgellm.runtime.model_runner import ModelRunner
from edgellm.runtime.request import Increment, Request, RequestHandle, RequestOutput
from edgellm.runtime.sampling import SamplingParams
from edgellm.runtime.scheduler import Scheduler
from edgellm.runtime.tokenizer import Tokenizer
from edgellm.vision.base import PreparedImage

Prompt: TypeAlias = "str | Sequence[int] | Sequence[Mapping[str, Any]]"
"""Text (used as it is, without a chat template), token ids, or chat messages, which may hold images."""


class LLM:
    """A loaded engine directory. Safe to use from several threads; requests share the batch of one engine thread.

    `num_threads` bounds the CPU threads of a step (None: every core this process may use); `max_queue` the requests
    that may wait. With `skip_tokenizer_init` prompts are token ids and answers carry no text.
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
    ) -> None:
        directory = Path(engine_dir)
        self.config: EngineConfig = read_manifest(directory)
        verify(directory, self.config)
        self.tokenizer: Tokenizer | None = None
        self._chat_template: ChatTemplate | None = None
        if not skip_tokenizer_init:
            self.tokenizer = Tokenizer.from_dir(directory) if tokenizer is None else Tokenizer.wrap(tokenizer)
            if (directory / "chat_template.jinja").exists() or (directory / "tokenizer_config.json").exists():
                self._chat_template = ChatTemplate.from_dir(directory, self.tokenizer.special_tokens)
        with progress.steps(2, f"loading {directory.name}") as steps:
            steps.start("reading the engine")
            runner = ModelRunner(directory, self.config, num_threads)
            steps.start("warming up")
            runner.warm_up()
        self._runner = runner
        self._visual_runner = runner.visual_runner
        self._scheduler = Scheduler(self.config.limits.max_batch_size, max_queue)
        eos = self.tokenizer.eos_token_ids if self.tokenizer is not None else frozenset[int]()
        self._counter = itertools.count()
        self._thread = threading.Thread(
            target=EngineLoop(self._scheduler, runner, eos).run, name="edgellm-engine", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(self, prompts: Any, sampling_params: SamplingParams | Sequence[SamplingParams] | None = None) -> Any:
        """Answer one prompt (a RequestOutput), or a list of prompts together (a list of them, in order); waits.

        Raises RequestError for a prompt that cannot be accepted; then none of the list has been started.
        """
        if _is_one_prompt(prompts):
            if isinstance(sampling_params, Sequence):
                raise RequestError(f"one prompt came with {len(sampling_params)} sampling_params; give one")
            return self.generate_async(prompts, sampling_params).result()
        params = list(sampling_params) if isinstance(sampling_params, Sequence) else [sampling_params] * len(prompts)
        if len(params) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts came with {len(params)} sampling_params; give one or as many")
        prepared = [self._prepare(p, s, None, None) for p, s in zip(prompts, params, strict=True)]
        return self._run_all(prepared)

    def generate_async(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        on_increment: Callable[[Increment], None] | None = None,
        request_id: str | None = None,
    ) -> RequestHandle:
        """Start answering `prompt` and return at once. Tokenizing and image preprocessing happen in this thread.

        `on_increment` is called on the engine's thread right after each token; it must be short.
        Raises RequestError for a prompt or image that cannot be accepted, QueueFullError when too many are waiting.
        """
        request = self._prepare(prompt, sampling_params, on_increment, request_id)
        self._scheduler.submit(request)
        return request.handle

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
        on_increment: Callable[[Increment], None] | None,
        request_id: str | None,
    ) -> Request:
        params = params or SamplingParams()
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
        identity = request_id or f"request-{next(self._counter)}"
        request = Request(
            request_id=identity,
            prompt=text,
            token_ids=token_ids,
            images=images,
            positions_3S=positions,
            next_position=next_position,
            params=params,
            seed=params.resolved_seed(),
            max_new_tokens=min(params.max_tokens, limits.max_kv_cache_capacity - len(token_ids)),
            detokenizer=Detokenizer(self.tokenizer, params.stop_strings) if self.tokenizer is not None else None,
            handle=RequestHandle(identity, on_increment, lambda: setattr(request, "cancelled", True)),
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


def _is_one_prompt(prompts: Any) -> bool:
    """Text, a list of token ids, or a list of messages; anything else is a list of those."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, Mapping)))
