"""What mkdocs does beside rendering docs/: the home page, the pages made of code, links out of docs/, drawings.

The pages of the reference are made while the site is built, so that they cannot differ from the code, and none is
committed. What reads well without the site (`draw_packing.py`, `show_masks.py`) is committed and checked by a test.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from command_line import command_line_page
from markdown_files import ROOT, change_links, is_local, within
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from stage_keys import stage_keys_page

DOCS = ROOT / "docs"
HOME = "index.md"
_DRAWING = re.compile(r'<p><img alt="([^"]*)" src="([^"]+\.svg)"\s*/?></p>')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are no files of docs/: README.md as the home page, and the reference."""
    made = {
        HOME: (ROOT / "README.md").read_text(encoding="utf-8"),
        "reference/stage-file.md": stage_keys_page(),
        "reference/command-line.md": command_line_page(),
    }
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links as the site needs them; a file of the repository that is no page of it is named in place of a link."""
    is_home = page.file.src_uri == HOME
    source = ROOT / "README.md" if is_home else DOCS / page.file.src_uri

    def change(mark: str, text: str, target: str) -> str:
        if is_local(target):
            path = within(target, source)
            if not path.is_relative_to(DOCS) and path != ROOT / "README.md" and path.exists():
                return named(text, path)
            target = site_link(target, path, page.file.src_uri)
        return f"{mark}[{text}]({target})"

    return change_links(markdown, change)


def named(text: str, path: Path) -> str:
    """A link's text with the file that it leads to in the repository."""
    name = str(path.relative_to(ROOT))
    return f"`{name}`" if text.strip("`/") in (name, path.name) else f"{text} (`{name}`)"


def site_link(target: str, path: Path, page: str) -> str:
    """A link within docs/ (or to README.md) as one from `page` of the site, its anchor kept."""
    _, mark, anchor = target.partition("#")
    uri = HOME if path == ROOT / "README.md" else os.path.relpath(path, DOCS)
    return os.path.relpath(uri, Path(page).parent) + mark + anchor


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Drawings become part of the page: only so can they follow its light and dark."""

    def inline(match: re.Match[str]) -> str:
        drawing = within(match.group(2), Path(DOCS / page.file.src_uri))
        return (
            f'<div class="figure" role="img" aria-label="{match.group(1)}">{drawing.read_text(encoding="utf-8")}</div>'
        )

    return _DRAWING.sub(inline, html)
