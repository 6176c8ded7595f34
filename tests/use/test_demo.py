"""The demo page, in Chromium and past it."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from llava_train.cli import app
from llava_train.data.samples import Turn
from llava_train.errors import UserError
from llava_train.model.weights import export_model
from llava_train.use.examples import Example, examples_for
from llava_train.use.llava import LLaVA, Question
from tests import tiny
from tests.train.helpers import TIMEOUT_S, environment, free_port

httpx = pytest.importorskip("httpx")
client = httpx.Client(timeout=TIMEOUT_S)
gradio = pytest.importorskip("gradio")

from llava_train.use import demo  # noqa: E402
from llava_train.use.demo_intake import uploaded_file  # noqa: E402
from llava_train.use.demo_visits import Answers, Conversation, Visit  # noqa: E402

QUESTION, LONGEST = "What is it?", 256
NO_PICTURE = "(no picture: the model saw only your question)"
SEEN = """() => {
    window.seen = []
    const look = () => {
        const answers = document.querySelectorAll('[data-testid="bot"]')
        if (answers.length) window.seen.push(answers[answers.length - 1].innerText)
    }
    new MutationObserver(look).observe(document.body, {subtree: true, childList: true, characterData: true})
}"""
"""Keeps what the last answer on the page looked like, whenever the page changes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a model, and files to upload."""
    folder = tmp_path_factory.mktemp("demo")
    llava = tiny.tiny_llava(tiny.model_section(chat_template="chatml"))
    export_model(llava.model, llava.processor, tiny.encoder_of(llava).end_of_turn_id(), folder / "shapes/model")
    rng = random.Random(0)
    noise = Image.frombytes("RGB", (60, 40), rng.randbytes(60 * 40 * 3))
    Image.new("RGB", (60, 40), "red").save(folder / "picture.png")
    noise.save(folder / "animated.gif")
    noise.save(whole := io.BytesIO(), "JPEG")
    (folder / "truncated.jpg").write_bytes(whole.getvalue()[:-400])
    (folder / "text.png").write_text("no picture")
    Image.new("1", (3000, 1000)).save(folder / "large.png")
    (folder / "heavy.png").write_bytes(rng.randbytes(1_200_000))
    return folder


@pytest.fixture(scope="module")
def llava(folder: Path) -> LLaVA:
    return LLaVA.from_pretrained(folder / "shapes/model")


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[str]:
    """The address of `llava-train demo`."""
    port = free_port()
    limits = ["--max-upload-mb", "1", "--max-megapixels", "2", "--port", str(port)]
    command = [
        sys.executable,
        "-c",
        "from llava_train.cli import app; app()",
        "demo",
        str(folder / "shapes/model"),
        *limits,
    ]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = next((line for line in process.stdout if "answers at" in line), "")
            assert line == f"shapes answers at http://127.0.0.1:{port}; Ctrl-C ends it\n"
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
        assert process.wait(timeout=TIMEOUT_S) == 0


@pytest.fixture
def page(chromium: Any, served: str) -> Iterator[Any]:
    """The page, opened; it may talk to its own server only."""
    page, asked = chromium.new_page(viewport={"width": 1280, "height": 800}), []
    page.on("request", lambda request: asked.append(request.url))
    page.set_default_timeout(1000 * TIMEOUT_S)
    page.goto(served)
    page.get_by_role("button", name="Ask").wait_for()
    page.evaluate(SEEN)
    yield page
    page.close()
    assert [url for url in asked if not url.startswith((served, "data:", "blob:"))] == []


def upload(page: Any, file: Path) -> None:
    page.locator('input[type="file"]').first.set_input_files(file)


def show(page: Any, file: Path) -> None:
    """Uploads a picture and waits until the server has looked at it."""
    upload(page, file)
    page.locator('#picture img[src$=".webp"]').wait_for()


def ask(page: Any, text: str) -> None:
    page.get_by_placeholder("Your question").fill(text)
    page.get_by_role("button", name="Ask").click()


def set_longest(page: Any, n_tokens: int) -> None:
    page.get_by_role("button", name="Settings").click()
    field = page.get_by_label("number input for Longest answer, in tokens")
    field.fill(str(n_tokens))
    field.press("Tab")


def wait_for_answers(page: Any, n_answers: int) -> str:
    """The last answer, when it is whole."""
    page.wait_for_function(f"document.querySelectorAll('[data-testid=\"bot\"]').length == {n_answers}")
    page.get_by_role("button", name="Ask").wait_for()
    return str(page.locator('[data-testid="bot"]').last.inner_text())


def handler(served: str, event: str, n_inputs: int) -> int:
    """The number under which a client calls what an event calls."""
    for each in client.get(f"{served}/config").json()["dependencies"]:
        if [name for _, name in each["targets"]] == [event] and len(each["inputs"]) == n_inputs:
            return int(each["id"])
    raise AssertionError(f"no {event} with {n_inputs} inputs")


def post(served: str, number: int, data: list[Any]) -> tuple[list[str], Any]:
    """What the server says to a visitor who sends `data`, and what the page is to show; None where it failed."""
    session = uuid.uuid4().hex
    body = json.dumps({"data": data, "fn_index": number, "session_hash": session})  # NaN too, which httpx refuses
    sent = {"headers": {"content-type": "application/json"}, "content": body}
    client.post(f"{served}/gradio_api/queue/join", **sent).raise_for_status()
    said = list[str]()
    with client.stream("GET", f"{served}/gradio_api/queue/data?session_hash={session}") as events:
        for message in (json.loads(line[6:]) for line in events.iter_lines() if line.startswith("data: ")):
            if message["msg"] == "log":
                said.append(message["log"])
            if message["msg"] == "process_completed":
                output = message["output"]
                return [*said, *filter(None, [output.get("error")])], output.get("data")
            assert message["msg"] != "unexpected_error", message
    raise AssertionError("no answer")


def bare(text: str) -> str:
    """Without what HTML shows otherwise: white space and control characters."""
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f]", "", text)


@pytest.mark.browser
def test_an_answer_streams_in_and_is_the_models_own(page: Any, folder: Path, llava: LLaVA, tmp_path: Path) -> None:
    show(page, folder / "picture.png")
    set_longest(page, LONGEST)
    ask(page, QUESTION)
    first = wait_for_answers(page, 1)
    looks = [bare(text) for text in dict.fromkeys(page.evaluate("window.seen"))]
    ask(page, "Why?")
    second = wait_for_answers(page, 2)
    page.screenshot(path=tmp_path / "demo.png")

    turns, picture = (Turn("user", f"<image>\n{QUESTION}"),), (folder / "picture.png",)
    (expected,) = llava.generate([Question(turns, picture)], max_new_tokens=LONGEST)
    assert bare(first) == bare(expected) != ""
    growing = [text for text in looks if text and bare(expected).startswith(text)]
    assert len(growing) > 1 and growing == sorted(growing, key=len)
    turns = (*turns, Turn("assistant", expected), Turn("user", "Why?"))
    (expected,) = llava.generate([Question(turns, picture)], max_new_tokens=LONGEST)
    assert bare(second) == bare(expected)


@pytest.mark.browser
def test_stop_ends_the_answer_and_keeps_what_there_is(page: Any, llava: LLaVA) -> None:
    set_longest(page, 2048)
    ask(page, QUESTION)
    page.wait_for_function("window.seen.some((text) => text.trim())")  # more than gradio's dots
    page.get_by_role("button", name="Stop").click()
    stopped = wait_for_answers(page, 1).removeprefix(NO_PICTURE)
    (whole,) = llava.generate([(None, QUESTION)], max_new_tokens=2048)
    assert bare(whole).startswith(bare(stopped))
    assert 0 < len(bare(stopped)) < len(bare(whole))
    page.get_by_label("number input for Longest answer, in tokens").fill("16")
    ask(page, "And now?")
    assert wait_for_answers(page, 2)


@pytest.mark.browser
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text.png", "text.png: not a readable image: none of JPEG, PNG"),
        ("truncated.jpg", "truncated.jpg: not a readable image"),
        ("large.png", "large.png: 3 megapixels; up to 2 are taken"),
        ("heavy.png", "exceed the maximum allowed size of 1.0 Mb"),
    ],
)
def test_a_wrong_file_is_refused_in_words(page: Any, folder: Path, name: str, message: str) -> None:
    upload(page, folder / name)
    page.get_by_text(message).wait_for()
    assert message in page.inner_text("body")
    set_longest(page, 16)
    ask(page, QUESTION)
    assert NO_PICTURE in wait_for_answers(page, 1), "an answer after a failed upload is about no picture"
    show(page, folder / "animated.gif")


@pytest.mark.browser
def test_each_answer_without_a_picture_says_so_and_is_the_models_own(page: Any, folder: Path, llava: LLaVA) -> None:
    ask(page, QUESTION)
    first = wait_for_answers(page, 1)
    ask(page, "Why?")
    second = wait_for_answers(page, 2)
    (expected,) = llava.generate([(None, QUESTION)], max_new_tokens=512)
    assert bare(first) == bare(NO_PICTURE + expected)
    turns = (Turn("user", QUESTION), Turn("assistant", expected), Turn("user", "Why?"))
    (expected,) = llava.generate([Question(turns)], max_new_tokens=512)
    assert bare(second) == bare(NO_PICTURE + expected), "the model does not read the note"
    show(page, folder / "picture.png")
    ask(page, QUESTION)
    assert NO_PICTURE not in wait_for_answers(page, 1)


@pytest.mark.browser
def test_after_a_picture_is_taken_away_an_answer_says_that_there_is_none(page: Any, folder: Path) -> None:
    show(page, folder / "picture.png")
    page.get_by_label("Remove Image").click()
    page.locator('#picture img[src$=".webp"]').wait_for(state="detached")
    set_longest(page, 16)
    ask(page, QUESTION)
    assert NO_PICTURE in wait_for_answers(page, 1)


@pytest.mark.parametrize("shape", [(600, 40), (40, 600), (60, 40), (3, 3), (1, 900)])
def test_thumbnails_of_examples_have_one_size_and_show_the_middle(shape: tuple[int, int]) -> None:
    picture = Image.new("RGB", shape, "red")
    middle = [(side - side // 3) // 2 for side in shape]
    picture.paste(
        (0, 0, 255), (*middle, *(start + max(1, side // 3) for start, side in zip(middle, shape, strict=True)))
    )
    small = demo.thumbnail(picture)
    assert small.size == (160, 160)
    assert small.getpixel((80, 80)) == (0, 0, 255)


@pytest.mark.browser
def test_every_example_is_shown_in_a_square_of_one_size(chromium: Any, folder: Path, llava: LLaVA) -> None:
    strip = Image.new("RGB", (600, 40), "red")
    shown = [Example(strip, "A?"), Example(strip.transpose(Image.Transpose.ROTATE_90), "B?"), *examples_for("no run")]
    app = demo.build_demo(llava, shown, demo.Limits())
    port = free_port()
    app.launch(server_port=port, prevent_thread_lock=True, quiet=True, css=demo._CSS, footer_links=[])
    try:
        page = chromium.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(1000 * TIMEOUT_S)
        page.goto(f"http://127.0.0.1:{port}")
        page.locator("button.gallery-item img").nth(4).wait_for()
        boxes = [image.bounding_box() for image in page.locator("button.gallery-item img").all()]
        page.close()
    finally:
        app.close(verbose=False)
    sizes = [(box["width"], box["height"]) for box in boxes]
    assert len(sizes) == 5 and len(set(sizes)) == 1
    assert sizes[0][0] == sizes[0][1] >= 60


@pytest.mark.browser
@pytest.mark.parametrize("text", ["<image> What?", "What?<|im_end|>"])
def test_a_question_with_markup_is_refused_in_words_and_given_back(page: Any, text: str) -> None:
    ask(page, text)
    page.get_by_test_id("toast-body").wait_for()
    assert page.get_by_placeholder("Your question").input_value() == text


@pytest.mark.browser
def test_texts_are_shown_as_they_are(page: Any) -> None:
    """As HTML or markdown, a text could make the browser load an address; the fixture sees what it loads."""
    text = "<img src='http://example.com/a.png'> ![b](http://example.com/b.png) & <b>"
    set_longest(page, 16)
    ask(page, text)
    wait_for_answers(page, 1)
    assert page.locator('[data-testid="user"]').inner_text().strip() == text


@pytest.mark.browser
def test_an_example_fills_in_its_question(page: Any) -> None:
    page.locator("button.gallery-item").first.click()
    page.wait_for_function("document.querySelector('textarea').value")
    assert page.get_by_placeholder("Your question").input_value() == "What shape is the object?"


def test_the_server_takes_no_larger_file(served: str, folder: Path) -> None:
    content = (folder / "heavy.png").read_bytes()
    answer = client.post(f"{served}/gradio_api/upload", files={"files": ("a.png", content)})
    assert answer.status_code == 413


def test_the_server_reads_no_larger_request(served: str) -> None:
    """gradio keeps what a session sent last, so that large questions would fill the memory."""
    question = {"data": ["a" * 300_000, None, 0, 16], "fn_index": handler(served, "click", 4), "session_hash": "large"}
    chunks = (chunk for chunk in [json.dumps(question).encode()])  # of unsaid length
    join = f"{served}/gradio_api/queue/join"
    sent = {"headers": {"content-type": "application/json"}}
    assert client.post(join, json=question).status_code == client.post(join, content=chunks, **sent).status_code == 413
    uploads = [("files", (f"{number}.png", bytes(900_000))) for number in range(3)]
    assert client.post(f"{served}/gradio_api/upload", files=uploads).status_code == 413


MARKS: list[dict[str, Any]] = [{}, {"meta": {"_type": "gradio.FileData"}}, {"meta": {"_type": "something"}}]
"""gradio checks files that are marked as its own, and no others."""


@pytest.mark.parametrize("mark", MARKS)
def test_an_upload_is_read(served: str, folder: Path, mark: dict[str, Any]) -> None:
    content = (folder / "picture.png").read_bytes()
    (path,) = client.post(f"{served}/gradio_api/upload", files={"files": ("a.png", content)}).json()
    _, (shown, _) = post(served, handler(served, "upload", 2), [{"path": path, **mark}, None])
    assert Image.open(io.BytesIO(client.get(shown["url"]).content)).size == (60, 40)


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("path", ["picture.png", "pipe", "", ".", "upload/../../picture.png", "link", "\0", "\ud800"])
def test_only_uploads_are_read(served: str, folder: Path, path: str, mark: dict[str, Any]) -> None:
    """What a browser would not send: another file of this machine in place of the upload."""
    if path == "pipe" and not (folder / path).exists():
        os.mkfifo(folder / path)
    content = (folder / "picture.png").read_bytes()
    (known,) = client.post(f"{served}/gradio_api/upload", files={"files": ("a.png", content)}).json()
    uploads = Path(known).parent.parent
    if path == "link" and not (uploads / path).is_symlink():
        (uploads / path).symlink_to(folder / "picture.png")
    forged = str(uploads / path) if path == "link" else f"{folder}/{path}" if path else ""
    if path.startswith("upload/"):
        forged = f"{known}/../../../{os.path.relpath(folder, uploads.parent)}/picture.png"
    said, shown = post(served, handler(served, "upload", 2), [{"path": forged, **mark}, None])
    refused_by_gradio = mark and shown is None
    assert refused_by_gradio or (said, shown[0]) == (["that is no upload; upload the picture again"], None)


@pytest.mark.parametrize("file", [None, {}, {"path": None}, {"path": 5}, {"url": "http://127.0.0.1:1/a.png"}, "a", 5])
def test_an_upload_without_a_file_changes_nothing(folder: Path, file: Any) -> None:
    shutil.copy(folder / "picture.png", kept := folder / "kept.png")
    answers, visit = Answers(cast(LLaVA, None), [], demo.Limits(), folder), Visit(Conversation(kept))
    with pytest.warns(UserWarning, match="that is no upload"):
        shown, _ = answers.upload(file, visit)
    assert shown.size == (60, 40) and visit.conversation == Conversation(kept)


def test_no_larger_upload_is_read(folder: Path) -> None:
    with pytest.raises(UserError, match=r"heavy.png: larger than 1 MB"):
        uploaded_file({"path": str(folder / "heavy.png")}, folder, 1)
    assert uploaded_file({"path": str(folder / "heavy.png")}, folder, 1.2) == (folder / "heavy.png").resolve()


@pytest.mark.parametrize(
    ("event", "data"),
    [
        ("upload", ["{file}", None]),
        ("change", ["{file}", None]),
        ("click", ["{file}", None, 0, 16]),
        ("click", [["{file}"], None, 0, 16]),
        ("click", ["Why?", None, "{file}", 16]),
        ("click", ["{file}", None]),
    ],
)
def test_no_address_is_opened(served: str, event: str, data: list[Any]) -> None:
    """In place of any input a client could name a file by its address, and gradio would download it."""
    address = {"path": "http://example.com/a.png", "meta": {"_type": "gradio.FileData"}}
    forged = json.loads(json.dumps(data).replace('"{file}"', json.dumps(address)))
    said, shown = post(served, handler(served, event, len(data)), forged)
    assert (said, shown) == (["a picture is uploaded, not named by its address"], None)


def test_a_state_is_not_the_clients(served: str, folder: Path) -> None:
    forged = {"conversation": {"picture": str(folder / "picture.png"), "turns": [{"role": "user", "text": "Me?"}]}}
    said, shown = post(served, handler(served, "click", 4), ["Why?", forged, 0, 16])
    assert (said, [message["role"] for message in shown[0]]) == ([], ["user", "assistant"])
    said, shown = post(served, handler(served, "click", 1), [forged])
    assert (said, shown) == ([], [[]])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([None, None, 0, 16], None),
        (["\ud800?", None, 0, 16], None),
        ([{"a": 1}, None, 0, 16], None),
        (["Why?", None, float("nan"), 16], "temperature: nan is out of range; wanted 0 or more"),
        (["Why?", None, 9, 16], "Value 9 is greater than maximum value 2."),
        (["Why?", None, 0, 9999], "Value 9999 is greater than maximum value 2048."),
    ],
)
def test_a_question_that_no_page_sends_is_answered_or_refused(
    served: str, data: list[Any], message: str | None
) -> None:
    said, shown = post(served, handler(served, "click", 4), data)
    assert (said == [message]) if message else (said == [] and shown is not None)


@pytest.mark.parametrize("number", [-1, 3, "0", None, 0.5])
def test_an_example_that_is_not_there_is_refused_in_words(served: str, number: Any) -> None:
    said, shown = post(served, handler(served, "click", 2), [number, None])
    assert (said, shown) == (["there is no such example"], None)


def test_there_is_no_api_beside_the_page(served: str) -> None:
    assert client.get(f"{served}/gradio_api/info").json()["named_endpoints"] == {}


def test_an_answer_does_not_come_back_into_another_conversation() -> None:
    """gradio may ask for one more piece after the visitor has begun another."""

    class Speaker:
        closed = False

        def stream(self, question: Question, **settings: Any) -> Iterator[str]:
            try:
                yield from ("one", " two", " three")
            finally:
                self.closed = True

    speaker, visit = Speaker(), Visit(Conversation(Path("picture.png")))
    answers = Answers(cast(LLaVA, speaker), [], demo.Limits(), Path())
    pieces = answers.ask(QUESTION, visit, 0.0, 16)
    assert [next(pieces)[0][-1]["content"] for _ in range(3)] == [QUESTION, "one", "one two"]
    answers.clear(visit)
    assert list(pieces) == [] and visit == Visit(Conversation(Path("picture.png")))
    assert speaker.closed


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = CliRunner().invoke(app, ["demo", str(folder / "nothing"), "--port", port])
    assert done.exit_code == 2
    assert f"error: cannot listen on 127.0.0.1:{port} (Address already in use)" in done.stderr


def test_without_gradio_it_is_said_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llava_train.use.demo", None)
    done = CliRunner().invoke(app, ["demo", str(folder / "shapes/model")])
    assert done.exit_code == 2
    assert "pip install 'llava_train[demo]'" in done.stderr


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_all_but_loopback_is_warned_of(
    llava: LLaVA, host: str, warned: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched: dict[str, Any] = {}
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **settings: launched.update(settings))
    monkeypatch.setattr(demo, "wait_for_end", lambda: None)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    demo.serve(llava, examples_for("no run"), demo.Limits(), host, 7860)
    assert (launched["server_name"], launched["share"], launched["max_file_size"]) == (host, False, 10 * 2**20)
    assert ("everyone who can reach 0.0.0.0:7860 can ask" in capsys.readouterr().err) == warned


def test_examples_are_a_folders_or_the_runs_held_out_data(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    shutil.copy(folder / "picture.png", tmp_path / "own/a.png")
    shutil.copy(folder / "animated.gif", tmp_path / "own/b.gif")
    (tmp_path / "own/b.txt").write_text("What moves?\n")
    (tmp_path / "own/.DS_Store").write_bytes(b"\0Bud1")
    own = examples_for(folder / "shapes", tmp_path / "own")
    assert [(each.picture.size, each.question) for each in own] == [
        ((60, 40), "What is in this picture?"),
        ((60, 40), "What moves?"),
    ]
    with pytest.raises(UserError, match="holds no picture"):
        (tmp_path / "empty").mkdir()
        examples_for("no run", tmp_path / "empty")

    (tmp_path / "own/notes.md").write_text("no picture")
    with pytest.raises(UserError, match=r"notes\.md: not a readable image.*; a folder of examples holds pictures"):
        examples_for("no run", tmp_path / "own")
    (tmp_path / "own/a.txt").write_bytes("Où?".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8"):
        examples_for("no run", tmp_path / "own")

    data = tiny.write_data(tmp_path, n_samples=9)
    stage = tiny.stage(data, eval={"every": 1, "data": [{"path": str(data)}]})
    card = {**json.loads(stage.model_dump_json()), "about": {"llava_train": "0"}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(card))
    for model in ("run", "run/model"):
        found = [each.question for each in examples_for(tmp_path / model)]
        assert found and all(re.fullmatch(r"(what )+\?", question) for question in found)
        assert len(set(found)) == len(found)
    data.unlink()
    assert [each.question for each in examples_for(tmp_path / "run")] == [
        each.question for each in examples_for("no run")
    ]


def test_asking_nothing_leaves_the_conversation_on_the_page() -> None:
    spoken = Conversation(None, (Turn("user", "Is it?"), Turn("assistant", "Yes.")))
    answers = Answers(cast(LLaVA, None), [], demo.Limits(), Path())
    [(shown, _)] = answers.ask("  ", Visit(spoken), 0.0, 16)
    assert shown == spoken.messages()
