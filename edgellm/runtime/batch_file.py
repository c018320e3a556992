"""Batch files: the request format that TensorRT Edge-LLM documents, read, answered and written as JSON.

Defaults are that format's own. Relative paths of images and adapters are relative to the batch file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgellm import progress
from edgellm.errors import EdgeLLMError, RequestError
from edgellm.files import write_json
from edgellm.runtime.llm import LLM
from edgellm.runtime.request import RequestOutput
from edgellm.runtime.sampling import SamplingParams


@dataclass(frozen=True)
class BatchRequest:
    """One conversation of a batch file."""

    messages: list[dict[str, Any]]
    lora_name: str | None = None
    save_system_prompt_kv_cache: bool = False
    stop: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class BatchFile:
    """A batch file; `batch_size` requests are answered together. `available_lora_weights` are adapters by name."""

    requests: list[BatchRequest]
    available_lora_weights: dict[str, Path] = field(default_factory=dict)
    batch_size: int = 1
    temperature: float = 1.0
    top_p: float = 0.8
    top_k: int = 50
    max_generate_length: int = 256

    def sampling_params(self, request: BatchRequest) -> SamplingParams:
        """What the file asks for one request."""
        return SamplingParams(
            max_tokens=self.max_generate_length,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=request.stop or None,
        )


def read(path: Path) -> BatchFile:
    """Parse a batch file; raises RequestError naming the place of what cannot be used."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"{path} does not exist; pass a JSON file with a list of requests") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise RequestError(f"{path} cannot be read as JSON ({e})") from None
    top = _checked(values, BatchFile, str(path))
    if not isinstance(top.get("requests"), list) or not top["requests"]:
        raise RequestError(f"{path}: requests must be a list of at least one request")
    if not isinstance(top.get("batch_size", 1), int) or top.get("batch_size", 1) < 1:
        raise RequestError(f"{path}: batch_size is {top['batch_size']!r}; it must be a whole number of at least 1")
    top["available_lora_weights"] = _adapters(top.get("available_lora_weights", {}), path)
    requests = [_request(r, f"{path}: requests[{i}]", path.parent) for i, r in enumerate(top["requests"])]
    batch = BatchFile(**{**top, "requests": requests})
    for request in requests:
        batch.sampling_params(request)
    return batch


def answer(llm: LLM, batch: BatchFile, output_file: Path) -> list[RequestOutput | EdgeLLMError]:
    """Answer every request and write `output_file`; a request that fails gets its error there and stops no other.

    The file's adapters are loaded first; raises LoraError for one that cannot be used.
    """
    for name, path in batch.available_lora_weights.items():
        llm.load_lora(name, path)
    outcomes: list[RequestOutput | EdgeLLMError] = []
    with progress.amount(len(batch.requests), "answering", unit="request") as bar:
        for first in range(0, len(batch.requests), batch.batch_size):
            handles = [_start(llm, batch, r) for r in batch.requests[first : first + batch.batch_size]]
            for handle in handles:
                try:
                    outcomes.append(handle if isinstance(handle, EdgeLLMError) else handle.result())
                except EdgeLLMError as e:
                    outcomes.append(e)
                bar.update(1)
    write_json(output_file, {"responses": [_response(i, o) for i, o in enumerate(outcomes)]})
    return outcomes


def _start(llm: LLM, batch: BatchFile, request: BatchRequest) -> Any:
    try:
        return llm.generate_async(request.messages, batch.sampling_params(request), lora=request.lora_name)
    except EdgeLLMError as e:
        return e


def _response(index: int, outcome: RequestOutput | EdgeLLMError) -> dict[str, Any]:
    if isinstance(outcome, EdgeLLMError):
        return {"request_idx": index, "output_text": "", "finish_reason": "error", "error": str(outcome)}
    return {
        "request_idx": index,
        "output_text": outcome.text,
        "finish_reason": outcome.outputs[0].finish_reason,
        "usage": dataclasses.asdict(outcome.usage),
        "timing": dataclasses.asdict(outcome.timing),
    }


# Keys of the format that change nothing here when they hold these values.
_NEUTRAL: dict[str, Any] = {
    "apply_chat_template": True,
    "add_generation_prompt": True,
    "enable_thinking": False,
    "disable_spec_decode": None,
}


def _checked(values: object, cls: type, where: str) -> dict[str, Any]:
    """The known keys of an object; an unknown key, or a neutral one with another value, is an error."""
    if not isinstance(values, Mapping):
        raise RequestError(f"{where} must be a JSON object")
    names = [f.name for f in dataclasses.fields(cls)]
    for key, value in values.items():
        if key in _NEUTRAL and _NEUTRAL[key] in (None, value):
            continue
        if key in _NEUTRAL:
            raise RequestError(f"{where}: {key} {value!r} is not supported yet; leave it out")
        if key not in names:
            raise RequestError(f"{where}: unknown key {key!r}; valid keys are {', '.join(sorted([*names, *_NEUTRAL]))}")
    return {k: v for k, v in values.items() if k in names}


def _request(values: object, where: str, base: Path) -> BatchRequest:
    known = _checked(values, BatchRequest, where)
    if not isinstance(known.get("messages"), list):
        raise RequestError(f"{where}.messages must be a list of messages")
    if not isinstance(known.get("lora_name"), (str, type(None))):
        raise RequestError(f"{where}: lora_name is {known['lora_name']!r}; it must be an adapter's name or null")
    known["messages"] = [_message(m, base) for m in known["messages"]]
    return BatchRequest(**known)


def _adapters(values: Any, file: Path) -> dict[str, Path]:
    """Adapters' paths by name, made relative to the batch file."""
    if not isinstance(values, Mapping) or not all(isinstance(path, str) for path in values.values()):
        raise RequestError(f"{file}: available_lora_weights must be an object of adapters' paths by name")
    return {name: file.parent / path for name, path in values.items()}


def _message(message: Any, base: Path) -> Any:
    """Image paths made relative to the batch file; everything else is checked by the chat template."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    content = [
        {**item, "image": str(base / item["image"])}
        if isinstance(item, dict) and item.get("type") == "image" and isinstance(item.get("image"), str)
        else item
        for item in message["content"]
    ]
    return {**message, "content": content}
