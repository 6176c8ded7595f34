"""report.html: a page of a run, or of several upon each other, that needs nothing but itself."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml

from llava_train.files import written_aside
from llava_train.report import facts
from llava_train.report.figures import N_COLOURS
from llava_train.report.histograms import histogram_figures
from llava_train.report.quantities import LEARNING, SPEED, figures
from llava_train.report.questions import questions
from llava_train.report.read import ReportError, RunRecord, read_run
from llava_train.report.times import shares_figure, time_spent
from llava_train.run_files import REPORT_FILE, flatten

_PATIENCE_S = 20.0
"""A job that is about to be ended has little more for its last words."""


def write_report(folders: Sequence[Path], path: Path, ended: bool = False) -> list[RunRecord]:
    """Writes the page of one run, or of several to compare, and returns what was read of them.

    Args:
        ended: the run does not go on by itself, so that one that is not complete was stopped.

    Raises:
        ReportError: a folder is no run, or has logged nothing yet.
    """
    records = _told_apart([read_run(folder) for folder in folders])
    text = page_of(records, ended)
    with written_aside(path) as file:
        file.write(text)
    return records


def _told_apart(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Runs of one name in several folders are named by these."""
    names = [record.name for record in records]
    return [replace(each, name=str(each.folder)) if names.count(each.name) > 1 else each for each in records]


def report_after_run(run_dir: Path) -> str | None:
    """Writes the report of a run that has ended, if it has logged anything; never raises.

    Returns:
        Why it could not be written, in a line.
    """
    failed: list[str] = [f"took over {_PATIENCE_S:.0f} s"]

    def write() -> None:
        try:
            write_report([run_dir], run_dir / REPORT_FILE, ended=True)
            failed.clear()
        except ReportError:
            failed.clear()  # nothing was logged
        except Exception as error:
            failed[:] = [str(error) or repr(error)]

    worker = threading.Thread(target=write, daemon=True)  # it shall not keep a process that must end
    worker.start()
    worker.join(_PATIENCE_S)
    return f"{run_dir / REPORT_FILE} is not written: {failed[0]}" if failed else None


def page_of(records: Sequence[RunRecord], ended: bool = False) -> str:
    """The page as text."""
    text = resources.files("llava_train.report").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(text).render(content(records, ended))


def content(records: Sequence[RunRecord], ended: bool = False) -> dict[str, Any]:
    """What the template shows."""
    alone = len(records) == 1
    shares = [shares_figure(record) for record in records] if alone else []
    asked, n_more = questions(records)
    runs = [_run(record, n, ended) for n, record in enumerate(records)]
    return {
        "title": records[0].name if alone else " · ".join(record.name for record in records),
        "alone": alone,
        "runs": runs,
        # Each run's are in order, so that those of the run with most have the places of the others'.
        "fact_names": list(
            {name: None for run in sorted(runs, key=lambda run: -len(run["facts"])) for name in run["facts"]}
        ),
        "sections": [
            ("Learning", figures(LEARNING, records)),
            ("Speed", [*figures(SPEED, records), *(figure for figure in shares if figure)]),
            ("Data", histogram_figures(records)),
        ],
        "questions": asked,
        "n_more_questions": n_more,
        "differences": [] if alone else facts.differences(records),
    }


def _run(record: RunRecord, number_of_run: int, ended: bool) -> dict[str, Any]:
    """What the template shows of one run."""
    bad_steps, n_more = facts.bad_steps(record)
    spent = time_spent(record)
    total_s = sum(part.seconds for part in spent)
    return {
        "name": record.name,
        "folder": str(record.folder),
        "colour": number_of_run % N_COLOURS,
        "state": facts.state_of(record, ended),
        "complete": record.complete,
        "facts": facts.facts(record),
        "notes": record.notes,
        "time": [(p.name, facts.duration(p.seconds), f"{100 * p.seconds / total_s:.1f}", p.colour) for p in spent],
        "left_out": facts.left_out(record),
        "bad_steps": bad_steps,
        "n_more_bad_steps": n_more,
        "config": yaml.safe_dump(record.config, sort_keys=False, allow_unicode=True) if record.config else "",
        "about": list(flatten(record.about)),
    }
