"""From a Generate goal to what the library takes: chat messages with pictures, and sampling parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from edgellm import SamplingParams
from edgellm.errors import RequestError
from edgellm_ros import msg
from edgellm_ros.action import Generate
from edgellm_ros.convert import RGB

ParameterValue = Callable[[str], Any]
Goal = Generate.Goal
IMAGE_SOURCES = {
    Goal.IMAGE_NONE: "IMAGE_NONE",
    Goal.IMAGE_INLINE: "IMAGE_INLINE",
    Goal.IMAGE_COMPRESSED: "IMAGE_COMPRESSED",
    Goal.IMAGE_LATEST: "IMAGE_LATEST",
}


def check_goal(goal: Generate.Goal) -> None:
    """Raises RequestError for a goal that contradicts itself; prompt and image content are checked later."""
    if not goal.messages:
        raise RequestError("the goal has no messages; give at least one with role 'user'")
    if goal.messages[-1].role != msg.ChatMessage.ROLE_USER:
        raise RequestError(f"the last message has role {goal.messages[-1].role!r}; it must be the user's")
    if goal.image_source not in IMAGE_SOURCES:
        valid = ", ".join(f"{number} ({name})" for number, name in IMAGE_SOURCES.items())
        raise RequestError(f"image_source is {goal.image_source}; expected one of {valid}")
    source = IMAGE_SOURCES[goal.image_source]
    for field, own_source in (("images", Goal.IMAGE_INLINE), ("compressed_images", Goal.IMAGE_COMPRESSED)):
        if goal.image_source == own_source and not getattr(goal, field):
            raise RequestError(f"image_source is {source}, but {field} is empty")
        if goal.image_source != own_source and getattr(goal, field):
            raise RequestError(f"{field} is set, but image_source is {source}; set it to {IMAGE_SOURCES[own_source]}")
    if not (math.isfinite(goal.max_image_age) and goal.max_image_age >= 0.0):
        raise RequestError(f"max_image_age is {goal.max_image_age}; expected seconds, 0 or more")


def to_messages(messages: Sequence[msg.ChatMessage], images: Sequence[RGB], system_prompt: str) -> list[dict[str, Any]]:
    """The library's chat messages: each message's images stand before its text. A non-empty `system_prompt` comes first
    unless the conversation has a system message. Raises RequestError if num_images and the images do not add up."""
    counts = [message.num_images for message in messages]
    if not any(counts):
        counts[-1] = len(images)
    if sum(counts) != len(images):
        raise RequestError(f"the messages claim {sum(counts)} images (num_images), the goal has {len(images)}")
    remaining = iter(images)
    out = []
    if system_prompt and messages[0].role != msg.ChatMessage.ROLE_SYSTEM:
        out.append({"role": msg.ChatMessage.ROLE_SYSTEM, "content": system_prompt})
    for message, count in zip(messages, counts, strict=True):
        content: list[dict[str, Any]] = [{"type": "image", "image": next(remaining)} for _ in range(count)]
        content.append({"type": "text", "text": message.text})
        out.append({"role": message.role, "content": content if count else message.text})
    return out


def to_sampling(wanted: msg.SamplingParams, parameter: ParameterValue) -> SamplingParams:
    """The library's sampling parameters; what the goal leaves open comes from the node's sampling.* parameters.

    Raises RequestError for a value that is out of range.
    """

    def value(name: str) -> Any:
        own = getattr(wanted, name)
        return parameter(f"sampling.{name}") if own < 0 else own

    return SamplingParams(
        max_tokens=wanted.max_tokens or parameter("sampling.max_tokens"),
        temperature=value("temperature"),
        top_k=value("top_k"),
        top_p=value("top_p"),
        min_p=value("min_p"),
        seed=None if wanted.seed < 0 else wanted.seed,
        stop=list(wanted.stop) or None,
        stop_token_ids=list(wanted.stop_token_ids) or None,
        ignore_eos=wanted.ignore_eos,
    )
