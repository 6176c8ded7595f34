"""In which order the files of tests begin."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.conftest import LONGEST_FIRST, ROOT, pytest_collection_modifyitems


def test_the_files_that_take_longest_begin_first_and_tests_of_a_file_keep_their_order() -> None:
    names = [f"{LONGEST_FIRST[1]}::a", "tests/test_a.py::b", f"{LONGEST_FIRST[0]}::b", f"{LONGEST_FIRST[0]}::a"]
    items: Any = [SimpleNamespace(name=name, path=ROOT / name.partition("::")[0]) for name in names]
    pytest_collection_modifyitems(items)
    assert [item.name for item in items] == [names[i] for i in (2, 3, 0, 1)]


def test_they_are_there() -> None:
    assert [name for name in LONGEST_FIRST if not (ROOT / name).is_file()] == []
