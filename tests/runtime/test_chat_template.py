"""Chat templates against transformers' `apply_chat_template`, and what bad messages are told."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from edgellm.errors import EngineDirError, RequestError
from edgellm.runtime.chat_template import ChatTemplate, collect_images, validate_messages

QWEN3_VL = """{%- set count = namespace(image=0) -%}
{%- macro render_content(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for item in content -%}
            {%- if 'image' in item or 'image_url' in item or item.type == 'image' -%}
                {%- set count.image = count.image + 1 -%}
                {%- if add_vision_id %}Picture {{ count.image }}: {% endif -%}
                <|vision_start|><|image_pad|><|vision_end|>
            {%- elif 'text' in item -%}
                {{- item.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- render_content(messages[0].content) + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + render_content(messages[0].content) + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = render_content(message.content or '') %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + content }}
        {%- for call in message.tool_calls or [] %}
            {%- if call.function %}{% set call = call.function %}{% endif %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

QWEN2_5 = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.' }}
{%- endif %}
{%- if tools %}
    {{- "\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson(indent=2) }}
    {%- endfor %}
    {{- "\\n</tools>" }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if loop.first and message.role == 'system' %}{% continue %}{% endif %}
    {%- if message.role == "assistant" %}
        {%- generation %}
        {{- '<|im_start|>assistant\\n' + (message.content or '') + '<|im_end|>' + '\\n' }}
        {%- endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA_3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception("roles must alternate user/assistant") }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

WHITESPACE = """{# comment #}
{% for message in messages %}
    {% if message.role == 'user' %}
  user: {{ message.content }}
    {% else %}

  other: {{ message.content }}
    {% endif %}
{% endfor %}
end

"""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "steer",
            "description": 'Turn <left> & "right" / über 90°',
            "parameters": {"type": "object", "properties": {"angle": {"type": "number"}}, "required": ["angle"]},
        },
    }
]
IMAGE = np.zeros((4, 4, 3), np.uint8)
TEXT_CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Where is the <red> circle? 'quotes' & 你好"}],
    [{"role": "system", "content": "  Be brief.\n"}, {"role": "user", "content": "Hi\n"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ],
]
IMAGE_CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "What is there?"}]}],
    [
        {"role": "system", "content": [{"type": "text", "text": "Look."}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "First"},
                {"type": "image", "image": IMAGE},
                {"type": "text", "text": "second"},
                {"type": "image", "image": "b.png"},
            ],
        },
        {"role": "assistant", "content": "Both are empty."},
        {"role": "user", "content": [{"type": "image", "image": IMAGE}]},
    ],
]
TOOL_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "Turn left"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "steer", "arguments": {"angle": -90, "why": "é<"}}}]},
    {"role": "tool", "content": "done"},
]
SPECIAL = {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>"}


def by_transformers(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **SPECIAL)
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("options", [{}, {"tools": TOOLS}, {"enable_thinking": False}, {"add_vision_id": True}])
@pytest.mark.parametrize(
    ("template", "chat"),
    [
        *((t, c) for t in (QWEN3_VL, QWEN2_5, LLAMA_3, WHITESPACE) for c in TEXT_CHATS),
        *((QWEN3_VL, c) for c in IMAGE_CHATS),
        (QWEN3_VL, TOOL_CHAT),
    ],
)
def test_equal_to_apply_chat_template(
    template: str, chat: list[dict[str, Any]], options: dict[str, Any], add_generation_prompt: bool
) -> None:
    expected = by_transformers(template, chat, add_generation_prompt=add_generation_prompt, **options)
    before = copy.deepcopy(chat)
    got = ChatTemplate(template, SPECIAL).render(chat, add_generation_prompt=add_generation_prompt, **options)
    assert got == expected
    assert json.dumps(chat, default=str) == json.dumps(before, default=str)


def test_variables_override_special_tokens() -> None:
    chat = TEXT_CHATS[0]
    expected = by_transformers(LLAMA_3, chat, bos_token="<s>", date_string="26 Jul 2024")
    got = ChatTemplate(LLAMA_3, SPECIAL).render(
        chat, add_generation_prompt=False, bos_token="<s>", date_string="26 Jul 2024"
    )
    assert got == expected and got.startswith("<s>") and "26 Jul 2024" in got


def test_text_items_become_a_string_where_the_template_knows_only_strings() -> None:
    chat = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert "user\na\nb<|im_end|>" in ChatTemplate(QWEN2_5).render(chat)
    with pytest.raises(RequestError, match=r"messages\[0\]\.content\[0\]: this model takes text only"):
        ChatTemplate(QWEN2_5).render(IMAGE_CHATS[0])


def test_images_come_in_prompt_order_with_their_place() -> None:
    refs = collect_images(IMAGE_CHATS[1])
    assert [r.where for r in refs] == ["messages[1].content[1]", "messages[1].content[3]", "messages[3].content[0]"]
    assert refs[0].image is IMAGE and refs[1].image == "b.png"
    assert ChatTemplate(QWEN3_VL).render(IMAGE_CHATS[1]).count("<|image_pad|>") == 3
    assert collect_images(TEXT_CHATS[0]) == []


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages is a str; it must be a list of chat messages"),
        (None, "messages is a NoneType"),
        ([], "messages is empty"),
        (["hello"], "messages[0] is a str"),
        ([{"content": "x"}], "messages[0].role is None; it must be one of system, user, assistant, tool"),
        ([TEXT_CHATS[0][0], {"role": "robot", "content": "x"}], "messages[1].role is 'robot'; it must be one of"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role is ['user']"),
        ([{"role": "user"}], "messages[0].content is a NoneType"),
        ([{"role": "user", "content": 3}], "messages[0].content is a int"),
        ([{"role": "assistant", "content": None}], "messages[0].content is a NoneType"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0] is a str"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "sound"}]}],
            "messages[0].content[1].type is 'sound'; it must be one of text, image",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "messages[0].content[0].text is a int"),
        ([{"role": "user", "content": [{"type": "image"}]}], "messages[0].content[0].image is missing"),
    ],
)
def test_bad_messages_are_refused_with_their_place(messages: object, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        validate_messages(messages)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_what_the_template_refuses_is_a_request_error() -> None:
    with pytest.raises(RequestError, match="refuses these messages: roles must alternate"):
        ChatTemplate(LLAMA_3, SPECIAL).render([{"role": "assistant", "content": "x"}])
    with pytest.raises(RequestError, match="refuses"):
        ChatTemplate("{{ messages[0].nothing.at.all }}").render(TEXT_CHATS[0])


def test_template_is_sandboxed() -> None:
    for source in ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"):
        with pytest.raises(RequestError, match="refuses"):
            ChatTemplate(source).render(TEXT_CHATS[0])


def test_from_dir(tmp_path: Path) -> None:
    chat = TEXT_CHATS[0]
    with pytest.raises(EngineDirError, match="has no chat template"):
        ChatTemplate.from_dir(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": "config {{ bos_token }}"}))
    assert ChatTemplate.from_dir(tmp_path, SPECIAL).render(chat) == "config <|begin_of_text|>"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    settings.write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate.from_dir(tmp_path).render(chat) == "plain"
    assert ChatTemplate.from_dir(tmp_path).render(chat, tools=TOOLS) == "tools"
    settings.write_text(json.dumps({"chat_template": named[1:]}))
    with pytest.raises(EngineDirError, match="no entry named default; valid are tool_use"):
        ChatTemplate.from_dir(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert ChatTemplate.from_dir(tmp_path).render(chat) == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert ChatTemplate.from_dir(tmp_path).render(chat) == "jinja"
    (tmp_path / "chat_template.jinja").write_text("line\n{% if %}")
    with pytest.raises(EngineDirError, match="chat template, line 2"):
        ChatTemplate.from_dir(tmp_path)
