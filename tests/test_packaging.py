"""What `pip install .` gives: a wheel that is whole, and trains away from the checkout."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from llava_train import __version__
from llava_train.doctor.trial import write_stage
from tests.train.helpers import ROOT, TIMEOUT_S

FOLDERS = ("llava_train", "configs", "docs", "notebooks", "scripts", "tests", ".ci")


def below(*folders: str) -> list[str]:
    """The files in folders of the checkout, by their path in it."""
    every = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return [str(path.relative_to(ROOT)) for path in every if path.is_file() and "__pycache__" not in path.parts]


def sources() -> list[str]:
    """Those that are committed, but for benchmarks: data/ and runs/ may be large."""
    alone = [*ROOT.glob("*"), *(ROOT / "data").glob("*")]
    return below(*FOLDERS) + [str(path.relative_to(ROOT)) for path in alone if path.is_file()]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of a clean copy of the checkout, and the wheel that is made of that sdist alone."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in sources():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name, follow_symlinks=False)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", copy / "dist", copy],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return copy / "dist"


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of an environment with the wheel, and with the packages of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    own = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", vars=own))
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--ignore-installed", wheel], check=True)
    return folder / "bin"


def run(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the installed `llava-train`, away from the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{installed}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        [installed / "llava-train", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def test_the_wheel_has_every_file_of_the_package_and_no_other(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == set(below("llava_train"))
    assert {"llava_train/py.typed", "llava_train/data/templates/vicuna_v1.jinja"} <= names


def test_the_wheel_tells_its_version_licence_and_extras(built: Path) -> None:
    (wheel,) = built.glob(f"llava_train-{__version__}-*.whl")
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = archive.read(name).decode()
    assert {"demo", "eval", "qlora", "docs", "dev"} <= set(
        re.findall(r"^Provides-Extra: (.*)$", metadata, re.MULTILINE)
    )
    assert re.search(r"^License(-Expression)?: MIT$", metadata, re.MULTILINE)
    assert any(name.endswith("/LICENSE") for name in archive.namelist())


def test_the_sdist_has_what_a_reader_of_the_source_needs(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.cfg", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"} <= names
    assert set(below("configs", "docs", "notebooks", "scripts", "tests", ".ci")) - names == set()


def test_an_installed_wheel_examines_its_machine_and_trains_a_step(installed: Path, tmp_path: Path) -> None:
    assert run(installed, tmp_path, "--version").stdout == f"llava-train {__version__}\n"
    done = run(installed, tmp_path, "doctor", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0, report
    assert report["ready"] and report["output"] is None
    said = {finding["topic"]: finding for finding in report["findings"]}
    assert re.match(r"one step on .* in [\d.]+ s", said["training"]["text"])
    assert report["versions"]["torch"] and "tensorboard" in report["versions"]
    assert list(tmp_path.iterdir()) == [], "the doctor left something behind"


def test_an_installed_wheel_has_its_templates(installed: Path, tmp_path: Path) -> None:
    write_stage(tmp_path)
    done = run(installed, tmp_path, "preview", "--config", "stage.yaml", "--html", "preview.html")
    assert done.returncode == 0, done.stderr
    assert "ASSISTANT: " in done.stdout
    assert "Which colour?" in (tmp_path / "preview.html").read_text()


def test_an_installed_wheel_submits_jobs_of_its_own_scripts(installed: Path, tmp_path: Path) -> None:
    write_stage(tmp_path)
    done = run(installed, tmp_path, "slurm", "--config", "stage.yaml", "--gpus", "2", "--dry-run")
    assert done.returncode == 0, done.stderr
    (package,) = re.findall(r"LLAVA_SLURM_REPO=(\S+)", done.stdout)
    assert Path(package).name == "llava_train" and Path(package).is_relative_to(installed.parent)
    assert (Path(package) / "scripts/train.py").is_file() and (Path(package) / "scripts/torchrun.py").is_file()


def test_every_extra_that_is_named_anywhere_exists() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = set(setup["options.extras_require"])
    named: dict[str, list[str]] = {}
    for name in sources():
        if name.endswith((".py", ".md", ".sh", ".yaml", ".ipynb", ".cfg")) or name == ".ci/run":
            text = (ROOT / name).read_text(encoding="utf-8")
            for extra in re.findall(r"""['" ](?:llava_train|\.)\[(\w{2,})\]|make_venv (\w+)""", text):
                named.setdefault(next(filter(None, extra)), []).append(name)
    assert {"demo", "qlora", "dev", "notebooks"} <= set(named)
    named.pop("nonsense", None)  # what tests call one that does not exist
    assert {extra: where for extra, where in named.items() if extra not in extras} == {}


def test_every_requirement_is_pinned_for_reproducible_installs() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    wanted = setup["options"]["install_requires"] + setup["options.extras_require"]["dev"]
    lines = [line.strip() for line in wanted.splitlines() if line.strip() and not line.startswith("#")]
    names = {re.split(r"[<>=\[;]", line)[0].lower().replace("_", "-") for line in lines}
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert names - {pin.partition("==")[0].lower().replace("_", "-") for pin in pins} == set()


def test_the_citation_has_what_its_form_needs() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == __version__
    assert all({"type", "title", "authors"} <= set(reference) for reference in citation["references"])
