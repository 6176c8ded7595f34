"""The chat template of an exported model: with texts and lists of parts as content, for every reader of jinja."""

from __future__ import annotations

from typing import Any

from transformers import LlavaProcessor
from transformers.utils.chat_template_utils import render_jinja_template

from llava_train.template_marks import hide_marks

_QUESTION, _ANSWER = "Is it?", "Yes."

_AS_TEXTS = """\
{%- set ns = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- set text = message.content -%}
    {%- if message.content is not string -%}
        {%- set text -%}
            {%- for part in message.content -%}
                {%- if not loop.first and 'image' in (part.type, loop.previtem.type) -%}
                    {{- '\\n' -}}
                {%- endif -%}
                {{- '<image>' if part.type == 'image' else part.text -}}
            {%- endfor -%}
        {%- endset -%}
    {%- endif -%}
    {%- set ns.messages = ns.messages + [dict(message, content=text)] -%}
{%- endfor -%}
{%- set messages = ns.messages -%}
"""
"""Stands before a template that takes texts only."""

_AS_PARTS = """\
{%- set ns = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- set parts = message.content -%}
    {%- if message.content is string -%}
        {%- set parts = [{'type': 'text', 'text': message.content}] -%}
    {%- endif -%}
    {%- set ns.messages = ns.messages + [dict(message, content=parts)] -%}
{%- endfor -%}
{%- set messages = ns.messages -%}
"""
"""Stands before a template that takes lists of parts only, as those of llava-hf."""


def portable(template: str, processor: LlavaProcessor) -> str:
    """A template as an exported model has it. One that cannot ask about an image at all keeps what it takes."""
    takes_texts, takes_parts = (_takes(template, processor, as_parts) for as_parts in (False, True))
    if takes_texts and not takes_parts:
        template = _AS_TEXTS + template
    elif takes_parts and not takes_texts:
        template = _AS_PARTS + template
    return hide_marks(template)


def begins_with_bos(processor: LlavaProcessor) -> bool:
    """Whether the template writes the begin-of-sequence token, so that the tokenizer must not add it again."""
    bos = processor.tokenizer.bos_token
    texts = (_render(processor.chat_template, processor, as_parts) for as_parts in (False, True))
    return bos is not None and any(text.startswith(bos) for text in texts)


def reads_eos_token(processor: LlavaProcessor) -> bool:
    """Whether the text of a conversation depends on the tokenizer's end-of-sequence token."""
    template = processor.chat_template
    return any(
        _render(template, processor, as_parts) != _render(template, processor, as_parts, eos_token="another")
        for as_parts in (False, True)
    )


def _takes(template: str, processor: LlavaProcessor, as_parts: bool) -> bool:
    """Whether a template writes question, image and answer once each, its content given as texts or as parts."""
    text = _render(template, processor, as_parts)
    found = [text.count(part) for part in (processor.image_token, _QUESTION, _ANSWER)]
    return found in ([1, 1, 1], [1, 0, 1]) and "'type'" not in text  # `plain` leaves the question out


def _render(template: str, processor: LlavaProcessor, as_parts: bool, **tokens: str) -> str:
    """A question about an image and its answer as text; empty where the template refuses them."""

    def content(text: str) -> Any:
        return [{"type": "text", "text": text}] if as_parts else text

    question: Any = f"{processor.image_token}\n{_QUESTION}"
    if as_parts:
        question = [{"type": "image"}, *content(_QUESTION)]
    try:
        texts, _ = render_jinja_template(
            conversations=[[{"role": "user", "content": question}, {"role": "assistant", "content": content(_ANSWER)}]],
            chat_template=template,
            **{**processor.tokenizer.special_tokens_map, **tokens},
        )
    except Exception:  # jinja passes on whatever the expressions of a template raise
        return ""
    return str(texts[0])
