"""The demo page: a picture on the left, a conversation about it on the right.

A conversation lives in the visitor's session on the server; what the browser shows of it is never read back. Another
picture begins another conversation, for of one picture is what LLaVA models are mostly trained on. Stopping and leaving
close the generator of an answer, which ends its computation. Nothing is fetched from elsewhere, neither by the page
(system fonts, answers as plain text) nor by the server (a picture is an upload, never an address).
"""

from __future__ import annotations

import html
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
from gradio_client.utils import is_http_url_like
from PIL import Image

from llava_train.data.images import decoded, open_image
from llava_train.data.pictures import EmbeddedPicture
from llava_train.data.samples import IMAGE_PLACEHOLDER, Turn
from llava_train.errors import UserError
from llava_train.model.weights import ADAPTER_FOLDER, RESULT_FOLDER
from llava_train.use.examples import Example
from llava_train.use.generation import Sampling
from llava_train.use.llava import LLaVA, Question

_PREVIEW_SIDE = 1024
"""Pixels of the longer side of what the page shows of a picture."""

_MAX_WAITING = 20
"""Questions that wait for their turn; further ones are asked to come back."""

_KEPT_S = 24 * 60 * 60
"""How long an upload and a conversation are kept while the page is open."""

_CSS = """
#page { max-width: 1120px; margin: 0 auto }
#chat .icon-button-wrapper { display: none }  /* it would empty what is shown, not the conversation */
"""

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Limits:
    """What may be uploaded."""

    upload_mb: float = 10
    megapixels: float = 25


@dataclass(frozen=True)
class Conversation:
    """What a visitor has said and heard, about a picture or none."""

    picture: Path | Image.Image | None = None
    turns: tuple[Turn, ...] = ()

    def asking(self, text: str) -> Question:
        """The conversation with another question at its end."""
        first, *rest = (*self.turns, Turn("user", text))
        if self.picture is None:
            return Question((first, *rest))
        return Question((Turn("user", f"{IMAGE_PLACEHOLDER}\n{first.text}"), *rest), (self.picture,))

    def messages(self, asked: str | None = None) -> Messages:
        """As gradio shows them, which takes text for HTML; `asked` waits for its answer."""
        turns = self.turns if asked is None else (*self.turns, Turn("user", asked))
        return [{"role": turn.role, "content": html.escape(turn.text, quote=False)} for turn in turns]


def preview(picture: Path | Image.Image, limits: Limits) -> Image.Image:
    """A picture as the model sees it, shrunk for the page. Raises UserError."""
    if isinstance(picture, Path):
        file = EmbeddedPicture(picture.read_bytes(), picture.name)  # to be called by its name, not by where it lies
        with open_image(file) as image:
            n_megapixels = image.width * image.height / 1e6
            if n_megapixels > limits.megapixels:
                raise UserError(f"{file}: {n_megapixels:.0f} megapixels; up to {limits.megapixels:g} are taken")
            picture = decoded(image, file)
    shown = picture.copy()
    shown.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
    return shown


@dataclass(frozen=True)
class Answers:
    """What the page does when something happens on it."""

    llava: LLaVA
    examples: Sequence[Example]
    limits: Limits

    def upload(self, file: dict[str, Any], now: Conversation) -> tuple[Any, ...]:
        """Another picture, and so another conversation. A wrong file changes nothing."""
        path = Path(file["path"])
        try:
            return preview(path, self.limits), Conversation(path), []
        except (UserError, OSError) as error:
            _say(error)
            return None if now.picture is None else preview(now.picture, self.limits), gr.skip(), gr.skip()

    def empty(self, file: dict[str, Any] | None, now: Conversation) -> tuple[Any, ...]:
        """The box was emptied, by the visitor, or by the browser when a file was too large for it."""
        return (Conversation(), []) if file is None and now.picture else (gr.skip(), gr.skip())

    def try_example(self, number: int) -> tuple[Any, ...]:
        example = self.examples[number]
        return example.picture, Conversation(example.picture), [], example.question

    def ask(
        self, text: str, now: Conversation, temperature: float, max_new_tokens: int
    ) -> Iterator[tuple[Messages, Conversation, Any]]:
        """The conversation, grown by each piece of the answer; an answer that is stopped stays as far as it came."""
        text = text.strip()
        if not text:
            return
        sampling = Sampling(temperature=temperature, max_new_tokens=max_new_tokens)
        try:
            if IMAGE_PLACEHOLDER in text:
                raise UserError(f"leave {IMAGE_PLACEHOLDER} out of the question: the picture stands before it")
            yield now.messages(text), now, ""
            heard = ""
            for piece in self.llava.stream(now.asking(text), sampling=sampling):
                heard += piece
                grown = replace(now, turns=(*now.turns, Turn("user", text), Turn("assistant", heard)))
                yield grown.messages(), grown, gr.skip()
        except (UserError, OSError) as error:
            _say(error)
            yield now.messages(), now, text


def _say(error: Exception) -> None:
    gr.Warning(html.escape(str(error), quote=False))


@dataclass(frozen=True)
class _Parts:
    """What the visitor can touch."""

    picture: gr.Image
    examples: gr.Dataset
    chat: gr.Chatbot
    question: gr.Textbox
    ask: gr.Button
    stop: gr.Button
    clear: gr.Button
    temperature: gr.Slider
    max_new_tokens: gr.Slider


def build_demo(llava: LLaVA, examples: Sequence[Example], limits: Limits) -> gr.Blocks:
    """The page. Only `serve` limits the bytes of an upload."""
    name = shown_name(llava.name)
    with gr.Blocks(title=f"{name} - llava_train", analytics_enabled=False, delete_cache=(3600, _KEPT_S)) as page:
        with gr.Column(elem_id="page"):
            gr.Markdown(f"## Ask about a picture\n{name}")
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    picture, tried = _left(examples, limits)
                with gr.Column(scale=3, min_width=300):
                    parts = _Parts(picture, tried, *_right())
        _connect(parts, Answers(llava, examples, limits))
    return page


def shown_name(name: str) -> str:
    """What visitors call a model: the run's name for a folder, never where it lies."""
    path = Path(name)
    if not path.exists():
        return name
    path = path.resolve()
    return path.parent.name if path.name in (RESULT_FOLDER, ADAPTER_FOLDER) else path.name


def _left(examples: Sequence[Example], limits: Limits) -> tuple[gr.Image, gr.Dataset]:
    picture = _uploads_only(gr.Image(label="Picture", sources=["upload", "clipboard"], buttons=[], height=320))
    gr.Markdown(f"Up to {limits.upload_mb:g} MB and {limits.megapixels:g} megapixels.")
    samples = [[example.picture] for example in examples]
    shown = [gr.Image(render=False)]
    return picture, gr.Dataset(label="Examples", components=shown, samples=samples, type="index", layout="gallery")


def _uploads_only(box: gr.Image) -> gr.Image:
    """Refuses addresses: in place of an upload, a client could name one that gradio downloads, of any size.

    (Not in a subclass: beside the module of a class of components gradio writes a .pyi file.)
    """
    read = box.async_move_resource_to_block_cache

    async def read_upload(url_or_file_path: str | Path | None) -> str | None:
        if is_http_url_like(str(url_or_file_path)):
            raise gr.Error("a picture is uploaded, not named by its address")
        return await read(url_or_file_path)

    box.async_move_resource_to_block_cache = read_upload  # type: ignore[method-assign]
    return box


def _right() -> tuple[Any, ...]:
    chat = gr.Chatbot(
        show_label=False,
        height=430,
        render_markdown=False,  # as markdown, an answer could make the browser load an address
        feedback_options=None,
        buttons=[],
        elem_id="chat",
        placeholder="Drop a picture, then ask about it.",
    )
    with gr.Row():
        question = gr.Textbox(placeholder="Your question", show_label=False, container=False, scale=6, max_lines=6)
        ask = gr.Button("Ask", variant="primary", elem_id="ask", scale=1, min_width=80)
        stop = gr.Button("Stop", variant="stop", visible=False, scale=1, min_width=80)
        clear = gr.Button("Clear", scale=1, min_width=80)
    with gr.Accordion("Settings", open=False):
        temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature", info="0 takes the likeliest word each time")
        max_new_tokens = gr.Slider(16, 2048, 512, step=16, precision=0, label="Longest answer, in tokens")
    return chat, question, ask, stop, clear, temperature, max_new_tokens


def _connect(parts: _Parts, answers: Answers) -> None:
    """What calls what."""
    conversation = gr.State(Conversation(), time_to_live=_KEPT_S)
    begun = [conversation, parts.chat]
    quiet: Any = {"api_visibility": "private", "show_progress": "hidden"}
    at_once: Any = {"queue": False, **quiet}
    # Enter is the button, so that nothing is asked while it is hidden or waits for a picture.
    parts.question.submit(None, js="() => document.querySelector('#ask:enabled')?.click()", **quiet)

    buttons = [parts.ask, parts.stop]
    parts.ask.click(lambda: [gr.Button(visible=False), gr.Button(visible=True)], None, buttons, **at_once)
    asked = [parts.question, conversation, parts.temperature, parts.max_new_tokens]
    answered = [*reversed(begun), parts.question]
    asking = parts.ask.click(answers.ask, asked, answered, concurrency_limit=1, trigger_mode="multiple", **quiet)
    asking.then(lambda: [gr.Button(visible=True), gr.Button(visible=False)], None, buttons, **at_once)
    ends = [parts.stop.click, parts.clear.click, parts.picture.upload, parts.picture.clear, parts.examples.click]
    gr.on(ends, None, cancels=[asking], **at_once)

    # As it was uploaded: gradio's own preprocessing opens a picture in any format that Pillow knows.
    uploaded: Any = {"inputs": [parts.picture, conversation], "preprocess": False, **quiet}
    parts.picture.upload(lambda: gr.Button(interactive=False), None, parts.ask, **at_once)
    looked_at = parts.picture.upload(answers.upload, outputs=[parts.picture, *begun], **uploaded)
    looked_at.then(lambda: gr.Button(interactive=True), None, parts.ask, **at_once)
    parts.picture.change(answers.empty, outputs=begun, **uploaded)
    parts.clear.click(lambda now: (replace(now, turns=()), []), conversation, begun, **quiet)
    parts.examples.click(answers.try_example, parts.examples, [parts.picture, *begun, parts.question], **quiet)


def check_address(host: str, port: int) -> None:
    """Raises UserError when nothing can listen there. Worth knowing before a model is loaded."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, port))
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port} ({error.strerror}); name another --host or --port") from None


def serve(llava: LLaVA, examples: Sequence[Example], limits: Limits, host: str, port: int) -> None:
    """Shows the page until Ctrl-C or SIGTERM. Uploads are deleted then."""
    with tempfile.TemporaryDirectory(prefix="llava-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # gradio takes it from nowhere else
        page = build_demo(llava, examples, limits)
        # gradio's own launch: pages mounted into another app do not refuse paths that nobody uploaded (gradio 6.31).
        page.queue(max_size=_MAX_WAITING, api_open=False).launch(
            server_name=host,
            server_port=port,
            max_file_size=int(limits.upload_mb * 2**20),
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css=_CSS,
            footer_links=[],
            share=False,
            ssr_mode=False,
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            quiet=True,
            prevent_thread_lock=True,
        )
        print(f"{shown_name(llava.name)} answers at http://{host}:{port}; Ctrl-C ends it", flush=True)
        if host not in ("127.0.0.1", "localhost", "::1"):
            print(f"warning: everyone who can reach {host}:{port} can ask and upload", file=sys.stderr, flush=True)
        wait_for_end()
        page.close(verbose=False)


def wait_for_end() -> None:
    """Returns after Ctrl-C or SIGTERM."""
    with suppress(KeyboardInterrupt):
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        threading.Event().wait()
