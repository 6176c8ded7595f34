"""README.md and the pages of docs/, as Markdown: fences, links, anchors."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^( *)(```+|~~~+) *([\w+-]*)[^`]*$")
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)(?: \"[^\"]*\")?\)")
_CODE_SPAN = re.compile(r"(`+)(.+?)\1", re.DOTALL)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:|//|#")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language ("" for none), its text, and the line of its first line, from 1."""

    language: str
    text: str
    line: int


def pages() -> list[Path]:
    """README.md and every page of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page; one that is indented, in a list, loses its indentation."""
    found: list[Block] = []
    opened: tuple[str, str, str, int] | None = None
    inside: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if opened:
            indentation, fence, language, first = opened
            if line.strip() == fence:
                found.append(Block(language, "\n".join(inside), first))
                opened = None
            else:
                inside.append(line.removeprefix(indentation))
        elif match := _FENCE.match(line):
            opened, inside = (*match.groups(), number + 1), []  # type: ignore[assignment]
    return found


def prose(text: str) -> str:
    """The page with every line of its fenced blocks empty, so that lines keep their numbers."""
    lines = text.split("\n")
    for block in blocks(text):
        n_lines = block.text.count("\n") + 1
        lines[block.line - 2 : block.line + n_lines] = [""] * (n_lines + 2)
    return "\n".join(lines)


def code_spans(text: str) -> Iterator[tuple[int, str]]:
    """Line and content of the code spans of a page outside fences; one that goes over a line end has a space there."""
    without_fences = prose(text)
    for match in _CODE_SPAN.finditer(without_fences):
        yield without_fences.count("\n", 0, match.start()) + 1, " ".join(match.group(2).split())


def links(text: str) -> Iterator[tuple[int, str]]:
    """Line and target of the links and pictures of a page."""
    plain = _CODE_SPAN.sub(lambda match: re.sub(r"[^\n]", "x", match.group()), prose(text))
    for match in _LINK.finditer(plain):
        yield plain.count("\n", 0, match.start()) + 1, match.group(3)


def is_local(target: str) -> bool:
    """Whether a link leads to a file beside the page."""
    return _SCHEME.match(target) is None


def change_links(text: str, change: Callable[[str, str, str], str]) -> str:
    """The page with each link or picture replaced by `change("!" or "", text, target)`, but for fences."""
    lines, skipped = text.split("\n"), prose(text).split("\n")
    for number, line in enumerate(skipped):
        if line:
            lines[number] = _LINK.sub(lambda match: change(*match.groups()), line)
    return "\n".join(lines)


def anchors(text: str) -> set[str]:
    """The anchors that the headings of a page have, as GitHub and the site make them."""
    found: set[str] = set(re.findall(r"<a id=\"([^\"]+)\"", text))
    for heading in re.findall(r"^#+ +(.+?) *#*$", prose(text), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        repeats = sum(
            anchor == plain or re.fullmatch(re.escape(plain) + r"[-_]\d+", anchor) is not None for anchor in found
        )
        found.add(f"{plain}-{repeats}" if repeats else plain)
    return found


def within(target: str, page: Path) -> Path:
    """The file that a local link of a page leads to."""
    return Path(os.path.normpath(page.parent / target.partition("#")[0]))
