"""What metrics.jsonl says of each source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.helpers import Outcome, read_lines, run_many, write_samples, write_stage

KINDS = {"pictures": "iimixii", "texts": "tttbt"}
"""One picture of each source is missing or no picture."""
RUNS = {"every": 1, "windows": 3}
"""Steps between lines."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for number, (name, kinds) in enumerate(KINDS.items()):
        write_samples(folder / f"{name}.json", kinds, seed=number)
    return folder


def stage(folder: Path, name: str, every: int) -> list[Any]:
    return [
        "--config",
        write_stage(
            folder / f"{name}.yaml",
            data=[{"path": "pictures.json"}, {"path": "texts.json", "name": "words"}],
            on_bad_sample="skip",
            max_bad_share=1.0,
            logging={"every": every},
            schedule={"epochs": 2.0},
            batch={"size": 5, "max_tokens": 400, "max_sample_tokens": 400},
        ),
    ]


@pytest.fixture(scope="module")
def finished(folder: Path) -> dict[str, Outcome]:
    """Runs on one and on two ranks, by name; what they logged is in the folder."""
    alone = run_many({f"{name}-1": stage(folder, f"{name}-1", every) for name, every in RUNS.items()}, folder)
    both = run_many({f"{name}-2": stage(folder, f"{name}-2", every) for name, every in RUNS.items()}, folder, n_ranks=2)
    outcomes = {name: ranks[0] for name, ranks in (alone | both).items()}
    assert all(outcome.code == 0 for outcome in outcomes.values()), [o.stderr for o in outcomes.values()]
    return outcomes


def lines_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return read_lines(folder / "runs" / name / "metrics.jsonl")


def total(lines: list[dict[str, Any]], source: str, key: str) -> int:
    return sum(line["sources"].get(source, {}).get(key, 0) for line in lines)


def n_supervised_by_hand(path: Path, bad: str) -> int:
    """A token a byte of each answer, and one for its end (ChatML)."""
    records = [record for record in json.loads(path.read_text()) if record["id"][-1] not in bad]
    answers = [turn["value"] for record in records for turn in record["conversations"] if turn["from"] == "gpt"]
    return sum(len(answer.encode()) + 1 for answer in answers)


@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize("name", ["every", "windows"])
def test_every_sample_and_supervised_token_is_counted_for_its_source(
    name: str, n_ranks: int, folder: Path, finished: dict[str, Outcome]
) -> None:
    lines = lines_of(folder, f"{name}-{n_ranks}")
    assert {source for line in lines for source in line["sources"]} == {"pictures", "words"}
    for source, file in {"pictures": "pictures", "words": "texts"}.items():
        # Of two epochs; a picture that turns out bad when it is decoded leaves its sample in its pack, unsupervised.
        assert total(lines, source, "n_samples") == 2 * len(KINDS[file])
        assert total(lines, source, "n_supervised") == 2 * n_supervised_by_hand(folder / f"{file}.json", "xb")
    assert lines[-1]["n_bad"] == 4, "so far"


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_the_loss_of_a_step_is_the_mean_over_its_sources(
    n_ranks: int, folder: Path, finished: dict[str, Outcome]
) -> None:
    lines = lines_of(folder, f"every-{n_ranks}")
    assert len(lines) == 6
    for line in lines:
        sources = line["sources"].values()
        assert sum(source["n_supervised"] for source in sources) == line["n_supervised"] > 0
        weighted = sum(source["loss"] * source["n_supervised"] for source in sources)
        assert weighted / line["n_supervised"] == pytest.approx(line["loss"], rel=1e-9)
    assert any(len({source["loss"] for source in line["sources"].values()}) == 2 for line in lines)


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_a_window_of_steps_is_the_sum_of_its_steps(n_ranks: int, folder: Path, finished: dict[str, Outcome]) -> None:
    steps, windows = (lines_of(folder, f"{name}-{n_ranks}") for name in ("every", "windows"))
    assert [line["step"] for line in windows] == [1, 3, 6]
    for first, line in zip([1, 2, 4], windows, strict=True):
        within = [step for step in steps if first <= step["step"] <= line["step"]]
        for name, source in line["sources"].items():
            assert source["n_samples"] == total(within, name, "n_samples")
            assert source["n_supervised"] == total(within, name, "n_supervised")
            of_steps = [step["sources"][name] for step in within if name in step["sources"]]
            loss_sum = sum(one["loss"] * one["n_supervised"] for one in of_steps)
            assert source["loss"] == pytest.approx(loss_sum / source["n_supervised"], rel=1e-6)


def test_the_number_of_ranks_changes_no_source(folder: Path, finished: dict[str, Outcome]) -> None:
    for name in RUNS:
        alone, both = (lines_of(folder, f"{name}-{n_ranks}") for n_ranks in (1, 2))
        for one, two in zip(alone, both, strict=True):
            assert one["sources"].keys() == two["sources"].keys()
            for source, values in one["sources"].items():
                assert two["sources"][source] == pytest.approx(values, rel=1e-4)
                counts = [{k: v for k, v in run["sources"][source].items() if k != "loss"} for run in (one, two)]
                assert counts[0] == counts[1]
