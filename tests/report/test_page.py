"""The page of a run: it needs nothing else, obeys nothing that files say, and can be read on a phone and in the dark."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from llava_train.cli import app
from llava_train.report import page
from llava_train.report.page import report_after_run, write_report
from tests.report.runs import HOSTILE, evaluation, line, write_run
from tests.train.helpers import TIMEOUT_S

FIGURES = [
    "Loss",
    "Loss by source",
    "Scores of answers",
    "Learning rate",
    "Gradient norm",
    "Tokens a second",
    "Samples a second",
    "Model FLOPs utilization",
    "Peak memory",
    "Where the time of a step goes",
    "Tokens a sample",
    "How full packs were",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, and the pages of the first and of both."""
    folder = tmp_path_factory.mktemp("report")
    write_run(folder / "a", complete=True)
    write_run(folder / "b-with-a-name-that-is-much-too-long-for-a-phone", trainable={"projector": {"lr": 1e-3}})
    write_report([folder / "a"], folder / "a/report.html")
    write_report([folder / "a", *folder.glob("b-*")], folder / "compare.html")
    return folder


def report(*arguments: Any) -> Result:
    """`llava-train report`."""
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


class Read(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += " " if tag in ("td", "th", "dt", "dd") else ""

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("name", ["a/report.html", "compare.html"])
def test_the_page_needs_nothing_else_and_runs_nothing(name: str, runs: Path) -> None:
    read, text = Read(runs / name), (runs / name).read_text(encoding="utf-8")
    assert not {"script", "iframe", "object", "embed"} & {tag for tag, _ in read.tags}
    addresses = [attributes[key] for _, attributes in read.tags for key in ("src", "href") if attributes.get(key)]
    assert addresses and all(address and address.startswith("data:") for address in addresses)
    policy = next(attributes for tag, attributes in read.tags if "http-equiv" in attributes)
    assert (policy["content"] or "").startswith("default-src 'none';")
    assert "url(" not in text and "@import" not in text
    assert not [key for _, attributes in read.tags for key in attributes if key.startswith("on")]


def test_what_files_say_is_shown_and_not_obeyed(runs: Path) -> None:
    read = Read(runs / "a/report.html")
    source, answer, reason, sample = f"{HOSTILE} 2.5", f" {HOSTILE}", f"lost-1, line 8 {HOSTILE}", f"norm 3.5 {HOSTILE}"
    for text in (source, answer, reason, sample):
        assert text in read.text
    assert "script" not in {tag for tag, _ in read.tags}


def test_a_name_that_is_hostile_is_escaped_in_the_comparison_too(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, name=f"{name}{HOSTILE}") for name in "ab"]
    write_report(folders, tmp_path / "compare.html")
    read = Read(tmp_path / "compare.html")
    assert "script" not in {tag for tag, _ in read.tags}
    assert f"a{HOSTILE}, held out" in read.text


def test_half_a_character_does_not_keep_a_page_from_being_written(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    with (folder / "answers.jsonl").open("a") as file:
        file.write('{"step": 60, "id": "half", "prompt": "\\ud800", "answer": "x", "expected": ""}\n')
    write_report([folder], tmp_path / "page.html")
    assert "</html>" in (tmp_path / "page.html").read_text(encoding="utf-8")


# When.


def test_a_run_under_way_and_one_that_has_only_been_evaluated_have_a_page(tmp_path: Path) -> None:
    for name, lines, state in [
        ("first", [evaluation(0)], "step 0"),
        ("under-way", [evaluation(0), line(10)], "step 10 of 60"),
    ]:
        done = report(write_run(tmp_path / name, lines))
        assert (done.exit_code, done.stdout) == (0, f"wrote {tmp_path / name / 'report.html'}\n")
        assert f"{name} {state}" in " ".join(Read(tmp_path / name / "report.html").text.split())


def test_after_a_run_nothing_is_raised_whatever_goes_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert report_after_run(tmp_path / "none") is None, "nothing was logged"
    folder = write_run(tmp_path / "run", [line(10)])
    assert report_after_run(folder) is None
    assert "stopped after step 10 of 60" in Read(folder / "report.html").text
    before = (folder / "report.html").read_text()
    monkeypatch.setattr(page, "page_of", lambda *_: 1 / 0)
    assert report_after_run(folder) == f"{folder / 'report.html'} is not written: division by zero"
    assert (folder / "report.html").read_text() == before
    monkeypatch.setattr(page, "page_of", lambda *_: page.threading.Event().wait(30))
    monkeypatch.setattr(page, "_PATIENCE_S", 0.05)
    assert "not written: took over" in (report_after_run(folder) or "")


# The command.


def test_runs_are_compared_side_by_side(runs: Path) -> None:
    text = " ".join(Read(runs / "compare.html").text.split())
    assert "2 runs compared" in text
    assert "trainable.projector.lr not set 0.001" in text
    assert "a, before training" in text and "b-with-a-name-that-is-much-too-long-for-a-phone, after step 60" in text


def test_what_one_run_alone_knows_has_its_place_among_the_others(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "first", [line(60)]), write_run(tmp_path / "second")
    write_report([first, second], tmp_path / "compare.html")
    text = Read(tmp_path / "compare.html").text
    assert text.index("Training loss") < text.index("Held-out loss") < text.index("Tokens a second")


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / place / "same") for place in ("here", "there")]
    assert report(*folders, "--out", tmp_path / "both.html").exit_code == 0
    text = Read(tmp_path / "both.html").text
    assert f"{folders[0]}, before training" in text and f"{folders[1]}, before training" in text


def test_the_comparison_is_written_here_by_default(runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert report(runs / "a", *runs.glob("b-*")).stdout == "wrote compare.html\n"
    first = (tmp_path / "compare.html").read_bytes()
    assert report(*runs.glob("b-*"), runs / "a").stdout == "wrote compare-2.html\n"
    assert report(*runs.glob("b-*"), runs / "a").stdout == "wrote compare-3.html\n"
    assert (tmp_path / "compare.html").read_bytes() == first, "an earlier comparison stays"
    assert report(runs / "a", "--out", "compare.html").stdout == "wrote compare.html\n"
    assert (tmp_path / "compare.html").read_bytes() != first, "a name that was asked for is written"


def test_what_cannot_be_reported_is_one_line_and_exit_code_2(runs: Path, tmp_path: Path) -> None:
    new = write_run(tmp_path / "new", [])
    for arguments, words in {
        (tmp_path / "nowhere",): "nowhere: no run folder",
        (runs / "a", new): "metrics.jsonl has no line yet",
        (runs / "a", "--out", tmp_path): "a folder; name a file",
    }.items():
        done = report(*arguments)
        assert done.exit_code == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "nowhere").exists()


def test_lines_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "answers.jsonl").open("a") as file:
        file.write("{")
    done = report(folder)
    assert "1 of 5 lines of answers.jsonl cannot be read" in done.stderr
    assert "1 of 5 lines of answers.jsonl cannot be read" in Read(folder / "report.html").text


# In the browser.

CONTRAST = """() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = colour => { const [r, g, b] = colour.slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = element => { for (let at = element; at; at = at.parentElement) {
      const back = rgb(getComputedStyle(at).backgroundColor); if (back.length === 3 || back[3] > 0) return back; } };
  const texts = [...document.querySelectorAll('body *')].filter(element =>
      element.checkVisibility() && [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
  const ratios = texts.map(element => {
      const style = getComputedStyle(element), inside = element instanceof SVGElement;
      const pair = [light(rgb(inside ? style.fill : style.color)), light(behind(element))].sort((a, b) => b - a);
      return [(pair[0] + 0.05) / (pair[1] + 0.05), element.textContent.trim().slice(0, 40)]; });
  return ratios.sort((a, b) => a[0] - b[0]);
}"""
SIZES = """() => [...document.querySelectorAll('body *')].filter(element =>
    element.checkVisibility() && [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()))
  .map(element => { const drawn = element.closest('figure svg'), size = parseFloat(getComputedStyle(element).fontSize);
      return [drawn ? size * drawn.getBoundingClientRect().width / 320 : size, element.textContent.trim().slice(0, 40)]; })
  .sort((a, b) => a[0] - b[0])"""
TEXTS_WITHIN_CHARTS = """() => [...document.querySelectorAll('figure svg text')].filter(text => {
    const own = text.getBoundingClientRect(), chart = text.closest('figure').getBoundingClientRect();
    return own.left < chart.left || own.right > chart.right || own.bottom > chart.bottom; }).map(text => text.textContent)"""


@pytest.fixture(params=[(360, "light"), (360, "dark"), (1200, "light"), (1200, "dark")], ids="{0[0]}-{0[1]}".format)
def opened(request: pytest.FixtureRequest, chromium: Any) -> Iterator[Any]:
    """A tab on a phone or a desk, in the light or in the dark; it must ask for nothing and complain of nothing."""
    width, scheme = request.param
    tab, said, asked = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme), [], []
    tab.set_default_timeout(1000 * TIMEOUT_S)
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    yield tab
    tab.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


@pytest.mark.browser
@pytest.mark.parametrize("name", ["a/report.html", "compare.html"])
def test_the_page_can_be_read_on_a_phone_and_in_the_dark(name: str, runs: Path, opened: Any) -> None:
    opened.goto(f"file://{runs / name}")
    charts = opened.locator("figure svg[role=img]")
    shown = [title for title in FIGURES if name != "compare.html" or title != "Where the time of a step goes"]
    assert opened.locator("figure h3").all_inner_texts() == shown
    labels = [charts.nth(n).get_attribute("aria-label") for n in range(charts.count())]
    assert [label.split(":")[0] for label in labels] == shown
    for n in range(charts.count()):
        box = charts.nth(n).bounding_box()
        assert box["width"] > 250 and box["height"] > 120
    opened.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth"), "no scrolling sideways"
    assert opened.evaluate(SIZES)[0][0] >= 11
    assert opened.evaluate(TEXTS_WITHIN_CHARTS) == []
    contrasts = opened.evaluate(CONTRAST)
    assert len(contrasts) > 100
    assert contrasts[0][0] >= 4.5, contrasts[:5]
    pictures = opened.evaluate("[...document.images].map(image => [image.naturalWidth, image.alt])")
    assert pictures == [[320, "picture 1 of the question"]]


@pytest.mark.browser
def test_curves_are_drawn_in_the_colours_of_light_and_dark(runs: Path, opened: Any) -> None:
    opened.goto(f"file://{runs / 'a/report.html'}")
    strokes = opened.evaluate(
        "[...document.querySelectorAll('figure path.line')].map(path => getComputedStyle(path).stroke)"
    )
    is_dark = opened.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert strokes[-1] == ("rgb(116, 174, 245)" if is_dark else "rgb(33, 97, 184)")
    assert len(set(strokes[:3])) == 3, json.dumps(strokes)
