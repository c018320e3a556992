"""The tiny model's tokenizer: a byte-level BPE in Qwen2's layout, trained on questions, answers and common words.

Any text tokenizes (bytes are the last resort); the special tokens and the chat format are those of Qwen3-VL.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

from edgellm_ros.scene_questions import BASE_KINDS, COLORS, SHAPES, SIZES, STYLES, Noun, Query, examples, phrase

VOCAB_SIZE = 1536
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
# In Qwen's tokenizers these are single tokens too, but not "special": decoding with skip_special_tokens keeps them.
PLAIN_TOKENS = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)

# Qwen2's pre-tokenizer: words with their leading space, single digits, runs of punctuation.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_COMMON_WORDS = """
the be to of and a in that have it for not on with he as you do at this but his by from they we say her she or an will
my one all would there their what so up out if about who get which go me when make can like time no just him know take
people into year your good some could them see other than then now look only come its over think also back after use
two how our work first well way even new want because any these give day most us is are was were been has had did done
said made found system user assistant image video tool function name arguments content role type value string number
object array true false null json list text answer question reply please help hello thanks yes okay sorry robot camera
sensor motor wheel arm gripper battery charge dock map path goal route speed stop start turn move drive forward
backward left right ahead behind above below near far between inside outside front side top bottom center corner edge
wall floor ceiling door room table chair box ball person human hand head face eye dog cat car truck road street sign
light lamp window shelf bottle cup plate book phone screen keyboard button switch cable tree grass sky sun cloud rain
snow water fire color colour shape size small medium large big little long short wide narrow high low dark bright
black white gray grey brown pink red orange yellow green blue purple cyan magenta circle square triangle star cross
ring line point angle degree meter metre second minute hour metre kilogram newton watt volt ampere frame pixel grid
cell row column index count sum total zero one two three four five six seven eight nine ten eleven twelve hundred
thousand million first second third last next previous before after during while until again always never sometimes
often maybe should must may might cannot where why whose whom here very much many more less few several every each
both either neither same different equal open close closed pick place put hold carry push pull lift lower find search
follow track avoid reach grasp release wait pause resume continue return report describe explain show tell write read
speak listen hear learn train test model language vision token word sentence message request response error warning
info debug status state active inactive ready busy idle failed success result input output data file folder device
memory processor graphics engine layer weight bias batch prompt cache stream request safe danger careful slow fast
quick warm cold hot dry wet clean dirty full empty heavy easy hard old young early late morning evening night week
month world country city house home school company part problem fact case group life child woman man thing place point
hand program government level order power change play run live believe happen include set try ask need feel become
leave mean keep let begin seem turn stand lose pay meet add spend grow walk win offer remember love consider appear
buy serve die send expect build stay fall cut kill remain suggest raise pass sell require decide break thank receive
"""

CHAT_TEMPLATE = """\
{#- Qwen3-VL's chat format: <|im_start|>role, content with images and videos in place, <|im_end|>. -#}
{%- set count = namespace(image=0, video=0) -%}
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for item in content -%}
            {%- if item.type == 'image' or 'image' in item or 'image_url' in item -%}
                {%- set count.image = count.image + 1 -%}
                {%- if add_vision_id %}{{ 'Picture ' ~ count.image ~ ': ' }}{% endif -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif item.type == 'video' or 'video' in item -%}
                {%- set count.video = count.video + 1 -%}
                {%- if add_vision_id %}{{ 'Video ' ~ count.video ~ ': ' }}{% endif -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif 'text' in item -%}
                {{- item.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if tools -%}
    {{- '<|im_start|>system\\n' -}}
    {%- if messages[0].role == 'system' %}{{ render(messages[0].content) ~ '\\n\\n' }}{% endif -%}
    {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' -}}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' -}}
    {%- for tool in tools %}{{ '\\n' ~ (tool | tojson) }}{% endfor -%}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments' -}}
    {{- ' within <tool_call></tool_call> XML tags:\\n<tool_call>\\n' -}}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' -}}
{%- elif messages[0].role == 'system' -%}
    {{- '<|im_start|>system\\n' ~ render(messages[0].content) ~ '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ render(message.content) ~ '<|im_end|>\\n' -}}
    {%- elif message.role == 'assistant' -%}
        {%- set text = render(message.content or '') -%}
        {{- '<|im_start|>assistant\\n' ~ text -}}
        {%- for tool_call in message.tool_calls or [] -%}
            {%- set call = tool_call.function or tool_call -%}
            {%- if not loop.first or text %}{{ '\\n' }}{% endif -%}
            {{- '<tool_call>\\n{"name": "' ~ call.name ~ '", "arguments": ' -}}
            {{- call.arguments if call.arguments is string else call.arguments | tojson -}}
            {{- '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- elif message.role == 'tool' -%}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif -%}
        {{- '\\n<tool_response>\\n' ~ render(message.content) ~ '\\n</tool_response>' -}}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""


def corpus() -> list[str]:
    """Training text, the same every time: questions and answers in every style, and each common word twice."""
    texts = []
    for style in STYLES:
        for example in examples("train", 4000, style):
            texts += [example.question, example.answer]
    for base in BASE_KINDS:
        nouns = [Noun(c, s, z) for c in (None, *COLORS) for s in (None, *SHAPES) for z in (None, *SIZES)]
        texts += [phrase(Query(base, noun, noun)) for noun in nouns]
    texts += [text for word in _COMMON_WORDS.split() for text in (f"a {word}", f"A {word}", word.capitalize())]
    return texts


def make_tokenizer() -> Tokenizer:
    """Train the BPE and add the special tokens at the end of the vocabulary, as Qwen does."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = len(SPECIAL_TOKENS) + len(PLAIN_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - added,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_TOKENS])
    return tokenizer


def write_tokenizer(folder: Path) -> Tokenizer:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja; returns the tokenizer."""
    tokenizer = make_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "model_max_length": 4096,
        "additional_special_tokens": SPECIAL_TOKENS[1:],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return tokenizer
