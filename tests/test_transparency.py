"""A picture with transparency looks alike in every room: as on white, whatever colours lie under its ground."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llava_train.data.images import ImagePreprocessor
from llava_train.data.samples import Turn
from llava_train.inspect.opening import open_stage_data
from llava_train.inspect.preview import for_page, see
from llava_train.report.questions import questions
from llava_train.report.read import read_run
from llava_train.train.shown_pictures import save_pictures
from llava_train.use import lmms_functions
from llava_train.use.lmms_task import write_task
from llava_train.use.questions import Item
from tests.report.runs import answer, write_run
from tests.tiny import dataset_of, stage, tiny_llava

WHITE, BLUE = (255, 255, 255), (0, 0, 255)


def stamp() -> Image.Image:
    """A blue square on a transparent ground, under which lie brown blotches."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 4), dtype=np.uint8)
    noise[..., 3] = 0
    noise[10:30, 10:30] = (*BLUE, 255)
    return Image.fromarray(noise, "RGBA")


def on_white() -> Image.Image:
    picture = Image.new("RGB", (40, 40), "white")
    picture.paste(BLUE, (10, 10, 30, 30))
    return picture


def coloured() -> Image.Image:
    """The same as a palette, whose ground is one transparent colour."""
    picture = Image.new("P", (40, 40), 0)
    picture.putpalette([120, 80, 20, *BLUE])
    picture.paste(1, (10, 10, 30, 30))
    return picture


@pytest.fixture(params=["alpha", "palette"])
def picture(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "alpha":
        stamp().save(tmp_path / "stamp.png")
    else:
        coloured().save(tmp_path / "stamp.png", transparency=0)
    return tmp_path / "stamp.png"


def write_data(picture: Path) -> Path:
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "what"}]
    path = picture.parent / "data.json"
    path.write_text(json.dumps([{"id": "stamp", "image": picture.name, "conversations": said}]))
    return path


def looks_white_and_blue(image: Image.Image) -> bool:
    rgb = image.convert("RGB")
    corner, middle = (rgb.getpixel((round(share * rgb.width), round(share * rgb.height))) for share in (0.08, 0.5))
    return bool(np.allclose(corner, WHITE, atol=8) and np.allclose(middle, BLUE, atol=8))


def opened(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_training_and_preview_see_it_on_white(picture: Path) -> None:
    llava, data = tiny_llava(), write_data(picture)
    expected = ImagePreprocessor(llava.processor.image_processor)(on_white())
    (batch,) = dataset_of(llava, data)[0].micro_batches
    assert torch.equal(batch.pixel_values[0], expected)

    opened_data = open_stage_data(stage(data))
    seen = see(opened_data, opened_data.mixture.locate(0))
    assert torch.equal(seen.pixels[0], expected)
    assert looks_white_and_blue(opened(for_page(seen, opened_data.preprocessor)["images"][0]["url"]))


def test_the_report_shows_it_on_white(picture: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    asked: Any = Item("stamp", (Turn("user", "<image>\nWhat?"),), (picture,), ("what",), "data.json:1")
    [[name]] = save_pictures([asked], run)
    with Image.open(run / name) as saved:
        assert looks_white_and_blue(saved)
    (run / "pictures/own.png").write_bytes(picture.read_bytes())  # what others put there
    lines = [
        answer(step, id_, pictures=[of_it])
        for step in (0, 60)
        for id_, of_it in (("a", name), ("b", "pictures/own.png"))
    ]
    (run / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = [url for question in questions([read_run(run)])[0] for url in question.pictures]
    assert len(shown) == 2 and all(looks_white_and_blue(opened(url)) for url in shown)


def test_lmms_eval_is_handed_it_on_white(picture: Path, tmp_path: Path) -> None:
    task = tmp_path / "tasks" / write_task(write_data(picture), None, tmp_path / "tasks")
    (line,) = (task / "questions.jsonl").read_text().splitlines()
    (image,) = lmms_functions.doc_to_visual(json.loads(line))
    assert np.array_equal(np.asarray(image), np.asarray(on_white()))


def test_the_demo_shows_it_on_white(picture: Path) -> None:
    pytest.importorskip("gradio")
    from llava_train.use.demo_visits import Limits, preview, thumbnail
    from llava_train.use.examples import examples_for

    assert np.array_equal(np.asarray(preview(picture, Limits())), np.asarray(on_white()))
    (example,) = examples_for("no run", picture.parent)
    assert np.array_equal(np.asarray(example.picture), np.asarray(on_white()))
    assert looks_white_and_blue(thumbnail(example.picture))


def test_the_exported_processor_shows_a_picture_itself_on_white_and_one_that_it_loads_without_its_transparency() -> (
    None
):
    """As docs/how-to/export.md says of transformers 5.23; a newer one may differ, and the page then, too."""
    from transformers.image_utils import load_image

    processor = tiny_llava().processor.image_processor
    ours = ImagePreprocessor(processor)
    as_it_is = processor(stamp(), return_tensors="pt")["pixel_values"][0]
    loaded = processor(load_image(stamp()), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(as_it_is, ours(on_white()))
    assert not torch.allclose(loaded, ours(on_white()), atol=0.1)
