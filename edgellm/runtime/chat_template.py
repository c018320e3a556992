"""Chat messages to prompt text with the model's own Jinja template, as transformers' `apply_chat_template` renders it.

The environment (sandbox, whitespace rules, filters, globals) is transformers' `_compile_jinja_template`, so a template
gives the same text here; the messages are checked first, so that a mistake is named by its place in the request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgellm.errors import EngineDirError, RequestError
from edgellm.runtime.tokenizer import read_tokenizer_json

ROLES = ("system", "user", "assistant", "tool")
_CONTENT_TYPES = ("text", "image")

Message = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class ImageRef:
    """An image of a conversation and its place, such as `messages[1].content[0]`."""

    image: Any
    where: str


def validate_messages(messages: object) -> None:
    """Raise RequestError, with the place of the mistake, unless `messages` is a conversation.

    That is a non-empty list of {"role", "content"} with a known role, where the content is a string or a list of
    {"type": "text", "text": str} and {"type": "image", "image": ...}. An assistant message with tool_calls may have no
    content.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise RequestError(f"messages is a {type(messages).__name__}; it must be a list of chat messages")
    if not messages:
        raise RequestError("messages is empty; a conversation needs at least one message")
    for index, message in enumerate(messages):
        _validate_message(message, f"messages[{index}]")


def _validate_message(message: object, where: str) -> None:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} is a {type(message).__name__}; it must be an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(f"{where}.role is {role!r}; it must be one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, str) or (content is None and role == "assistant" and message.get("tool_calls")):
        return
    if not isinstance(content, (list, tuple)):
        raise RequestError(f"{where}.content is a {type(content).__name__}; it must be a string or a list of items")
    for index, item in enumerate(content):
        _validate_item(item, f"{where}.content[{index}]")


def _validate_item(item: object, where: str) -> None:
    if not isinstance(item, Mapping):
        raise RequestError(f"{where} is a {type(item).__name__}; it must be an object with a type")
    kind = item.get("type")
    if kind not in _CONTENT_TYPES:
        raise RequestError(f"{where}.type is {kind!r}; it must be one of {', '.join(_CONTENT_TYPES)}")
    if kind == "text" and not isinstance(item.get("text"), str):
        raise RequestError(f"{where}.text is a {type(item.get('text')).__name__}; it must be a string")
    if kind == "image" and item.get("image") is None:
        raise RequestError(f"{where}.image is missing; give an array, a picture or a path")


def collect_images(messages: Sequence[Message]) -> list[ImageRef]:
    """The images of validated messages, in the order of their image tokens in the prompt."""
    return [
        ImageRef(item["image"], f"messages[{m}].content[{i}]")
        for m, message in enumerate(messages)
        if isinstance(message.get("content"), (list, tuple))
        for i, item in enumerate(message["content"])
        if item["type"] == "image"
    ]


class ChatTemplate:
    """A compiled chat template.

    `source` is Jinja text; `special_tokens` are variables that every rendering sees (bos_token, eos_token, ...);
    `tool_source`, where a model has one, serves conversations with tools. Raises EngineDirError for a syntax error.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str] | None = None, tool_source: str | None = None
    ) -> None:
        self._template = _compile(source)
        self._tool_template = self._template if tool_source is None else _compile(tool_source)
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def from_dir(cls, directory: str | Path, special_tokens: Mapping[str, str] | None = None) -> ChatTemplate:
        """From chat_template.jinja, chat_template.json or the chat_template of tokenizer_config.json, in this order.

        Raises EngineDirError when there is none or it cannot be used.
        """
        directory = Path(directory)
        path = directory / "chat_template.jinja"
        if path.is_file():
            try:
                return cls(path.read_text(encoding="utf-8"), special_tokens)
            except (OSError, UnicodeDecodeError) as e:
                raise EngineDirError(f"{path} cannot be read ({e}); export the model again") from e
        for name in ("chat_template.json", "tokenizer_config.json"):
            found = read_tokenizer_json(directory / name).get("chat_template")
            if isinstance(found, str):
                return cls(found, special_tokens)
            if isinstance(found, list):
                return cls._from_named(found, directory / name, special_tokens)
        raise EngineDirError(f"{directory} has no chat template; use raw text prompts, or add chat_template.jinja")

    @classmethod
    def _from_named(cls, entries: list[Any], path: Path, special_tokens: Mapping[str, str] | None) -> ChatTemplate:
        named = {e["name"]: e["template"] for e in entries if isinstance(e, dict) and {"name", "template"} <= e.keys()}
        if "default" not in named:
            raise EngineDirError(
                f"{path}: chat_template has no entry named default; valid are {', '.join(sorted(named))}"
            )
        return cls(named["default"], special_tokens, named.get("tool_use"))

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text of `messages`; `variables` such as enable_thinking reach the template.

        Images become the template's own image tokens. Lists of text items become one string for a template that only
        knows strings. Raises RequestError for bad messages and for what the template itself refuses.
        """
        validate_messages(messages)
        template = self._template if tools is None else self._tool_template
        plain = [_plain(message, i, template.reads_lists) for i, message in enumerate(messages)]
        try:
            return template.jinja.render(
                messages=plain,
                tools=None if tools is None else list(tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self._special_tokens, **variables},
            )
        except (jinja2.TemplateError, TypeError, ValueError) as e:
            raise RequestError(f"the model's chat template refuses these messages: {' '.join(str(e).split())}") from e


@dataclass(frozen=True, eq=False)
class _Compiled:
    jinja: jinja2.Template
    reads_lists: bool


def _plain(message: Message, index: int, reads_lists: bool) -> dict[str, Any]:
    """A message without its image data: a template must neither print nor compare pixels."""
    content = message.get("content")
    if not isinstance(content, (list, tuple)):
        return dict(message)
    if reads_lists:
        return {**message, "content": [{**i, "image": "image"} if i["type"] == "image" else dict(i) for i in content]}
    for place, item in enumerate(content):
        if item["type"] == "image":
            raise RequestError(f"messages[{index}].content[{place}]: this model takes text only; leave the image out")
    return {**message, "content": "\n".join(item["text"] for item in content)}


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's tokens for training; for inference it is its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML characters; transformers' does not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _compile(source: str) -> _Compiled:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return _Compiled(environment.from_string(source), _reads_lists(environment.parse(source)))
    except jinja2.TemplateSyntaxError as e:
        raise EngineDirError(f"chat template, line {e.lineno}: {e.message}; export the model again") from e


def _reads_lists(template: jinja2.nodes.Template) -> bool:
    """Whether the template walks over a message's content, and so takes lists of items."""
    for loop in template.find_all(jinja2.nodes.For):
        over = [loop.iter, *loop.iter.find_all(jinja2.nodes.Expr)]
        if any(_names_content(node) for node in over):
            return True
    return False


def _names_content(node: jinja2.nodes.Node) -> bool:
    if isinstance(node, jinja2.nodes.Name):
        return node.name == "content"
    if isinstance(node, jinja2.nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, jinja2.nodes.Getitem) and getattr(node.arg, "value", None) == "content"
