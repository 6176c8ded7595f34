"""The demo page: a picture on the left, a conversation about it on the right.

Nothing is fetched from elsewhere, neither by the page (system fonts, texts shown as they are) nor by the server (a
picture is an upload, never an address).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from llava_train.errors import UserError
from llava_train.model.weights import ADAPTER_FOLDER, RESULT_FOLDER
from llava_train.use.demo_intake import Page, RequestLimit
from llava_train.use.demo_visits import Answers, Limits, Visit, thumbnail
from llava_train.use.examples import Example
from llava_train.use.llava import LLaVA

_MAX_WAITING = 20
"""Questions that wait for their turn; further ones are asked to come back."""

_UPLOADS_KEPT_S = 24 * 60 * 60
"""How long an upload is kept."""

_MAX_SESSIONS = 1000
"""Visits that are kept, each some 70 kB in gradio; the one that was idle longest is forgotten for another."""

_CSS = """
#page { max-width: 1120px; margin: 0 auto }
#chat .icon-button-wrapper { display: none }  /* it would empty what is shown, not the conversation */
"""


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
    """The page. Only `serve` limits the bytes of a request."""
    name = shown_name(llava.name)
    with Page(title=name, analytics_enabled=False, delete_cache=(3600, _UPLOADS_KEPT_S)) as page:
        with gr.Column(elem_id="page"):
            gr.Markdown(f"## Ask about a picture\n{name}")
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    picture, tried = _left(examples, limits)
                with gr.Column(scale=3, min_width=300):
                    parts = _Parts(picture, tried, *_right())
        _connect(parts, Answers(llava, examples, limits, Path(picture.GRADIO_CACHE)))
    return page


def shown_name(name: str) -> str:
    """What visitors call a model: the run's name for a folder, never where it lies."""
    path = Path(name)
    if not path.exists():
        return name
    path = path.resolve()
    return path.parent.name if path.name in (RESULT_FOLDER, ADAPTER_FOLDER) else path.name


def _left(examples: Sequence[Example], limits: Limits) -> tuple[gr.Image, gr.Dataset]:
    picture = gr.Image(label="Picture", sources=["upload", "clipboard"], buttons=[], elem_id="picture", height=320)
    gr.Markdown(f"Up to {limits.upload_mb:g} MB and {limits.megapixels:g} megapixels.")
    samples = [[thumbnail(example.picture)] for example in examples]
    shown = [gr.Image(render=False)]
    return picture, gr.Dataset(label="Examples", components=shown, samples=samples, type="index", layout="gallery")


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
        question = gr.Textbox(
            placeholder="Your question", show_label=False, container=False, scale=6, max_lines=6, min_width=120
        )
        ask = gr.Button("Ask", variant="primary", elem_id="ask", scale=1, min_width=64)
        stop = gr.Button("Stop", variant="stop", visible=False, scale=1, min_width=64)
        clear = gr.Button("Clear", scale=1, min_width=64)
    with gr.Accordion("Settings", open=False):
        temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature", info="0 takes the likeliest word each time")
        max_new_tokens = gr.Slider(16, 2048, 512, step=16, precision=0, label="Longest answer, in tokens")
    return chat, question, ask, stop, clear, temperature, max_new_tokens


def _connect(parts: _Parts, answers: Answers) -> None:
    """What calls what."""
    visit = gr.State(Visit())
    quiet: Any = {"api_visibility": "private", "show_progress": "hidden"}
    at_once: Any = {"queue": False, **quiet}
    # Enter is the button, so that nothing is asked while it is hidden or waits for a picture.
    parts.question.submit(None, js="() => document.querySelector('#ask:enabled')?.click()", **quiet)

    buttons = [parts.ask, parts.stop]
    parts.ask.click(lambda: [gr.Button(visible=False), gr.Button(visible=True)], None, buttons, **at_once)
    asked, answered = [parts.question, visit, parts.temperature, parts.max_new_tokens], [parts.chat, parts.question]
    asking = parts.ask.click(answers.ask, asked, answered, concurrency_limit=1, trigger_mode="multiple", **quiet)
    asking.then(lambda: [gr.Button(visible=True), gr.Button(visible=False)], None, buttons, **at_once)
    ends = [parts.stop.click, parts.clear.click, parts.picture.upload, parts.picture.clear, parts.examples.click]
    gr.on(ends, None, cancels=[asking], **at_once)

    # As it was uploaded: gradio's own preprocessing opens a picture in any format that Pillow knows.
    uploaded: Any = {"inputs": [parts.picture, visit], "preprocess": False, **quiet}
    parts.picture.upload(lambda: gr.Button(interactive=False), None, parts.ask, **at_once)
    looked_at = parts.picture.upload(answers.upload, outputs=[parts.picture, parts.chat], **uploaded)
    looked_at.then(lambda: gr.Button(interactive=True), None, parts.ask, **at_once)
    parts.picture.change(answers.empty, outputs=parts.chat, **uploaded)
    parts.clear.click(answers.clear, visit, parts.chat, **quiet)
    shown = [parts.picture, parts.chat, parts.question]
    parts.examples.click(answers.try_example, [parts.examples, visit], shown, **quiet)


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
        upload_bytes = int(limits.upload_mb * 2**20)
        # gradio's own launch: pages mounted into another app do not refuse paths that nobody uploaded (gradio 6.31).
        page.queue(max_size=_MAX_WAITING, api_open=False).launch(
            server_name=host,
            server_port=port,
            max_file_size=upload_bytes,
            app_kwargs={"middleware": [Middleware(RequestLimit, upload_bytes=upload_bytes)]},
            state_session_capacity=_MAX_SESSIONS,
            theme=gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
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
