"""Settings of every test. What tests share stands in `tests/tiny.py`."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

# The models are tiny: threads that wait for each other on a busy machine made these tests ten times as slow.
torch.set_num_threads(1)

# A shell's background job ignores Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")


ROOT = Path(__file__).parents[1]
LONGEST_FIRST = (
    "tests/train/test_faults.py",
    "tests/cluster/test_slurm.py",
    "tests/train/test_memory.py",
    "tests/docs/test_commands.py",
    "tests/cluster/test_two_nodes.py",
    "tests/train/test_equivalence.py",
    "notebooks/3-your-own-data.ipynb",
    "tests/train/test_preemption.py",
    "tests/use/test_lmms_eval.py",
    "tests/train/test_elastic.py",
    "tests/use/test_demo.py",
    "tests/train/test_recipe.py",
    "tests/benchmarks/test_gpu.py",
    "tests/train/test_precompute.py",
    "tests/train/test_evaluate.py",
    "tests/inspect/test_plan.py",
    "tests/train/test_resume.py",
    "tests/train/test_dry_run.py",
    "notebooks/1-train-a-small-llava.ipynb",
    "notebooks/2-look-inside.ipynb",
    "tests/use/test_export_elsewhere.py",
    "tests/train/test_watchdog.py",
)
"""Files that take longest: they begin first, so that no process is left alone with one at the end."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {ROOT / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-skips",
        action="append",
        default=[],
        metavar="MARKER",
        help="where a test with this marker is skipped, it has failed: for machines that have all it needs",
    )


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser, driven by playwright."""
    playwright = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    wanted = [name for name in item.config.getoption("--no-skips") if item.get_closest_marker(name)]
    if report.skipped and wanted and not hasattr(report, "wasxfail"):
        *_, reason = report.longrepr
        report.outcome, report.longrepr = "failed", f"{reason}; --no-skips {wanted[0]} forbids that"
    return report
