"""Chat templates: the text around the turns.

A template is jinja that transformers, vLLM and others render, so it must stand on its own in an exported model. Ours
are put together of three pieces:

    {%- set bos = ... -%}    settings: what differs between models of one format
    _common.jinja            content as text, `<image>` in its places, the system turn
    NAME.jinja               the turns, `{% generation %}` around what the assistant has to generate

`auto` renders the language model's own template and each of ours on the same conversations and takes the one that
gives the same text. Settings that only its model has are found the same way: with a marker as system text,

    ours      <|start_header_id|>system<|end_header_id|>\\n\\n                      MARKER<|eot_id|>...
    theirs    <|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge ... MARKER<|eot_id|>...

what theirs has more is the system prefix. The default system text is found in a conversation without system turn.

A user's own file is used as it is. Whatever its origin, a template is tried on a conversation before it is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from importlib import resources
from pathlib import Path

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from llava_train.config import CHAT_TEMPLATES
from llava_train.data.problems import shortened
from llava_train.data.samples import IMAGE_PLACEHOLDER, Turn
from llava_train.errors import UserError
from llava_train.template_marks import show_marks


class TemplateError(UserError):
    """A chat template that cannot be used, or does not fit the tokenizer."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"model.chat_template: {problem}")


@dataclass(frozen=True)
class _Format:
    """What a format of ours needs: tokens of the tokenizer, and the system text of a conversation without one."""

    control_tokens: tuple[str, ...] = ()
    needs_eos: bool = False
    default_system: str | None = None


_FORMATS = {
    "plain": _Format(),
    "vicuna_v1": _Format(
        needs_eos=True,
        default_system="A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions.",
    ),
    "llava_v0": _Format(
        needs_eos=True,  # not in the text, but generation needs a token to stop at
        default_system="A chat between a curious human and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the human's questions.",
    ),
    "llama2": _Format(needs_eos=True),
    "llama3": _Format(("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "mistral": _Format(needs_eos=True),
    "mistral_v3": _Format(needs_eos=True),
    "chatml": _Format(("<|im_start|>", "<|im_end|>")),
    "phi3": _Format(("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), needs_eos=True),
    "gemma": _Format(("<start_of_turn>", "<end_of_turn>")),
    "zephyr": _Format(needs_eos=True),
}
_NEVER_PICKED = ("plain", "llava_v0")
"""Formats that no language model was trained with before LLaVA."""

_TRIAL = (
    Turn("system", "Be kind."),
    Turn("user", f"{IMAGE_PLACEHOLDER}\nIs it?"),
    Turn("assistant", "Yes, it is."),
    Turn("user", f"{IMAGE_PLACEHOLDER}\nHow many?"),
    Turn("assistant", "42"),
    Turn("user", "And then?"),
    Turn("assistant", "(nothing)"),
)
"""A conversation that every template must render right. Its answers begin with a letter, a digit and a mark."""
_ANSWERS = [number for number, turn in enumerate(_TRIAL) if turn.role == "assistant"]
_TRIAL_TEXT = "".join(turn.text for turn in _TRIAL)
_SYSTEM_MARKER = "SYSTEM-TEXT"
_WORD = re.compile(r"<[^<>\s]+>|\w+|\s|[^\w\s]")
_NEAR = 0.8
"""A template is near to another one that writes more than this share of its words."""
_N_PIECES = 2
_CHOICE = f"name one of {', '.join(CHAT_TEMPLATES)}, or a jinja file of your own"


@dataclass(frozen=True)
class _Settings:
    """What differs between models of one format."""

    bos: bool
    """Whether the text begins with the begin-of-sequence token."""
    default_system: str | None = None
    """The system text of a conversation that has none."""
    system_prefix: str = ""
    """What stands before every system text."""

    def jinja(self) -> str:
        values = {
            "bos": "bos_token" if self.bos else "''",
            "default_system": "none" if self.default_system is None else _quoted(self.default_system),
            "system_prefix": _quoted(self.system_prefix),
        }
        return "".join(f"{{%- set {name} = {value} -%}}\n" for name, value in values.items())


def load_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The jinja text of a chat template, fitted to a tokenizer.

    Where the tokenizer puts a begin-of-sequence token before a text, so does a template of ours: chat front ends switch
    the tokenizer's own off. `plain` would begin with the image, which the language model would then take for its
    attention sink (Xiao et al., 2309.17453): it begins with that token wherever there is one.

    Args:
        name: one of `CHAT_TEMPLATES`, `auto` for the one that the tokenizer's own template is, or a jinja file.
        tokenizer: one that has `<image>` as a token.

    Raises:
        TemplateError: a template that is unknown, broken, or writes tokens that the tokenizer lacks.
    """
    if name == "auto":
        name, settings = _same_as_own(tokenizer)
    elif name in _FORMATS:
        settings = _named_settings(name, tokenizer)
    if name in _FORMATS:
        _require_tokens(name, tokenizer)
        template = _assembled(name, settings)
    else:
        template = _read(name)
    for problem in _problems(template, tokenizer):
        raise TemplateError(f"{name} {problem}")
    return template


def unlike_own(name: str, template: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A line to show when a format by name writes another text than the language model's own template, else None.

    It says what the model's own template writes in addition, what follows from that, and what keeps it. `plain` and
    `llava_v0` are never a model's own.
    """
    own = _own_template(tokenizer)
    if name not in _FORMATS or name in _NEVER_PICKED or own is None:
        return None
    for bos in ("bos_token", "''"):  # a tokenizer may add what its template leaves out
        if _render_alike(re.sub(r"set bos = \S+", f"set bos = {bos}", template, count=1), own, tokenizer):
            return None
    lost = _lost_text(template, own, tokenizer)
    return (
        f"model.chat_template: {name} differs from the language model's own template"
        f"{f', which also writes {lost}' if lost else ''}. Training and use both follow {name}, so nothing breaks, but "
        "the language model starts further from what it was trained on. "
        f"{_how_to_keep(name, own, tokenizer)}"
    )


def _how_to_keep(name: str, own: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what to set so that the text of a language model's own template stays, as far as anything does that."""
    try:
        load_template("auto", tokenizer)
    except TemplateError:
        nearest, _ = _nearest(own, tokenizer)
        near = f"{nearest} is nearer to it; " if nearest and nearest != name else ""
        return f"auto cannot follow the model's own template; {near}only a jinja file of your own can keep all of it."
    return "chat_template: auto keeps it."


def render(
    template: str, tokenizer: PreTrainedTokenizerBase, turns: tuple[Turn, ...], prompt: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation and the character spans `[start, end)` of what the assistant says.

    With `prompt`, the text ends where an answer would begin. The template may be one of an exported model.
    """
    texts, spans = render_jinja_template(
        conversations=[[{"role": turn.role, "content": turn.text} for turn in turns]],
        chat_template=show_marks(template),
        return_assistant_tokens_mask=True,
        add_generation_prompt=prompt,
        **tokenizer.special_tokens_map,
    )
    return texts[0], spans[0]


def _assembled(name: str, settings: _Settings) -> str:
    folder = resources.files("llava_train.data").joinpath("templates")
    pieces = [folder.joinpath(file).read_text(encoding="utf-8") for file in ("_common.jinja", f"{name}.jinja")]
    return settings.jinja() + "".join(pieces).rstrip("\n")


def _named_settings(name: str, tokenizer: PreTrainedTokenizerBase) -> _Settings:
    starts_with_image = name == "plain" and tokenizer.bos_token is not None
    return _Settings(_adds_bos(tokenizer) or starts_with_image, _FORMATS[name].default_system)


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id


def _require_tokens(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    chat_format, vocabulary = _FORMATS[name], tokenizer.get_vocab()
    missing = [token for token in chat_format.control_tokens if token not in vocabulary]
    if chat_format.needs_eos and tokenizer.eos_token is None:
        missing.append("an end-of-sequence token")
    if missing:
        raise TemplateError(
            f"{name} needs {', '.join(missing)}, which the tokenizer of the language model lacks; choose the template "
            "that the language model was trained with"
        )


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"cannot read {file}: {error}; {_CHOICE}") from error


def _problems(template: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yields what is wrong with a template and how to mend it. A problem presumes that those before it are mended."""
    try:
        text, spans = render(template, tokenizer, _TRIAL)
        prompts = [render(template, tokenizer, _TRIAL[:number], prompt=True)[0] for number in _ANSWERS]
    except Exception as error:  # jinja passes on whatever the expressions of a template raise
        yield (
            f"cannot render a conversation of system, user and assistant: {type(error).__name__}: {error}; "
            "it must take such turns with texts as content"
        )
        return
    yield from _wrong_marks(text, spans)
    n_images, n_written = _TRIAL_TEXT.count(IMAGE_PLACEHOLDER), text.count(IMAGE_PLACEHOLDER)
    if n_written != n_images:
        yield f"writes {n_written} {IMAGE_PLACEHOLDER} for {n_images}; write the content of a user's turn as it is"
    for (start, _), prompt in zip(spans, prompts, strict=True):
        yield from _wrong_prompt(text, start, prompt, tokenizer)


def _wrong_marks(text: str, spans: list[tuple[int, int]]) -> Iterator[str]:
    if len(spans) != len(_ANSWERS):
        yield (
            f"marks {len(spans)} answers of a conversation that has {len(_ANSWERS)}; write {{% generation %}} before "
            "and {% endgeneration %} after what the assistant says in a turn"
        )
    for number, (start, end) in zip(_ANSWERS, spans, strict=True):
        answer = _TRIAL[number].text
        _, found, end_of_turn = text[start:end].partition(answer)
        if not found:
            yield (
                f"marks {text[start:end]!r} as generated where the answer is {answer!r}; write {{% generation %}} "
                "outside of macros, around the whole answer"
            )
        if not end_of_turn:
            yield "marks no end of an answer as generated; write what ends a turn before {% endgeneration %}"


def _wrong_prompt(text: str, start: int, prompt: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    if text[:start] != prompt:
        yield (
            f"ends a prompt with {prompt[-30:]!r}, but has {text[:start][-30:]!r} before an answer in training; write "
            "with add_generation_prompt just what stands before {% generation %}"
        )
    whole, beginning = (tokenizer(t, add_special_tokens=False).input_ids for t in (text, prompt))
    if whole[: len(beginning)] != beginning:
        yield (
            f"does not fit the tokenizer of the language model, which joins {prompt[-10:]!r} to the answer after it, "
            "so that a prompt has other tokens in use than in training; let a prompt end with a control token, a word "
            "or one new line"
        )


def _same_as_own(tokenizer: PreTrainedTokenizerBase) -> tuple[str, _Settings]:
    """The format of ours that renders what the tokenizer's own template does. Raises TemplateError."""
    own = _own_template(tokenizer)
    if own is None:
        raise TemplateError(
            f"auto finds no chat template in the tokenizer of the language model; {_choice_for(tokenizer)}"
        )
    if "strftime_now" in own:
        raise TemplateError(
            "auto refuses the language model's own chat template, which writes the date of today, so that training "
            f"would change from day to day; {_choice_near(own, tokenizer)}"
        )
    for name in CHAT_TEMPLATES:
        for bos in (False, True):
            settings = _settings_of(own, name, bos, tokenizer)
            if name not in _NEVER_PICKED and _render_alike(_assembled(name, settings), own, tokenizer):
                return name, replace(settings, bos=bos or _adds_bos(tokenizer))
    raise TemplateError(
        f"auto knows no template that renders as the language model's own does; {_choice_near(own, tokenizer)}"
    )


def _choice_for(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return which templates a tokenizer can be used with, in words."""
    return f"name one that fits the tokenizer ({', '.join(_fitting(tokenizer))}), or a jinja file of your own"


def _choice_near(own: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return which template is the nearest to a language model's own and what it loses, in words."""
    name, template = _nearest(own, tokenizer)
    if not name:
        return _choice_for(tokenizer)
    lost = _lost_text(template, own, tokenizer)
    without = f", but leaves out {lost}" if lost else ""
    return f"{name} is the nearest to it{without}; name {name}, or a jinja file of your own"


def _fitting(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the templates of ours that a tokenizer can be used with, by name."""
    found = {}
    for name in _FORMATS:
        with suppress(TemplateError):
            found[name] = load_template(name, tokenizer)
    return found


def _nearest(own: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return name and text of the template that is nearest to `own`; both empty where none is near."""
    shares = {each: _share_of_own(each[1], own, tokenizer) for each in _fitting(tokenizer).items()}
    shares = {each: share for each, share in shares.items() if each[0] not in _NEVER_PICKED and share > _NEAR}
    return max(shares, key=lambda each: shares[each], default=("", ""))


def _share_of_own(ours: str, own: str, tokenizer: PreTrainedTokenizerBase) -> float:
    """Return the share of the words written by `ours` that `own` writes too, in the same order."""
    n_written = n_alike = 0
    for matcher, written, _ in _compared(ours, own, tokenizer):
        n_written += len(written)
        n_alike += sum(block.size for block in matcher.get_matching_blocks())
    return n_alike / max(1, n_written)


def _compared(
    ours: str, own: str, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[SequenceMatcher[str], list[str], list[str]]]:
    """Yields a comparison and the words that both templates write, for each conversation that `own` renders."""
    conversation = tuple(turn for turn in _TRIAL if turn.role != "system")
    for turns, prompt in ((conversation[:1], True), (conversation[:2], False), (conversation, False), (_TRIAL, False)):
        theirs = _render_own(own, tokenizer, turns, prompt)
        if theirs:
            words: list[str] = _WORD.findall(render(ours, tokenizer, turns, prompt)[0])
            own_words: list[str] = _WORD.findall(theirs)
            yield SequenceMatcher(a=words, b=own_words, autojunk=False), words, own_words


def _lost_text(ours: str, own: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what `own` writes and `ours` does not, quoted; empty where they are far from each other."""
    if _share_of_own(ours, own, tokenizer) <= _NEAR:
        return ""
    pieces: list[str] = []
    for matcher, _, own_words in _compared(ours, own, tokenizer):
        for tag, _, _, start, end in matcher.get_opcodes():
            piece = "".join(own_words[start:end])
            if tag != "equal" and piece.strip() and not any(piece in each for each in pieces):
                pieces.append(piece)
    return " and ".join(repr(shortened(piece)) for piece in pieces[:_N_PIECES])


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    own = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own


def _settings_of(own: str, name: str, bos: bool, tokenizer: PreTrainedTokenizerBase) -> _Settings:
    """The settings that a format of ours has in `own`, if `own` is of that format (which is not checked)."""
    ours, question = _assembled(name, _Settings(bos)), Turn("user", "Is it?")
    with_system = Turn("system", _SYSTEM_MARKER), question
    before, _, after = render(ours, tokenizer, with_system, prompt=True)[0].partition(_SYSTEM_MARKER)
    before_own, found, _ = _render_own(own, tokenizer, with_system, prompt=True).partition(_SYSTEM_MARKER)
    prefix = before_own.removeprefix(before) if found else ""
    without_system = _render_own(own, tokenizer, (question,), prompt=True)
    if without_system == render(ours, tokenizer, (question,), prompt=True)[0]:
        return _Settings(bos, None, prefix)
    return _Settings(bos, without_system.removeprefix(before + prefix).removesuffix(after), prefix)


def _render_alike(ours: str, own: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether both templates write the same text, with and without prompt.

    The system turn is compared in a first prompt, and only where `own` writes it: Gemma 2 refuses one, and Mistral v0.3
    moves it to the newest question.
    """
    conversation = tuple(turn for turn in _TRIAL if turn.role != "system")
    with_system = Turn("system", _SYSTEM_MARKER), conversation[0]
    tried = [(conversation[:n], n % 2 == 1) for n in range(1, len(conversation) + 1)]
    if _SYSTEM_MARKER in _render_own(own, tokenizer, with_system, prompt=True):
        tried.append((with_system, True))
    return all(
        render(ours, tokenizer, turns, prompt)[0] == _render_own(own, tokenizer, turns, prompt)
        for turns, prompt in tried
    )


def _render_own(own: str, tokenizer: PreTrainedTokenizerBase, turns: tuple[Turn, ...], prompt: bool) -> str:
    """The text that a template without marks writes; empty when it refuses the conversation."""
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    try:
        text = tokenizer.apply_chat_template(messages, chat_template=own, add_generation_prompt=prompt, tokenize=False)
    except Exception:  # jinja passes on whatever the expressions of a template raise
        return ""
    return str(text)


def _quoted(text: str) -> str:
    """A text as a literal of jinja, whose escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False)
