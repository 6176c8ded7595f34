"""The pages as they are written: links lead somewhere, and what was made of code is what the code makes."""

from __future__ import annotations

import re

import pytest

from tests.docs.commands import markdown
from tests.scripts import ROOT, load_script

PAGES = {str(page.relative_to(ROOT)): page for page in markdown.pages()}
MADE = {"docs/reference/stage-file.md", "docs/reference/command-line.md"}
"""Pages of the site that are made when it is built."""


@pytest.mark.parametrize("name", PAGES)
def test_links_and_their_anchors_exist(name: str) -> None:
    page, broken = PAGES[name], []
    for line, target in markdown.links(page.read_text(encoding="utf-8")):
        path = markdown.within(target, page) if markdown.is_local(target) else page
        anchor = target.partition("#")[2]
        is_made = str(path.relative_to(ROOT)) in MADE if path.is_relative_to(ROOT) else False
        if target.startswith(("http:", "https:", "mailto:")) or is_made:
            continue
        if not path.exists() or (anchor and anchor not in markdown.anchors(path.read_text(encoding="utf-8"))):
            broken.append(f"{name}:{line}: {target}")
    assert broken == []


def test_messages_of_troubleshooting_are_those_of_the_code() -> None:
    """What the first column of a table quotes; dots and numbers stand for what differs from case to case."""
    code = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "llava_train").rglob("*.py")))
    said = re.sub(r'"\s*\n\s*f?"', "", code)  # texts that go over several lines
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    quoted = [
        quote for cell in re.findall(r"^\| (.*?) \|", page, re.MULTILINE) for quote in re.findall("`(.+?)`", cell)
    ]
    parts = [part.strip(" :,;()") for quote in quoted for part in re.split(r"\.\.\.|\d+|\(cuda:", quote)]
    of_others = {"SyntaxError", ".yaml"}
    assert len(parts) > 60
    assert [part for part in parts if len(part) > 4 and part not in said and part not in of_others] == []


def test_the_drawing_of_packs_is_what_the_planner_does() -> None:
    drawing = load_script("scripts/docs/draw_packing.py")
    assert drawing.draw() == drawing.FIGURE.read_text(encoding="utf-8"), "run python scripts/docs/draw_packing.py"


def test_the_examples_of_masks_are_what_the_encoder_does() -> None:
    masks = load_script("scripts/docs/show_masks.py")
    page = masks.PAGE.read_text(encoding="utf-8")
    assert page.count("⟦") > 3
    assert masks.with_examples(page) == page, "run python scripts/docs/show_masks.py"


def test_anchors_are_those_of_headings() -> None:
    text = "# A page: of `code`, [a link](x.md)\n## Twice\n```\n# no heading\n```\n## Twice\n"
    assert markdown.anchors(text) == {"a-page-of-code-a-link", "twice", "twice-1"}


def test_links_are_found_outside_of_code() -> None:
    text = "[a](b.md)\n`[c](d.md)` ![e](f.png)\n```\n[g](h.md)\n```\n[i\nj](k.md#l)"
    assert list(markdown.links(text)) == [(1, "b.md"), (2, "f.png"), (6, "k.md#l")]


def test_links_in_fences_are_left_alone() -> None:
    text = "[a](b.md) and ![c](d.png)\n```\n[e](f.md)\n```"
    assert markdown.change_links(text, lambda *found: "|".join(found)) == "|a|b.md and !|c|d.png\n```\n[e](f.md)\n```"
