"""Which packages the doctor finds missing, too old, broken or good to have."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.requirements import Requirement

from llava_train.doctor import packages
from llava_train.doctor.findings import Level


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions of installed packages, to be filled."""
    there: dict[str, str] = {}
    monkeypatch.setattr(packages, "installed", there.get)
    return there


def test_each_package_that_is_missing_or_too_old_is_named_with_the_command_that_mends_it(
    versions: dict[str, str],
) -> None:
    versions |= {"torch": "2.9.1+cu128", "peft": "0.21.2"}
    needs = [Requirement("torch>=2.11"), Requirement("deepspeed>=0.19"), Requirement("peft>=0.19")]
    old, missing, rest = packages.required(needs)
    assert (old.level, old.text, old.mend) == (
        Level.broken,
        "torch 2.9.1+cu128 is not >=2.11",
        "pip install 'torch>=2.11'",
    )
    assert (missing.level, missing.text) == (Level.broken, "deepspeed is not installed")
    assert (rest.level, rest.text) == (Level.ok, "peft 0.21.2; 1 of 3 packages are as needed")


def test_a_nightly_and_a_local_build_are_new_enough(versions: dict[str, str]) -> None:
    versions |= {"torch": "2.15.0.dev20261101+cu130"}
    (finding,) = packages.required([Requirement("torch>=2.11")])
    assert finding.level is Level.ok


def test_a_python_that_is_too_new_is_broken() -> None:
    (finding,) = packages.python_version("3.13.1")
    assert finding.level is Level.broken and "3.13.1" in finding.text
    (finding,) = packages.python_version("3.12.4")
    assert finding.level is Level.ok


def test_optional_packages_tell_what_they_would_give_and_a_broken_one_is_a_warning(versions: dict[str, str]) -> None:
    versions |= {"gradio": "6.31.0", "bitsandbytes": "0.50.2"}
    errors = {"gradio": None, "bitsandbytes": "ImportError: libcudart.so.13"}
    said = {finding.text.split()[0]: finding for finding in packages.optional(errors)}
    assert said["gradio"].level is Level.ok
    assert said["bitsandbytes"].level is Level.warning and "libcudart.so.13" in said["bitsandbytes"].text
    assert said["liger-kernel"].level is Level.note and said["liger-kernel"].mend == "pip install liger-kernel"
    assert "QLoRA" in next(one.gives for one in packages.OPTIONAL if one.distribution == "bitsandbytes")


def test_what_is_needed_is_read_from_the_metadata_without_extras() -> None:
    names = [need.name for need in packages.requirements()]
    assert "torch" in names and "gradio" not in names


def test_a_checkout_that_is_not_installed_is_examined_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "NAME", "llava_train_not_installed")
    (python,) = packages.python_version()
    assert python.level is Level.warning and "llava_train is not installed" in python.text
    assert packages.versions()["torch"]
    (rest,) = packages.required()
    assert rest.level is Level.ok


def test_an_extra_is_installed_from_the_checkout_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages._extra("demo") == "pip install -e '.[demo]'"
    monkeypatch.setattr(packages, "REPO", packages.PACKAGE)
    assert packages._extra("demo") == "pip install 'llava_train[demo]'"
    assert Path(packages.PACKAGE, "doctor").is_dir()
