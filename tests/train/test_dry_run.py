from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.train.dry_run_worker import CASES
from tests.train.equivalence_worker import STEPS
from tests.train.helpers import run_ranks, write_samples


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    data = write_samples(tmp_path_factory.mktemp("dry_run") / "data.json", "".join(STEPS))
    out = data.with_name("results.pt")
    run_ranks(["-m", "tests.train.dry_run_worker", data, out], data.parent, n_ranks=2).check()
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_changes_no_bit_of_what_follows(name: str, results: dict[str, Any]) -> None:
    without, after = results[name]
    assert without["losses"] == after["losses"]
    assert without["norms"] == after["norms"]
    assert without["skipped"] == after["skipped"] == 0
    assert without["weights"].keys() == after["weights"].keys()
    assert all(torch.equal(weight, after["weights"][name]) for name, weight in without["weights"].items())
