"""The cluster that the tests of this folder share, and the data that their runs train on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm import Cluster, ClusterUnavailable, start_cluster
from tests.train.helpers import ROOT


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    try:
        with start_cluster(tmp_path_factory.mktemp("slurm")) as started:
            yield started
    except ClusterUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of the smoke recipe, in a folder where runs can have folders of their own beside it."""
    return Path(shutil.copytree(ROOT / "configs/smoke/data", tmp_path_factory.mktemp("shared") / "data"))
