"""The site: built without a warning, complete, and alone in the world."""

from __future__ import annotations

import functools
import http.server
import logging
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import typer.main
from mkdocs.commands.build import build
from mkdocs.config import load_config
from pydantic import BaseModel

from llava_train.cli import app
from llava_train.config import StageConfig
from llava_train.train.run_folder import FREE_KEYS
from tests.scripts import ROOT, load_script
from tests.train.helpers import TIMEOUT_S

CHROMIUM = "/usr/bin/chromium"
stage_keys = load_script("scripts/docs/stage_keys.py")


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The site, and what mkdocs warned of."""
    folder, warnings = tmp_path_factory.mktemp("site"), _Warnings()
    logging.getLogger("mkdocs").addHandler(warnings)
    here = Path.cwd()
    os.chdir(ROOT)  # mkdocstrings looks there for the package
    try:
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    finally:
        os.chdir(here)
        logging.getLogger("mkdocs").removeHandler(warnings)
    return folder, warnings.said


def test_it_is_built_without_a_warning(built: tuple[Path, list[str]]) -> None:
    assert built[1] == []


def test_it_loads_nothing_from_elsewhere(built: tuple[Path, list[str]]) -> None:
    loads = re.compile(
        r"<(?:script|img|iframe|source)[^>]* src=\"?(https?:)?//|<link[^>]* rel=\"?(?:stylesheet|preconnect)[^>]*//"
    )
    assert [page for page in built[0].rglob("*.html") if loads.search(page.read_text(encoding="utf-8"))] == []


def test_a_link_out_of_docs_is_a_name(built: tuple[Path, list[str]]) -> None:
    page = (built[0] / "explanation/packing.html").read_text(encoding="utf-8")
    assert "<code>benchmarks/README.md</code>" in page
    assert 'href="../../benchmarks' not in page


def test_the_drawing_is_part_of_its_page(built: tuple[Path, list[str]]) -> None:
    page = (built[0] / "explanation/packing.html").read_text(encoding="utf-8")
    assert re.search(r'<div class="figure" role="img" aria-label="[^"]{20,}"><svg', page)


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a stage file, with its field."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        for inner in _models(field.annotation):
            yield from keys(inner, f"{prefix}{name}.")


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models(inner)


def test_every_key_of_a_stage_file_is_explained() -> None:
    explained = {
        key: field.description or any(model.__doc__ for model in _models(field.annotation))
        for key, field in keys(StageConfig)
    }
    assert len(explained) > 90
    assert [key for key, said in explained.items() if not said] == []


def test_the_reference_has_every_key_with_its_default_and_whether_it_is_a_knob() -> None:
    page = stage_keys.stage_keys_page()
    rows = dict(re.findall(r"^\| (?:<a id=\"([\w.]+)\"></a>`\w+`) (\|.*)$", page, re.MULTILINE))
    assert rows["batch.size"].startswith("| integer, at least 1 | **required** |")
    assert rows["image.aspect"].startswith("| `pad`, `crop`, `resize` | `pad` |")
    assert rows["schedule.warmup"].startswith("| number, at least 0, below 1 | `0.03` |")
    told = {key for key, _ in keys(StageConfig)}
    missing = {
        key
        for key in told - rows.keys()
        if f"## {key} " not in page and not key.startswith(("eval.data.", "trainable.vision_tower."))
    }
    assert missing == set()
    for key, row in rows.items():
        assert row.endswith("| knob |") is stage_keys.is_free(key, FREE_KEYS), key


def test_keys_that_may_change_are_read_from_the_source_as_they_are() -> None:
    assert stage_keys.free_keys() == FREE_KEYS


def test_the_reference_has_every_command_and_option(built: tuple[Path, list[str]]) -> None:
    page = (built[0] / "reference/command-line.html").read_text(encoding="utf-8")
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        assert f'id="llava-train-{name}"' in page
        assert all(
            option in page for parameter in command.params for option in parameter.opts if option.startswith("--")
        )


def test_the_reference_has_the_python_of_a_trained_model(built: tuple[Path, list[str]]) -> None:
    page = (built[0] / "reference/python.html").read_text(encoding="utf-8")
    for name in ("use.llava.LLaVA.from_pretrained", "use.llava.LLaVA.generate_from_image", "data.packing.plan_packs"):
        assert f'id="llava_train.{name}"' in page


@pytest.mark.browser
@pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="no Chromium")
def test_pages_are_as_wide_as_a_phone_and_are_searched(built: tuple[Path, list[str]]) -> None:
    from playwright.sync_api import sync_playwright

    handler = functools.partial(_Quiet, directory=str(built[0]))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 400, "height": 800}, color_scheme="dark")
        page.set_default_timeout(1000 * TIMEOUT_S)
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("request", lambda request: said.extend([request.url] * (urlsplit(request.url).hostname != "127.0.0.1")))
        for path in ("index", "reference/stage-file", "reference/python", "explanation/packing"):
            page.goto(f"http://127.0.0.1:{server.server_port}/{path}.html")
            assert page.evaluate("document.documentElement.scrollWidth") == 400, path
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        page.click("label.md-header__button[for=__search]")
        page.wait_for_selector("text=Type to start searching")
        page.locator("input.md-search__input").press_sequentially("max_sample_tokens", delay=30)
        page.wait_for_selector("a.md-search-result__link[href*='stage-file']")
        browser.close()
        server.shutdown()
    assert said == []


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Says nothing."""
