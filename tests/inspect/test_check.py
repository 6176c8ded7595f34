"""The doctor: a data set with one sample for each thing that can be wrong with data, and what it says of them."""

from __future__ import annotations

import datetime
import io
import json
import math
import os
import random
import signal
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from click.testing import Result
from PIL import Image
from rich.progress import Progress
from typer.testing import CliRunner

from llava_train.cli import app
from llava_train.config import ImageSection, StageConfig
from llava_train.data.images import ImagePreprocessor, decode_image, open_image
from llava_train.data.pictures import EmbeddedPicture, PictureFile
from llava_train.data.problems import KINDS, SampleError
from llava_train.data.sources import open_source
from llava_train.errors import UserError
from llava_train.inspect import check
from llava_train.inspect.check import LOSSES, NOTES, Checked, Finding, check_data, picture_notes
from llava_train.inspect.opening import open_stage_data
from llava_train.model.processor import build_processor
from llava_train.stage_file import parse_stage
from tests.test_files import fill_the_disk
from tests.tiny import model_section, stage_content

MAX_TOKENS = 200
N_IMAGE_TOKENS = 4

TEMPLATE = """
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{- message.content + ('<|im_end|>' if message.content else '') -}}{%- endgeneration -%}
    {%- else -%}
        {{- message.content + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""ChatML, in which an empty answer has no end: there a sample can have nothing to learn from."""


def turns(question: Any = "What?", answer: Any = "A cat.") -> list[dict[str, Any]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def n_tokens(record: dict[str, Any]) -> int:
    """By hand: a token a byte, one each for both marks of a turn, and some an image."""
    roles = {"human": "user", "gpt": "assistant"}
    text = [(roles[turn["from"]], turn["value"]) for turn in record["conversations"]]
    size = sum(1 + len(f"{role}\n") + len(value.encode()) + (1 if value else 0) + 1 for role, value in text)
    return size + (N_IMAGE_TOKENS - len("<image>")) * sum(value.count("<image>") for _, value in text)


def noise(*size: int) -> Image.Image:
    return Image.frombytes("RGB", size, random.Random(0).randbytes(3 * size[0] * size[1]))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(noise(20, 30), "JPEG", exif=exif)


def bomb() -> bytes:
    """A PNG that says it has 30,000 x 30,000 pixels."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b"")]
    content = [struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(content)


def damaged() -> bytes:
    """A PNG whose pixels are no zlib stream."""
    content = bytearray(encoded(noise(20, 20), "PNG"))
    start = content.index(b"IDAT") + 4
    content[start : start + 40] = bytes(40)
    return bytes(content)


@dataclass(frozen=True)
class Case:
    """A record, and what is to be found in it: kinds with a part of the reason."""

    record: dict[str, Any] | bytes
    found: dict[str, str]
    file: tuple[str, bytes | Callable[[Path], None]] | None = None

    @property
    def is_lost(self) -> bool:
        return bool(self.found.keys() - NOTES.keys())


def with_file(name: str, content: bytes | Callable[[Path], None] | None, **found: str) -> Case:
    """A sample with one picture. `content` None writes none."""
    record = {"image": name, "conversations": turns("<image>\nWhat?")}
    return Case(record, found, None if content is None else (name, content))


def text(conversation: Any, **found: str) -> Case:
    return Case({"conversations": conversation}, found)


def _link_out(path: Path) -> None:
    outside = path.parents[1] / "outside.png"
    outside.write_bytes(encoded(noise(8, 8), "PNG"))
    path.symlink_to(outside)


GIF = encoded(noise(9, 9), "GIF", save_all=True, append_images=[noise(9, 9).rotate(90)])
JPEG = encoded(noise(60, 60), "JPEG")
PNG = encoded(noise(60, 60), "PNG")
HALF = '{"id": "half", "image": "x\\ud800.png", "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "."}]}'

CASES = {
    "good": text(turns()),
    "good-picture": with_file("good.png", PNG),
    "missing": with_file("nowhere.png", None, image_missing="nowhere.png: the image file is missing"),
    "empty-file": with_file("empty.png", b"", image_empty="zero bytes"),
    "truncated-jpeg": with_file("cut.jpg", JPEG[: len(JPEG) // 2], image_truncated="cut.jpg"),
    "truncated-png": with_file("cut.png", PNG[: len(PNG) // 2], image_truncated="cut.png"),
    "truncated-webp": with_file("cut.webp", encoded(noise(60, 60), "WEBP")[:300], image_damaged="cut.webp"),
    "damaged": with_file("damaged.png", damaged(), image_damaged="damaged.png"),
    "text-as-jpg": with_file("text.jpg", b"<html>404 not found</html>", not_an_image="none of JPEG, PNG"),
    "folder": with_file("folder.png", Path.mkdir, image_unreadable="Is a directory"),
    "floats": with_file("floats.tiff", encoded(Image.new("F", (9, 9), 0.5), "TIFF"), image_mode="of mode F"),
    "bomb": with_file("bomb.png", bomb(), decompression_bomb="too large to decode"),
    "outside": Case(
        {"image": "../outside.png", "conversations": turns("<image>?")},
        {"path_outside_root": "'../outside.png' leaves"},
    ),
    "absolute": Case(
        {"image": "/etc/passwd", "conversations": turns("<image>?")}, {"path_outside_root": "/etc/passwd"}
    ),
    "link": with_file("link.png", _link_out, symlink_outside_root="is a link to"),
    "http": Case(
        {"image": "http://example.org/a.png", "conversations": turns("<image>?")}, {"image_remote": "download it first"}
    ),
    "number-as-image": Case({"image": 5, "conversations": turns("<image>?")}, {"image_value": "not 5"}),
    "half-path": Case(HALF.encode(), {"not_utf8": "'x\\ud800.png'"}),
    "more-placeholders": Case(
        {"image": "good.png", "conversations": turns("<image><image>?")},
        {"placeholders": "2 <image> placeholders, but 1 images"},
    ),
    "more-images": Case(
        {"image": ["good.png", "good.png"], "conversations": turns("<image>?")},
        {"placeholders": "1 <image> placeholders, but 2 images"},
    ),
    "image-of-the-assistant": text(turns(answer="<image>"), placeholders="outside a user turn"),
    "unknown-role": text([{"from": "robot", "value": "Hi"}], unknown_role="turn 1: unknown role 'robot'"),
    "out-of-order": text(turns()[::-1], roles_out_of_order="assistant, user"),
    "no-answer": text(turns()[:1], roles_out_of_order="user"),
    "empty-conversation": text([], no_conversation="empty"),
    "no-conversation": Case({"caption": "A cat."}, {"no_conversation": 'found the keys "id", "caption"'}),
    "empty-answer": text(turns(answer=" \u200b"), empty_answer="turn 2: the answer is empty"),
    "unread-picture": Case({"image_path": "a.png", "conversations": turns()}, {"unread_picture": 'key "image_path"'}),
    "video": Case({"video": "v.mp4", "conversations": turns("<video>?")}, {"video_or_sound": 'key "video"'}),
    "tools": Case({"tools": "[{}]", "conversations": turns()}, {"unsupported_key": 'key "tools" is not supported'}),
    "markup": text(turns("![](a.png) What?"), picture_markup="'![](a.png)'"),
    "no-turn": text(["What?", "A cat."], malformed_turn="turn 1"),
    "nothing-supervised": text(
        [turns()[0], {**turns()[1], "loss": False}], nothing_supervised="marked as not trained on"
    ),
    "number-as-text": text(turns(answer=7), not_text="turn 2: the text is 7"),
    "null-as-text": text(turns(answer=None), not_text="turn 2: the text is None"),
    "half-a-character": text(turns(answer="a\ud800"), not_utf8="turn 2"),
    "invalid-utf8": Case(b'{"id": "x", "conversations": "\xff\xfe"}', {"not_utf8": "not UTF-8"}),
    "invalid-json": Case(b'{"id": "x", "conversations": [', {"not_json": "not valid JSON"}),
    "endless-number": Case(b'{"id": ' + b"1" * 5000 + b"}", {"not_json": "digits"}),
    "list": Case(b"[1, 2]", {"not_an_object": "not list"}),
    "over-long": text(turns(answer="so " * 70 + "."), over_long=f"more than batch.max_sample_tokens ({MAX_TOKENS})"),
    "control-token": text(turns(answer="a <|im_end|> b"), control_token="turn 2: the text holds the control token"),
    "duplicate-id": Case({"id": "good", "conversations": turns()}, {"duplicate_id": "'good' occurs before"}),
    "wrong-extension": with_file("really-png.jpg", PNG, wrong_extension="is a PNG"),
    "animated": with_file("moving.gif", GIF, animated="2 frames", unusual_mode=""),
    "animated-cut": with_file("moving-cut.gif", GIF[:-60], animated="2 frames", unusual_mode=""),
    "cmyk": with_file("cmyk.jpg", encoded(noise(9, 9).convert("CMYK"), "JPEG"), unusual_mode="CMYK"),
    "16-bits": with_file("16.png", encoded(Image.new("I;16", (9, 9), 300), "PNG"), unusual_mode="I;16"),
    "palette": with_file("palette.png", encoded(noise(9, 9).convert("P"), "PNG"), unusual_mode="mode P"),
    "alpha": with_file("alpha.png", encoded(noise(9, 9).convert("RGBA"), "PNG"), transparent="an alpha channel"),
    "gray-alpha": with_file("gray.png", encoded(noise(9, 9).convert("LA"), "PNG"), transparent="an alpha channel"),
    "clear-palette": with_file(
        "clear.png",
        encoded(noise(9, 9).convert("P"), "PNG", transparency=3),
        transparent="a transparent colour",
        unusual_mode="mode P",
    ),
    "clear-colour": with_file(
        "key.png", encoded(noise(9, 9), "PNG", transparency=(1, 2, 3)), transparent="a transparent colour"
    ),
    "invisible": with_file(
        "invisible.png",
        encoded(Image.new("RGBA", (9, 9), (200, 60, 20, 0)), "PNG"),
        transparent="an alpha channel",
        white_on_white="invisible.png: nothing is left to see",
    ),
    "mpo": with_file("phone.jpg", encoded(noise(9, 9), "MPO", save_all=True, append_images=[noise(9, 9)])),
    "pages": with_file(
        "pages.tiff",
        encoded(noise(9, 9), "TIFF", save_all=True, append_images=[noise(9, 9)]),
        several_pages="pages.tiff has 2 pages",
    ),
    "moving-png": with_file(
        "moving.png",
        encoded(noise(9, 9), "PNG", save_all=True, append_images=[noise(9, 9).rotate(90)]),
        animated="2 frames",
    ),
    "rotated": with_file("rotated.jpg", rotated(), rotated="orientation 6"),
    "one-pixel": with_file("one.png", encoded(noise(1, 1), "PNG"), extreme_shape="1 x 1 pixels"),
    "flat": with_file("flat.png", encoded(noise(20_000, 1), "PNG"), extreme_shape="20000 x 1 pixels"),
    "tall": with_file("tall.png", encoded(noise(1, 20_000), "PNG"), extreme_shape="1 x 20000 pixels"),
}
"""By id; a record in bytes has none that can be read, and goes by its number."""
INDICES = {name: index for index, name in enumerate(CASES)}


def line_of(index: int) -> int:
    """An empty line follows the first two records."""
    return index + 1 if index < 2 else index + 2


def write_cases(folder: Path, cases: dict[str, Case]) -> Path:
    """A JSONL file of the cases in `folder/data`, their pictures beside it."""
    data = folder / "data"
    data.mkdir(parents=True)
    lines = []
    for name, case in cases.items():
        if isinstance(case.record, bytes):
            lines.append(case.record)
        else:
            lines.append(json.dumps({"id": name, **case.record}).encode())
        if case.file is not None:
            file, content = case.file
            if isinstance(content, bytes):
                (data / file).write_bytes(content)
            else:
                content(data / file)
    lines.insert(2, b"")
    (data / "data.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return data / "data.jsonl"


def content_of(path: Path, **changes: Any) -> dict[str, Any]:
    template = path.parents[1] / "own.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    settings: dict[str, Any] = {
        "model": model_section(chat_template=str(template)).model_dump(mode="json"),
        "batch": {"size": 6, "max_tokens": 400, "max_sample_tokens": MAX_TOKENS},
        "output": str(path.parents[1] / "runs"),
    }
    return {**stage_content(path, **settings), **changes}


def examined(config: StageConfig, decode: bool = True, n_workers: int = 1, n_ranks: int = 1) -> Checked:
    return check_data(config, open_stage_data(config), decode, n_workers, n_ranks, Progress(disable=True))


def command(path: Path, *arguments: Any, **changes: Any) -> Result:
    """`llava-train check` of a data file."""
    stage = path.parents[1] / "stage.yaml"
    stage.write_text(yaml.safe_dump(content_of(path, **changes)), encoding="utf-8")
    words = ["check", "--config", stage, "--workers", 1, *arguments]
    return CliRunner().invoke(app, list(map(str, words)))


def good_cases() -> dict[str, Case]:
    return {name: case for name, case in CASES.items() if not case.is_lost}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cases(tmp_path_factory.mktemp("check"), CASES)


@pytest.fixture(scope="module")
def checked(data: Path) -> Checked:
    return examined(parse_stage(content_of(data), "test"), n_workers=2)


def test_there_is_a_case_for_every_kind_of_problem() -> None:
    found = {kind for case in CASES.values() for kind in case.found}
    assert found | set(LOSSES) | {"template_refuses"} == KINDS.keys() | NOTES.keys()


@pytest.mark.parametrize("name", CASES)
def test_each_case_is_told_apart_with_its_place_and_reason(name: str, data: Path, checked: Checked) -> None:
    case, index = CASES[name], INDICES[name]
    found = {finding.kind: finding for finding in checked.findings if finding.index == index}
    assert found.keys() == case.found.keys()
    for kind, finding in found.items():
        assert finding.source == str(data)
        assert finding.line == line_of(index)
        assert case.found[kind] in finding.reason
        stated = case.record.get("id", name) if isinstance(case.record, dict) else str(index)
        assert finding.id == ("half" if name == "half-path" else stated)
    [examined] = checked.by_source
    assert (examined.n_tokens[index] == 0) == case.is_lost


def test_no_finding_is_made_twice(checked: Checked) -> None:
    assert len(checked.findings) == sum(len(case.found) for case in CASES.values())


def test_tokens_are_those_counted_by_hand(checked: Checked) -> None:
    [examined] = checked.by_source
    assert examined.indices == list(range(len(CASES)))
    for name, case in good_cases().items():
        assert isinstance(case.record, dict)
        index, conversation = INDICES[name], case.record["conversations"]
        assert examined.n_tokens[index] == n_tokens(case.record)
        assert examined.n_supervised[index] == len(conversation[1]["value"]) + 1
        assert examined.n_images[index] == ("image" in case.record)


def test_a_worker_that_the_system_ends_is_said(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.Examiner, "examine", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="the system ended a worker process.*use fewer --workers"):
        examined(parse_stage(content_of(data), "test"), n_workers=2)


def test_the_clean_file_never_overwrites_its_source(data: Path) -> None:
    before = data.read_bytes()
    outcome = command(data, "--write-clean", data)
    assert outcome.exit_code == 2
    assert "a source of the stage; write the clean records to another file" in outcome.stderr
    assert data.read_bytes() == before


def test_one_worker_finds_what_two_find(data: Path, checked: Checked) -> None:
    alone = examined(parse_stage(content_of(data), "test"), n_workers=1)
    assert alone.findings == checked.findings
    assert alone.by_source == checked.by_source
    assert np.array_equal(alone.lengths, checked.lengths)
    assert (alone.n_steps, alone.packing) == (checked.n_steps, checked.packing)


def test_many_samples_stay_in_order_over_workers(tmp_path: Path) -> None:
    """More samples than a worker takes at a time; sample i has i + 1 letters."""
    path = write_cases(tmp_path, {f"s{i}": text(turns(answer="a" * (i % 150 + 1))) for i in range(300)})
    found = examined(parse_stage(content_of(path), "test"), n_workers=2)
    shortest = n_tokens({"conversations": turns(answer="a")})
    assert found.by_source[0].n_tokens == [shortest + i % 150 for i in range(300)]
    assert found.lengths.tolist() == found.by_source[0].n_tokens
    assert found.findings == []


def test_truncation_loses_something_where_the_stage_file_asks_for_it(tmp_path: Path) -> None:
    path = write_cases(tmp_path, {"over-long": CASES["over-long"], "good": CASES["good"]})
    batch = {"size": 6, "max_tokens": 400, "max_sample_tokens": MAX_TOKENS, "over_long": "truncate"}
    found = examined(parse_stage(content_of(path, batch=batch), "test"))
    assert [(finding.kind, finding.id) for finding in found.findings] == [("truncated", "over-long")]
    assert found.by_source[0].n_tokens[0] == MAX_TOKENS
    assert found.would_lose


def test_steps_and_packing_are_those_counted_by_hand(tmp_path: Path) -> None:
    """14 equal samples, 6 a step, 2.5 epochs: steps of 6, 6 and 2 samples, and the half of an epoch rounds up."""
    path = write_cases(tmp_path, {f"s{i}": CASES["good"] for i in range(14)})
    size = n_tokens({"conversations": turns()})
    batch = {"size": 6, "max_tokens": 200, "max_sample_tokens": 200, "packing": False}
    config = parse_stage(content_of(path, batch=batch, schedule={"epochs": 2.5}), "test")
    found = examined(config, n_ranks=2)
    assert found.n_steps == math.ceil(2.5 * 3)
    # Without packing, 2 ranks take 6, 6 and 2 samples in 3, 3 and 1 micro-steps; the 7th and 8th step have 6 each.
    samples = [6, 6, 2, 6, 6, 2, 6, 6]
    assert found.packing == pytest.approx(
        {
            "ranks": 2,
            "micro_steps_a_step": np.mean([n / 2 for n in samples]),
            "fill": size / 200,
            "balance": 1.0,
        }
    )


def test_balance_is_the_mean_load_over_the_heaviest(tmp_path: Path) -> None:
    cases = {"short": text(turns(answer="a")), "long": text(turns(answer="a" * 101))}
    path = write_cases(tmp_path, cases)
    found = examined(parse_stage(content_of(path), "test"), n_ranks=2)
    short, long = (n_tokens({"conversations": turns(answer="a" * n)}) for n in (1, 101))
    assert found.packing["balance"] == pytest.approx((short + long) / 2 / long)
    assert found.packing["fill"] == pytest.approx((short + long) / (2 * 400))


@pytest.mark.parametrize("aspect", ["pad", "crop", "resize"])
@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1)])
def test_a_picture_of_an_extreme_shape_takes_little_time_and_memory(
    aspect: Any, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    front = build_processor(model_section(), ImageSection(aspect=aspect))
    preprocessor = ImagePreprocessor(front.processor.image_processor)
    largest = total = 0
    make, resize = Image.new, Image.Image.resize

    def noticed(width: int, height: int) -> None:
        nonlocal largest, total
        largest, total = max(largest, width * height), total + width * height

    def watched_new(mode: str, size: tuple[int, int], *rest: Any) -> Image.Image:
        noticed(*size)
        return make(mode, size, *rest)

    def watched_resize(self: Image.Image, size: tuple[int, int], *rest: Any, **more: Any) -> Image.Image:
        noticed(*size)
        return resize(self, size, *rest, **more)

    monkeypatch.setattr(Image, "new", watched_new)
    monkeypatch.setattr(Image.Image, "resize", watched_resize)
    pixels = preprocessor(decode_image(EmbeddedPicture(encoded(noise(*size), "PNG"))))
    assert pixels.shape == (3, 28, 28)
    assert torch.isfinite(pixels).all()
    assert largest <= 4096**2
    assert total <= 2 * 4096**2, "no time is spent on more pixels than are kept"


def test_a_limit_on_pixels_holds_for_the_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    path = write_cases(tmp_path, {"big": with_file("big.png", encoded(noise(40, 40), "PNG"))})
    [finding] = examined(parse_stage(content_of(path), "test"), decode=False).findings
    assert finding.kind == "decompression_bomb"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_the_notes_of_a_damaged_picture_never_stop_the_doctor(kind: str, tmp_path: Path) -> None:
    rng = random.Random(kind)
    options = {"save_all": True, "append_images": [noise(30, 20).rotate(180)]} if kind == "GIF" else {}
    whole = encoded(noise(30, 20), kind, **options)
    for number in range(150):
        content = bytearray(whole)
        if number % 2:
            content = content[: rng.randrange(1, len(content))]
        else:
            for _ in range(rng.randint(1, 6)):
                content[rng.randrange(min(len(content), rng.choice([60, len(content)])))] = rng.randrange(256)
        picture = EmbeddedPicture(bytes(content), "x.png")
        try:
            with open_image(picture) as image:
                assert {note for note, _ in picture_notes(image, "x.png")} <= NOTES.keys()
            decode_image(picture)
        except SampleError as error:
            assert error.kind.startswith(("image_", "not_an_image", "decompression_bomb"))


def test_the_header_of_a_png_is_enough_for_its_notes(tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(PNG[:200])
    with open_image(PictureFile(tmp_path / "cut.png", (tmp_path,))) as image:
        assert list(picture_notes(image, "cut.png")) == []


# The command.


def test_the_command_fails_when_something_would_be_lost_and_says_all_as_json(data: Path, checked: Checked) -> None:
    done = command(data, "--json", "--ranks", 2)
    assert done.exit_code == 1, done.output
    [line] = done.stdout.splitlines()
    found = json.loads(line)
    assert found["n_samples"] == found["n_samples_an_epoch"] == len(CASES)
    assert found["n_bad"] == sum(case.is_lost for case in CASES.values())
    for name, kinds in {"problems": KINDS, "notes": NOTES}.items():
        expected = {kind: sum(kind in case.found for case in CASES.values()) for kind in kinds}
        assert {kind: what["n"] for kind, what in found[name].items()} == {k: n for k, n in expected.items() if n}
        for kind, what in found[name].items():
            assert 1 <= len(what["examples"]) <= 5
            for example in what["examples"]:
                assert Finding(kind=kind, **example) in checked.findings
    sizes = sorted(n_tokens(case.record) for case in good_cases().values() if isinstance(case.record, dict))
    assert found["n_tokens"] == sum(sizes)
    assert (found["tokens"]["min"], found["tokens"]["max"]) == (sizes[0], sizes[-1])
    assert found["tokens"]["median"] == np.median(sizes)
    assert sum(height for _, height in found["tokens"]["histogram"]) == len(sizes)
    assert found["n_steps"] == math.ceil(len(CASES) / 6)
    assert found["packing"]["ranks"] == 2
    assert found["sources"] == {
        "data": {"n_samples": len(CASES), "n_bad": found["n_bad"], "n_tokens": found["n_tokens"]}
    }


def test_the_report_names_each_kind_and_a_place(data: Path) -> None:
    done = command(data)
    assert done.exit_code == 1
    for kind in {kind for case in CASES.values() for kind in case.found}:
        assert f"x {kind}: {(KINDS | NOTES)[kind]}" in done.stdout
    assert f"{data}: 'missing' (number 2, line 4): {data.parent}/nowhere.png: the image file is missing" in done.stdout
    assert "--write-clean" in done.stdout


def test_what_is_only_noted_is_no_failure(tmp_path: Path) -> None:
    done = command(write_cases(tmp_path, good_cases()))
    assert done.exit_code == 0, done.output
    assert "Every sample can be trained on." in done.stdout


def test_steps_that_the_data_do_not_have_are_told(tmp_path: Path) -> None:
    path = write_cases(tmp_path, {f"s{i}": CASES["good-picture"] for i in range(14)})
    batch = {"size": 6, "max_tokens": 400, "max_sample_tokens": 200}
    note = "schedule.max_steps 40 is not reached: 1 epoch has 3 steps; raise schedule.epochs to 14"
    done = command(path, batch=batch, schedule={"max_steps": 40})
    assert done.exit_code == 0 and f"Note: {note}" in done.stdout
    as_json = command(path, "--json", batch=batch, schedule={"max_steps": 40})
    assert json.loads(as_json.stdout)["max_steps_not_reached"] == note
    assert "Note:" not in command(path, batch=batch, schedule={"max_steps": 3}).stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"btch": 5}, "btch"),
        ({"data": [{"path": "nowhere.json"}]}, "nowhere.json: cannot read the data file"),
        ({"data": []}, "data"),
    ],
    ids=["unknown-key", "no-file", "no-data"],
)
def test_a_wrong_stage_file_is_another_exit_code(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    done = command(write_cases(tmp_path, {"good": CASES["good"]}), "--json", **changes)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "error: " in done.stderr
    assert message in done.stderr


def test_fast_reads_headers_only(tmp_path: Path) -> None:
    cases = {name: CASES[name] for name in ("truncated-jpeg", "truncated-png", "damaged")}
    path = write_cases(tmp_path, cases)
    assert command(path).exit_code == 1
    assert command(path, "--fast").exit_code == 0
    path = write_cases(tmp_path / "more", {**cases, "missing": CASES["missing"], "empty-file": CASES["empty-file"]})
    done = command(path, "--fast", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["problems"].keys() == {"image_missing", "image_empty"}


def samples_of(path: Path, images: Any = None, without: tuple[int, ...] = ()) -> list[Any]:
    """Ids, turns and pixels of a source."""
    source = open_source(path, images)
    samples = [source[i] for i in range(len(source)) if i not in without]
    return [
        (sample.id, sample.turns, [np.asarray(decode_image(picture)).tobytes() for picture in sample.images])
        for sample in samples
    ]


def test_the_clean_file_has_the_good_records_as_they_are_and_passes(data: Path, tmp_path: Path) -> None:
    clean = tmp_path / "out" / "clean.jsonl"
    done = command(data, "--write-clean", clean, "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["clean"] == [{"path": str(clean), "images": str(data.parent)}]
    expected = [{"id": name, **case.record} for name, case in good_cases().items() if isinstance(case.record, dict)]
    assert [json.loads(line) for line in clean.read_text(encoding="utf-8").splitlines()] == expected
    again = command(clean, data=json.loads(done.stdout)["clean"])
    assert again.exit_code == 0, again.output
    lost = tuple(INDICES[name] for name, case in CASES.items() if case.is_lost)
    assert samples_of(clean, data.parent) == samples_of(data, without=lost)


def test_each_of_several_sources_has_a_clean_file(data: Path, tmp_path: Path) -> None:
    more = write_cases(tmp_path, {"good": CASES["good"], "missing": CASES["missing"]})
    sources = [{"path": str(data), "name": "a"}, {"path": str(more), "name": "b"}]
    done = command(more, "--write-clean", tmp_path / "clean.jsonl", "--json", data=sources)
    found = json.loads(done.stdout)
    assert [section["path"] for section in found["clean"]] == [str(tmp_path / f"clean.{name}.jsonl") for name in "ab"]
    assert found["sources"]["b"] == {"n_samples": 2, "n_bad": 1, "n_tokens": n_tokens({"conversations": turns()})}
    assert len((tmp_path / "clean.a.jsonl").read_text().splitlines()) == len(good_cases())
    [line] = (tmp_path / "clean.b.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "good"


def test_half_a_character_beside_the_conversation_does_no_harm(tmp_path: Path) -> None:
    """In an id, or under a key that nobody reads: the sample is trained on, and can be written."""
    records = [{"id": "\ud800", "conversations": turns()}, {"id": "x", "note": "\udfff", "conversations": turns()}]
    path = write_cases(tmp_path, {str(i): Case(json.dumps(record).encode(), {}) for i, record in enumerate(records)})
    texts_only = {"trainable": {"language_model": {"lr": 1e-3}}}
    done = command(path, "--json", "--write-clean", tmp_path / "clean.jsonl", **texts_only)
    assert done.exit_code == 0, done.output
    assert [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text("utf-8").splitlines()] == records


def test_embedded_pictures_become_files_beside_the_clean_file(tmp_path: Path) -> None:
    pictures = [[PNG], [JPEG, rotated()], [JPEG[: len(JPEG) // 2]], []]
    rows = {
        "id": [f"p{i}" for i in range(4)],
        "images": [[{"bytes": content, "path": None} for content in each] for each in pictures],
        "messages": [
            [{"role": "user", "content": f"{'<image>' * len(each)}What?"}, {"role": "assistant", "content": f"{i}."}]
            for i, each in enumerate(pictures)
        ],
    }
    path = tmp_path / "data" / "rows.parquet"
    path.parent.mkdir()
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "images": [datasets.Image()],
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
        }
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    clean = tmp_path / "out" / "clean.jsonl"
    done = command(path, "--write-clean", clean, "--json")
    assert done.exit_code == 1, done.output
    assert json.loads(done.stdout)["problems"].keys() == {"image_truncated"}
    assert [sample_id for sample_id, *_ in samples_of(clean)] == ["p0", "p1", "p3"]
    assert samples_of(clean) == samples_of(path, without=(2,))
    written = sorted(file.read_bytes() for file in (tmp_path / "out" / "clean-images").iterdir())
    assert written == sorted([PNG, JPEG, rotated()])
    assert command(clean).exit_code == 0


def odd_rows(folder: Path) -> Path:
    """A Parquet file whose pictures are by path and in the record, beside values that JSON cannot hold."""
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(PNG)
    columns = {
        "id": pa.array([Decimal("1.10"), Decimal("2.20")]),
        "image": pa.array([{"bytes": None, "path": "a.png"}, {"bytes": JPEG, "path": None}]),
        "conversations": pa.array([turns("<image>\nWhat?")] * 2),
        "when": pa.array([datetime.datetime(2020, 1, 2, 3, 4, 5)] * 2),
        "day": pa.array([datetime.date(2020, 1, 2)] * 2),
        "took": pa.array([datetime.timedelta(seconds=5)] * 2),
        "hash": pa.array([b"\xff\x00"] * 2),
        "hashes": pa.array([[b"\xff", b"\x00"]] * 2),
        "wrapped": pa.array([{"bytes": b"\xff", "path": None}] * 2),
        "score": pa.array([float("nan"), 1.5]),
        "scores": pa.array([[0.5, float("inf")]] * 2),
    }
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    return folder / "rows.parquet"


def test_values_that_json_cannot_hold_are_written_as_text_or_left_out_with_a_word(tmp_path: Path) -> None:
    path, clean = odd_rows(tmp_path / "data"), tmp_path / "out/clean.jsonl"
    done = command(path, "--write-clean", clean, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in clean.read_text("utf-8").splitlines())
    assert (first["id"], first["when"], first["day"]) == ("1.10", "2020-01-02 03:04:05", "2020-01-02")
    assert first["took"] == "0:00:05"
    assert (first["score"], second["score"], first["scores"]) == (None, 1.5, [0.5, None])
    assert not {"hash", "wrapped"} & first.keys()
    for words in (
        "2 binary values of 'hash'",
        "4 binary values of 'hashes'",
        "1 numbers that are not finite of 'score'",
    ):
        assert any(words in note for note in found["clean_notes"]), found["clean_notes"]
    (section,) = found["clean"]
    assert samples_of(clean, section["images"]) == samples_of(path), "pictures by path and in the record"
    assert command(clean, data=found["clean"]).exit_code == 0


def test_a_clean_file_that_cannot_be_finished_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, clean = odd_rows(tmp_path / "data"), tmp_path / "out/clean.jsonl"
    clean.parent.mkdir()
    clean.write_text("precious")
    fill_the_disk(monkeypatch)
    done = command(path, "--write-clean", clean)
    assert (done.exit_code, clean.read_text()) == (2, "precious")
    assert "the disk is full" in done.stderr
    assert {file.name for file in clean.parent.iterdir()} <= {"clean.jsonl", "clean-images"}


def test_where_no_sample_is_good_the_old_file_stays(tmp_path: Path) -> None:
    path = write_cases(tmp_path / "all", {"missing": CASES["missing"]})
    (tmp_path / "clean.jsonl").write_text("precious")
    done = command(path, "--write-clean", tmp_path / "clean.jsonl")
    assert (tmp_path / "clean.jsonl").read_text() == "precious"
    assert "is not written: no sample of its source can be trained on" in done.stdout


@pytest.mark.parametrize("name", ["held_out.jsonl", "pictures.zip", "shards/more.jsonl"])
def test_the_clean_file_replaces_nothing_that_the_stage_reads(name: str, tmp_path: Path) -> None:
    path = write_cases(tmp_path, {"good": CASES["good"]})
    (tmp_path / "held_out.jsonl").write_bytes(path.read_bytes())
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/a.jsonl").write_bytes(path.read_bytes())
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        archive.writestr("a.png", PNG)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.suffix in (".jsonl", ".zip")}
    data = [{"path": str(path), "images": str(tmp_path / "pictures.zip")}, {"path": str(tmp_path / "shards")}]
    if name.startswith("shards"):
        data = data[1:]
    held_out = {"every": 1, "data": [{"path": str(tmp_path / "held_out.jsonl"), "name": "x"}]}
    if name == "pictures.zip":
        data = data[:1]
    elif name == "held_out.jsonl":
        data = [{"path": str(path)}]
    done = command(path, "--write-clean", tmp_path / name, data=data, eval=held_out)
    assert done.exit_code == 2
    assert "a source of the stage" in done.stderr
    assert {file: file.read_bytes() for file in before} == before
    assert not (tmp_path / "shards/more.jsonl").exists()


def test_a_conversation_that_the_template_refuses_or_cuts_is_found(data: Path, tmp_path: Path) -> None:
    conversations = {"system": [{"from": "system", "value": "Be kind."}, *turns()], "none": turns()}
    path = write_cases(tmp_path, {name: text(turns_) for name, turns_ in conversations.items()})
    template = tmp_path / "strict.jinja"
    refusal = "{% if messages[0].role != 'system' %}{{ raise_exception('wants a system turn') }}{% endif %}"
    template.write_text(refusal + TEMPLATE, encoding="utf-8")
    content = content_of(path)
    content["model"]["chat_template"] = str(template)
    [finding] = examined(parse_stage(content, "test")).findings
    assert (finding.id, finding.kind) == ("none", "template_refuses")
    assert "wants a system turn" in finding.reason


def test_held_out_samples_are_examined_too(data: Path, tmp_path: Path) -> None:
    good = write_cases(tmp_path / "a", {"good": CASES["good"]})
    held_out = write_cases(tmp_path / "b", {"good": CASES["good"], "missing": CASES["missing"]})
    done = command(good, "--json", eval={"every": 1, "data": [{"path": str(held_out)}]})
    found = json.loads(done.stdout)
    assert done.exit_code == 1
    assert found["n_samples"] == 1
    assert found["held_out"]["data"]["n_bad"] == 1
    assert found["problems"]["image_missing"]["examples"][0]["source"] == str(held_out)


def test_the_headers_of_pictures_are_read_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And all of a picture once, when it is decoded."""
    content = encoded(noise(600, 600), "PNG")
    path = write_cases(tmp_path, {"big": with_file("big.png", content)})
    n_read = [0]

    class Counting(io.BytesIO):
        def read(self, *size: Any) -> bytes:
            found = super().read(*size)
            n_read[0] += len(found)
            return found

    monkeypatch.setattr(PictureFile, "open", lambda self, mode: Counting(self.path.read_bytes()))
    config = parse_stage(content_of(path), "test")
    for decode, least, most in ((False, 1, 20_000), (True, len(content), len(content) + 20_000)):
        n_read[0] = 0
        opened = open_stage_data(config)
        assert not check.Examiner(opened, decode).examine(opened.mixture.sources[0], [0]).findings
        assert least <= n_read[0] <= most


def test_keys_that_nothing_reads_are_listed_with_counts(tmp_path: Path) -> None:
    scored = [{**turn, "score": 1} for turn in turns()]
    records = [{"source": "web", "width": None, "conversations": scored}, {"source": "x", "conversations": turns()}]
    path = write_cases(tmp_path, {str(i): Case(json.dumps(record).encode(), {}) for i, record in enumerate(records)})
    done = command(path)
    assert "data: source (2), conversations[].score (1)" in done.stdout
    assert json.loads(command(path, "--json").stdout)["unread_keys"] == {
        "data": {"source": 2, "conversations[].score": 1}
    }


def test_a_projector_without_any_picture_is_refused_and_text_only_samples_are_counted(tmp_path: Path) -> None:
    path = write_cases(tmp_path, {"a": CASES["good"], "b": CASES["markup"]})
    done = command(path)
    assert done.exit_code == 1
    assert "none of the 2 samples that were looked at has a picture" in done.stdout
    assert "1 of 2 samples have no picture, but markup of one in the text" in done.stdout
    assert command(path, trainable={"language_model": {"lr": 1e-3}}).exit_code == 0
    path = write_cases(tmp_path / "with", {"a": CASES["good"], "b": CASES["good-picture"]})
    done = command(path, trainable={"projector": {"lr": 1e-3}})
    assert done.exit_code == 0
    assert "50.0% of 2 samples have no picture; a stage that trains only the projector learns nothing" in done.stdout


@pytest.mark.parametrize(("n_there", "asks"), [(0, True), (1, True), (2, False)])
def test_a_wrong_place_of_pictures_is_asked_for(n_there: int, asks: bool, tmp_path: Path) -> None:
    records = [{"id": i, "image": f"{i}.png", "conversations": turns("<image>\nWhat?")} for i in range(12)]
    records.append({"id": "text", "conversations": turns()})
    path, place = tmp_path / "data.json", tmp_path / "pictures"
    path.write_text(json.dumps(records))
    place.mkdir()
    for i in range(n_there):
        Image.new("RGB", (9, 9)).save(place / f"{i}.png")
    done = command(path, data=[{"path": str(path), "images": str(place)}])
    assert done.exit_code == 1
    question = (
        f"{path}: {12 - n_there} of 12 samples with pictures name some that are not where they are looked for. Is "
        f"`images:` of this source right? {place}/{n_there}.png: the image file is missing (paths count from {Path.cwd()})"
    )
    assert (question in done.stdout) == asks
    assert ("--write-clean" in done.stdout) != asks


def test_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"id": 1, "image": "a.png", "conversations": turns("<image>\nWhat?")}]))
    done = command(path)
    assert "Everything would be lost." in done.stdout and "--write-clean" not in done.stdout
    found = json.loads(command(path, "--json").stdout)
    assert len(found["wrong_images"]) == 1
