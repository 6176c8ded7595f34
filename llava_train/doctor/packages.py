"""This Python and its packages: what is missing or too old, and what optional packages would give."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from llava_train.doctor.findings import Finding, Level
from llava_train.slurm import PACKAGE, REPO

NAME = "llava_train"
SHOWN = ("torch", "transformers", "deepspeed", "peft", "datasets", "pydantic", "tensorboard", "wandb")
"""Required packages whose versions are told even when all is well."""


@dataclass(frozen=True)
class OptionalPackage:
    """A package that nothing needs until it is asked for."""

    distribution: str
    module: str
    gives: str
    install: str


def _extra(name: str) -> str:
    """The command that installs an extra, from the checkout where there is one."""
    return f"pip install 'llava_train[{name}]'" if REPO == PACKAGE else f"pip install -e '.[{name}]'"


OPTIONAL = (
    OptionalPackage(
        "flash-attn", "flash_attn", "FlashAttention over packs, in place of torch's", "pip install flash-attn"
    ),
    OptionalPackage("liger-kernel", "liger_kernel", "`engine.kernels: liger` on GPUs", "pip install liger-kernel"),
    OptionalPackage("bitsandbytes", "bitsandbytes", "4-bit base weights (QLoRA), `--quantize`", _extra("qlora")),
    OptionalPackage("gradio", "gradio", "the page of `llava-train demo`", _extra("demo")),
    OptionalPackage(
        "lmms-eval",
        "lmms_eval",
        "`llava-train lmms-eval` without `--python`",
        f"{_extra('eval')}, best in an environment of its own",
    ),
)


def installed(distribution: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def requirements() -> list[Requirement]:
    """What this package needs, extras left out; some of it, of any version, where this package is not installed."""
    try:
        every = [Requirement(line) for line in metadata.requires(NAME) or []]
    except metadata.PackageNotFoundError:
        every = [Requirement(name) for name in SHOWN]
    return [one for one in every if one.marker is None or one.marker.evaluate({"extra": ""})]


def versions() -> dict[str, str | None]:
    """The version of each package that is needed or would be of use."""
    names = [one.name for one in requirements()] + [one.distribution for one in OPTIONAL]
    return {name: installed(name) for name in names}


def python_version(version: str = platform.python_version()) -> Iterator[Finding]:
    try:
        wanted = metadata.metadata(NAME)["Requires-Python"] or ""
    except metadata.PackageNotFoundError:
        text = f"Python {version}; llava_train is not installed, so that the versions it needs are not known"
        yield Finding("python", Level.warning, text, "pip install -e . in the checkout")
        return
    if SpecifierSet(wanted).contains(version, prereleases=True):
        yield Finding("python", Level.ok, f"Python {version}, llava_train {installed(NAME)}")
    else:
        yield Finding(
            "python", Level.broken, f"Python {version} is not {wanted}", "install one that is, or use uv/conda"
        )


def required(needs: list[Requirement] | None = None) -> Iterator[Finding]:
    """One finding for each package that is missing or too old, and one for the rest."""
    needs = requirements() if needs is None else needs
    fitting: dict[str, str] = {}
    for need in needs:
        version, install = installed(need.name), f"pip install '{need}'"
        if version is None:
            yield Finding("packages", Level.broken, f"{need.name} is not installed", install)
        elif not need.specifier.contains(Version(version).public, prereleases=True):
            yield Finding("packages", Level.broken, f"{need.name} {version} is not {need.specifier}", install)
        else:
            fitting[need.name] = version
    shown = ", ".join(f"{name} {fitting[name]}" for name in SHOWN if name in fitting)
    yield Finding("packages", Level.ok, f"{shown}; {len(fitting)} of {len(needs)} packages are as needed")


def optional(errors: Mapping[str, str | None]) -> Iterator[Finding]:
    """What optional packages give, or would give.

    Args:
        errors: of each installed one, by module, what importing it raised; None when it works.
    """
    for one in OPTIONAL:
        version, error = installed(one.distribution), errors.get(one.module)
        if version is None:
            yield Finding("optional", Level.note, f"{one.distribution} would give {one.gives}", one.install)
        elif error:
            text = f"{one.distribution} {version} cannot be imported: {error}"
            yield Finding(
                "optional", Level.warning, text, f"install it again for this torch, or remove it: {one.install}"
            )
        else:
            yield Finding("optional", Level.ok, f"{one.distribution} {version} gives {one.gives}")
