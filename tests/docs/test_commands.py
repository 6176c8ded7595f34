"""Every command of README.md and docs/ does what it says, in a tiny copy of the checkout."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.docs import checks
from tests.docs.commands import NOT_RUN, Command, markdown, not_run, scripts_of, split
from tests.docs.home import make_home
from tests.docs.runner import Runner
from tests.scripts import ROOT

PAGES = [page for page in markdown.pages() if scripts_of(page)]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("docs") / "home"
    make_home(home)
    return home


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_commands_of_a_page_run(page: Path, trained: Path, tmp_path: Path) -> None:
    """Those in fences and in prose, in their order, in a folder of the page's own."""
    home = shutil.copytree(trained, tmp_path / "home", symlinks=True)
    failed = []
    with Runner(home) as runner:
        for script in scripts_of(page):
            whole = [command for command in script if not command.is_name]
            for done in runner.run(whole):
                if done.code:
                    failed.append(f"{done.command.place}: {done.command.text}\n  exit code {done.code}: {done.said[-2000:]}")
    assert not failed, "\n\n".join(failed)
