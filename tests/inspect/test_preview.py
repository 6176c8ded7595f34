"""What the model will see of the first samples: in the terminal, as JSON, and as a page."""

from __future__ import annotations

import base64
import io
import json
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from llava_train.cli import app
from llava_train.config import StageConfig
from llava_train.data.order import step_samples
from llava_train.data.packing import plan_packs
from llava_train.inspect.opening import StageData, open_stage_data
from llava_train.inspect.preview import Piece, Seen, first_seen, packs_of_first_step
from llava_train.stage_file import parse_stage
from tests.tiny import encoder_of, model_section, stage_content, tiny_llava

SCRIPT = "<script>alert(1)</script> & 'quotes' \""
RECORDS: list[dict[str, Any]] = [
    {"id": "one", "image": "0.png", "turns": ["<image>\nWhat is it?", "A café — 猫."]},
    {"id": "adjacent", "image": ["0.png", "1.png"], "turns": ["<image><image>Which?", "Both."]},
    {"id": "apart", "image": ["0.png", "1.png"], "turns": ["<image>\nor\n<image>\n?", "The first.", "Sure?", "Yes."]},
    {"id": "text", "turns": ["Hello", "Good day."]},
    {"id": SCRIPT, "turns": [SCRIPT, f"No {SCRIPT}"]},
    {"id": "missing", "image": "nowhere.png", "turns": ["<image>?", "Lost."]},
    {"id": "order", "turns": ["Only a question"]},
    {"id": "again", "turns": ["a", "b", "c", "d"]},
]
ANSWERS = {record["id"]: record["turns"][1::2] for record in RECORDS}
BAD = {"missing": "the image file is missing", "order": "roles out of order"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preview")
    rng = random.Random(0)
    for number, size in enumerate([(64, 40), (30, 50)]):  # smooth: resizing them is no matter of a pixel
        rough = Image.frombytes("RGB", (4, 4), rng.randbytes(48))
        rough.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    with (folder / "data.jsonl").open("w", encoding="utf-8") as file:
        for record in RECORDS:
            said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(record["turns"])]
            rest = {key: value for key, value in record.items() if key != "turns"}
            file.write(json.dumps({**rest, "conversations": said}) + "\n")
    return folder


def content(folder: Path, template: str = "chatml", **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "model": model_section(chat_template=template).model_dump(mode="json"),
        "batch": {"size": 5, "max_tokens": 300, "max_sample_tokens": 300},
        "output": str(folder / "runs"),
    }
    return stage_content(folder / "data.jsonl", **{**settings, **changes})


def opened(folder: Path, *template: str, **changes: Any) -> tuple[StageConfig, StageData]:
    config = parse_stage(content(folder, *template, **changes), "test")
    return config, open_stage_data(config)


def seen_of(folder: Path, *template: str, **changes: Any) -> dict[str, Seen]:
    seen = list(first_seen(*opened(folder, *template, **changes), n_samples=len(RECORDS)))
    return {one.id: one for one in seen}


def command(folder: Path, *arguments: Any, **changes: Any) -> Result:
    """`llava-train preview`."""
    stage = folder / "stage.yaml"
    stage.write_text(yaml.safe_dump(content(folder, **changes)), encoding="utf-8")
    return CliRunner().invoke(app, ["preview", "--config", str(stage), *map(str, arguments)])


def order(n_samples: int = len(RECORDS)) -> list[str]:
    """Ids in the order of training, of an epoch of steps of 5 and 3."""
    chosen = np.concatenate([step_samples(step, 0, len(RECORDS), 5) for step in (0, 1)])
    return [RECORDS[index]["id"] for index in chosen.tolist()][:n_samples]


def pictures_of(record: dict[str, Any]) -> list[str]:
    listed = record.get("image", [])
    return listed if isinstance(listed, list) else [listed]


# Pieces.


@pytest.mark.parametrize("template", ["chatml", "vicuna_v1", "llama2"])
def test_joined_pieces_are_the_text_that_the_template_renders(template: str, folder: Path) -> None:
    encoder = encoder_of(tiny_llava(model_section(chat_template=template)))
    for name, one in seen_of(folder, template).items():
        if name in BAD:
            continue
        assert one.sample and one.encoded
        rendered, _ = encoder.render(one.sample.turns)
        joined = "".join(piece.text for piece in one.pieces)
        assert joined.replace("<image x4>", "<image>") == rendered
        decoded = encoder.tokenizer.decode(one.encoded.input_ids, clean_up_tokenization_spaces=False)
        assert joined.replace("<image x4>", "<image>" * 4) == decoded
        assert sum(piece.n_tokens for piece in one.pieces) == one.encoded.n_tokens


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [("chatml", "", "<|im_end|>"), ("vicuna_v1", " ", "</s>"), ("llama2", " ", " </s>")],
)
def test_supervised_pieces_are_the_answers_and_their_ends(template: str, before: str, after: str, folder: Path) -> None:
    for name, one in seen_of(folder, template).items():
        expected = [] if name in BAD else [before + answer + after for answer in ANSWERS[name]]
        assert [piece.text for piece in one.pieces if piece.supervised] == expected


def test_each_image_is_a_piece_of_its_own(folder: Path) -> None:
    for record in RECORDS:
        one = seen_of(folder)[record["id"]]
        images = [piece for piece in one.pieces if piece.is_image]
        expected = [] if record["id"] in BAD else pictures_of(record)
        assert images == [Piece("<image x4>", 4, is_image=True)] * len(expected)
    adjacent = [piece.is_image for piece in seen_of(folder)["adjacent"].pieces]
    assert adjacent[:4] == [False, True, True, False]


def test_a_cut_sample_is_shown_as_far_as_it_goes(folder: Path) -> None:
    whole = seen_of(folder)["again"]
    assert whole.encoded
    batch = {"size": 5, "max_tokens": 300, "max_sample_tokens": whole.encoded.n_tokens - 3, "over_long": "truncate"}
    cut = seen_of(folder, batch=batch)["again"]
    assert "".join(piece.text for piece in cut.pieces) + "d<|im_end|>\n" == "".join(p.text for p in whole.pieces)


# The command.


def test_json_has_the_tokens_that_training_takes(folder: Path) -> None:
    config, data = opened(folder)
    encoder = encoder_of(tiny_llava(model_section(chat_template="chatml")))
    done = command(folder, "--json", "--n", 100)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["id"] for line in lines] == order()
    for line in lines:
        assert RECORDS[line["index"]]["id"] == line["id"]
        assert line["source"] == str(folder / "data.jsonl")
        if line["id"] in BAD:
            assert BAD[line["id"]] in line["problem"]
            assert "input_ids" not in line
            continue
        encoded = encoder.encode(data.mixture[line["index"]])
        assert line["problem"] == ""
        assert line["input_ids"] == encoded.input_ids.tolist()
        assert line["labels"] == encoded.labels.tolist()
        position = 0
        for piece in line["pieces"]:
            labels = line["labels"][position : position + piece["n_tokens"]]
            assert {label != -100 for label in labels} == {piece["supervised"]}
            position += piece["n_tokens"]
        assert position == len(line["labels"])


@pytest.mark.parametrize("n", [1, 3, 6])
def test_the_first_samples_are_those_of_training(n: int, folder: Path) -> None:
    lines = [json.loads(line) for line in command(folder, "--json", "--n", n).stdout.splitlines()]
    assert [line["id"] for line in lines] == order(n)


def test_another_seed_shows_another_order(folder: Path) -> None:
    lines = [json.loads(line) for line in command(folder, "--json", seed=5).stdout.splitlines()]
    chosen = np.concatenate([step_samples(step, 5, len(RECORDS), 5) for step in (0, 1)]).tolist()
    assert [line["index"] for line in lines] == chosen
    assert [line["id"] for line in lines] != order()


def test_the_terminal_shows_each_sample_or_why_it_is_bad(folder: Path) -> None:
    done = command(folder)
    assert done.exit_code == 0, done.output
    for name, reason in BAD.items():
        [line] = [line for line in done.stdout.splitlines() if line.startswith(f"{name}  [data ")]
        assert reason in line
    assert f"<|im_start|>user\n{SCRIPT}<|im_end|>\n<|im_start|>assistant\nNo {SCRIPT}<|im_end|>" in done.stdout
    assert "<image x4><image x4>Which?" in done.stdout


def test_a_missing_file_is_a_line_and_exit_code_2(folder: Path, tmp_path: Path) -> None:
    stage = tmp_path / "stage.yaml"
    stage.write_text(yaml.safe_dump(stage_content(tmp_path / "nowhere.json", output=str(tmp_path))), encoding="utf-8")
    done = CliRunner().invoke(app, ["preview", "--config", str(stage), "--json"])
    assert done.exit_code == 2
    assert "nowhere.json: cannot read the data file" in done.stderr
    assert done.stdout == ""


# The page.


class Page(HTMLParser):
    """The tags and texts of a page; `articles` has the text, the learnt texts and the pictures of each sample."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.articles: list[dict[str, Any]] = []
        self._inside, self._learnt = False, False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag == "article":
            self.articles.append({"text": "", "learnt": [], "images": []})
            self._inside = True
        if tag == "img":
            self.articles[-1]["images"].append(attributes)
        self._learnt = tag == "span" and attributes.get("class") == "learnt"

    def handle_endtag(self, tag: str) -> None:
        self._learnt = False
        if tag == "article":
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.articles[-1]["text"] += data
            if self._learnt:
                self.articles[-1]["learnt"].append(data)


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    done = command(folder, "--html", folder / "out" / "page.html", "--ranks", 2)
    assert done.exit_code == 0, done.output
    return (folder / "out" / "page.html").read_text(encoding="utf-8")


def test_the_page_needs_nothing_else(text: str) -> None:
    page = Page(text)
    assert not {"script", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    addresses = [a[key] for _, a in page.tags for key in ("src", "href", "srcset", "data") if a.get(key)]
    assert addresses
    assert all(address.startswith("data:") for address in addresses if address)
    assert "url(" not in text and "@import" not in text


def test_the_page_escapes_what_samples_say(text: str) -> None:
    assert "<script" not in text
    page = Page(text)
    of_script = page.articles[order().index(SCRIPT)]
    assert f"user\n{SCRIPT}<|im_end|>" in of_script["text"]
    assert of_script["learnt"] == [f"No {SCRIPT}<|im_end|>"]


def test_the_page_has_every_sample_in_order_with_its_answers_or_reason(text: str) -> None:
    page = Page(text)
    assert len(page.articles) == len(RECORDS)
    for name, article in zip(order(), page.articles, strict=True):
        assert name in article["text"]
        assert article["learnt"] == ([] if name in BAD else [f"{answer}<|im_end|>" for answer in ANSWERS[name]])
        assert BAD.get(name, "") in article["text"]


def expected_picture(path: Path, aspect: str, mean: tuple[int, ...]) -> np.ndarray:
    """28 x 28 pixels by plain Pillow."""
    image = Image.open(path)
    long = max(image.size)
    if aspect == "pad":
        square = Image.new("RGB", (long, long), mean)
        square.paste(image, ((long - image.width) // 2, (long - image.height) // 2))
        image = square
    return np.asarray(image.resize((28, 28), Image.Resampling.BICUBIC)).astype(int)


@pytest.mark.parametrize("aspect", ["pad", "resize"])
def test_the_page_shows_each_picture_as_the_encoder_gets_it(aspect: str, folder: Path, tmp_path: Path) -> None:
    assert command(folder, "--html", tmp_path / "page.html", image={"aspect": aspect}).exit_code == 0
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    processor = tiny_llava().processor.image_processor
    mean = tuple(int(255 * value) for value in processor.image_mean)
    n_pictures = 0
    for name, article in zip(order(), page.articles, strict=True):
        [record] = [record for record in RECORDS if record["id"] == name]
        names = [] if name in BAD else pictures_of(record)
        assert [image["alt"] for image in article["images"]] == [str(folder / each) for each in names]
        for each, image in zip(names, article["images"], strict=True):
            header, _, body = image["src"].partition(",")
            assert header == "data:image/png;base64"
            shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(body)))).astype(int)
            assert shown.shape == (28, 28, 3)
            assert np.abs(shown - expected_picture(folder / each, aspect, mean)).max() <= 2
            n_pictures += 1
    assert n_pictures == 5


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_the_packs_have_each_good_sample_of_the_first_step_once(n_ranks: int, folder: Path) -> None:
    config, data = opened(folder)
    lengths = {name: one.encoded.n_tokens for name, one in seen_of(folder).items() if one.encoded}
    # A picture is not looked at before packing: its sample has a place in a pack.
    record = next(record for record in RECORDS if record["id"] == "missing")
    lengths["missing"] = data.encoder.encode(data.mixture[RECORDS.index(record)]).n_tokens
    expected = [(name, lengths[name]) for name in order(5) if name != "order"]
    packs = packs_of_first_step(config, data, n_ranks)
    assert len(packs) == n_ranks
    assert sorted(each for rank in packs for pack in rank for each in pack) == sorted(expected)
    assert all(sum(n for _, n in pack) <= 300 for rank in packs for pack in rank)
    plan = plan_packs([n for _, n in expected], n_ranks, 300)
    assert [len(rank) for rank in packs] == [len(rank) for rank in plan]


def test_the_page_draws_the_packs(text: str, folder: Path) -> None:
    titles = [attributes["title"] for tag, attributes in Page(text).tags if tag == "span" and "title" in attributes]
    packs = packs_of_first_step(*opened(folder), n_ranks=2)
    assert titles == [f"{name}: {n} tokens" for rank in packs for pack in rank for name, n in pack]
    assert len(titles) == len([name for name in order(5) if name != "order"])
