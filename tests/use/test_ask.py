from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from llava_train import LLaVA
from llava_train.cli import app
from llava_train.data.samples import Turn
from llava_train.files import write_manifest
from llava_train.use.llava import Question
from llava_train.use.terminal_chat import TerminalChat
from tests.tiny import encoder_of, model_section, tiny_llava
from tests.use.exports import export_tiny

QUESTION = "What is it?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model in `model`; a picture, a broken one and a folder without a model beside it."""
    folder = tmp_path_factory.mktemp("ask")
    (folder / "pictures").mkdir()
    export_tiny(folder / "model")
    write_manifest(folder / "model", name="ask")
    Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.mark.parametrize("below", ["", "model"])
def test_the_answer_is_what_the_model_says_most_likely_token_by_token(folder: Path, below: str) -> None:
    done = CliRunner().invoke(
        app, ["ask", str(folder / below), str(folder / "red.png"), QUESTION, "--max-new-tokens", "128"]
    )
    assert done.exit_code == 0, done.output

    llava = tiny_llava(model_section(chat_template="chatml"))
    llava.model.model.language_model.set_attn_implementation("sdpa")
    encoder = encoder_of(llava)
    prompt, _ = encoder.render((Turn("user", f"<image>\n{QUESTION}"),), prompt=True)
    inputs = llava.processor(text=prompt, images=Image.new("RGB", (40, 30), "red"), return_tensors="pt")
    input_ids = inputs.input_ids
    for _ in range(128):
        with torch.no_grad():
            logits = llava.model(input_ids=input_ids, pixel_values=inputs.pixel_values).logits[0, -1]
        input_ids = torch.cat([input_ids, logits.argmax()[None, None]], dim=1)
        if input_ids[0, -1] == encoder.end_of_turn_id():
            break
    answer = llava.tokenizer.decode(input_ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert done.stdout.strip() == answer.strip() != ""


@pytest.mark.parametrize(
    ("model", "image", "question", "message"),
    [
        ("pictures", "red.png", QUESTION, "pictures is empty; name a run"),
        ("model", "blue.png", QUESTION, "blue.png: the image file is missing"),
        ("model", "broken.png", QUESTION, "broken.png: not a readable image"),
        ("model", "red.png", "<image><image>What?", "2 <image> placeholders, but 1 images"),
    ],
)
def test_what_cannot_be_asked_is_refused(folder: Path, model: str, image: str, question: str, message: str) -> None:
    done = CliRunner().invoke(app, ["ask", str(folder / model), str(folder / image), question])
    assert done.exit_code == 2
    assert message in str(done.output)


def test_a_conversation_in_the_terminal(folder: Path) -> None:
    lines = [
        "",
        "/what",
        "/image nowhere.png",
        f"/image {folder / 'red.png'}",
        QUESTION,
        "And?",
        "/reset",
        "Hi",
        "/quit",
    ]
    done = CliRunner().invoke(
        app, ["chat", str(folder / "model"), "--max-new-tokens", "6"], input="\n".join(lines), catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    assert "error: /what is not known" in done.output
    assert "error: nowhere.png: the image file is missing" in done.output
    llava = LLaVA.from_pretrained(folder / "model")
    chat, anew = llava.chat(), llava.chat()
    answers = [chat.ask(QUESTION, folder / "red.png", max_new_tokens=6), chat.ask("And?", max_new_tokens=6)]
    answers.append(anew.ask("Hi", max_new_tokens=6))
    position = 0
    for answer in answers:
        position = done.output.index(answer, position) + len(answer)


def test_ctrl_c_stops_an_answer_and_not_the_conversation(folder: Path) -> None:
    said: list[str] = []
    lines = iter(["Hi", "/quit"])

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 2:
            raise KeyboardInterrupt

    TerminalChat(LLaVA.from_pretrained(folder / "model"), lambda _: next(lines), say).run()
    assert said[2:] == ["\n(stopped)\n"]


def test_a_picture_is_shown_again_when_nothing_of_its_answer_was_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llava, n_shown = LLaVA.from_pretrained(folder / "model"), list[int]()
    stream = llava.stream

    def interrupted_at_first(question: Question, **more: Any) -> Iterator[str]:
        n_shown.append(len(question.images))
        if len(n_shown) == 1:
            raise KeyboardInterrupt
        yield from stream(question, **more)

    monkeypatch.setattr(llava, "stream", interrupted_at_first)
    lines = iter([f"/image {folder / 'red.png'}", QUESTION, QUESTION, "And?", "/quit"])
    TerminalChat(llava, lambda _: next(lines), lambda _: None, settings={"max_new_tokens": 4}).run()
    assert n_shown == [1, 1, 1]
