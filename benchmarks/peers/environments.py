"""An environment for each peer, made with pip below `benchmarks/.peers` (or the folder in LLAVA_PEERS).

A machine that cannot reach an index may have them ready: `FOLDER/NAME/bin/python` is used where it exists, be it a
virtual environment or a script that starts another python.

torch: each peer gets the newest that its own requirements allow, 2.13.0 where they only name a lower bound. There is no
CPU build of torchvision and torchaudio for that one. transformers then prepares pictures with Pillow, and
LLaMA-Factory, which imports torchaudio for sounds that no sample has, finds an empty module in its place.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(os.environ.get("LLAVA_PEERS", Path(__file__).parents[1] / ".peers"))
_STUB = '"""Stands in for a package that is imported but not used here; benchmarks/peers/environments.py made it."""\n'


@dataclass(frozen=True)
class Environment:
    python: tuple[str, ...]
    """Interpreters to try, by preference."""
    packages: str
    without_dependencies: str = ""
    """A package whose pins cannot be met, or which wants what is not used here (gradio, bitsandbytes)."""
    on_cuda: str = ""
    on_cuda_if_it_builds: str = ""
    """Has no wheel on the index: where it cannot be built, the comparison's table says that it lacks."""
    stubs: dict[str, str] = field(default_factory=dict)
    """File below site-packages -> content."""


ENVIRONMENTS = {
    "trl": Environment(
        ("python3.11", "python3.12"),
        """torch==2.13.0 trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 peft==0.21.2
        pillow==12.3.0 psutil""",
        on_cuda="liger-kernel==0.8.5",
        on_cuda_if_it_builds="flash-attn==2.8.3",
    ),
    "llamafactory": Environment(
        ("python3.11", "python3.12"),
        """torch==2.13.0 transformers==5.6.0 accelerate==1.11.0 datasets==4.0.0 peft==0.18.1 trl==0.24.0
        torchdata==0.11.0 tyro<0.9 einops fire omegaconf packaging pandas protobuf pydantic pyyaml scipy sentencepiece
        tiktoken matplotlib av<=16.0.0 pillow psutil""",
        without_dependencies="llamafactory==0.9.5",
        on_cuda="liger-kernel==0.8.5",
        on_cuda_if_it_builds="flash-attn==2.8.3",
        stubs={"torchaudio.py": _STUB},
    ),
    "llava": Environment(
        ("python3.10", "python3.11"),
        """torch==2.0.1 torchvision==0.15.2 transformers==4.36.2 tokenizers==0.15.0 sentencepiece==0.1.99
        accelerate==0.21.0 peft==0.4.0 einops==0.6.1 numpy<2 pillow psutil requests shortuuid""",
        without_dependencies="llava-torch==1.2.2.post1",
        on_cuda_if_it_builds="flash-attn==2.3.6",
    ),
}


def python_of(peer: str, on_cuda: bool) -> Path:
    """The peer's interpreter, its environment made where it is missing. Raises SystemExit with pip's words."""
    if peer == "none":
        return Path(sys.executable)
    python = FOLDER.resolve() / peer / "bin" / "python"
    if not python.exists():
        _make(ENVIRONMENTS[peer], FOLDER / peer, on_cuda)
    return python


def _make(environment: Environment, folder: Path, on_cuda: bool) -> None:
    print(f"making {folder} (minutes)", file=sys.stderr)
    building = folder.with_name(folder.name + ".building")
    _run([_interpreter(environment), "-m", "venv", "--clear", str(building)])
    pip = [str(building / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    if environment.without_dependencies:
        _run([*pip, "--no-deps", environment.without_dependencies])
    _run([*pip, *environment.packages.split(), *(environment.on_cuda.split() if on_cuda else ())])
    if on_cuda and environment.on_cuda_if_it_builds:
        _try([*pip, "ninja", "packaging", "wheel", "setuptools<81"])
        _try([*pip, "--no-build-isolation", "--no-deps", environment.on_cuda_if_it_builds])
    (site,) = (building / "lib").glob("python3*/site-packages")
    for name, content in environment.stubs.items():
        (site / name).write_text(content, encoding="utf-8")
    building.rename(folder)  # scripts of the environment name the old path; `bin/python` does not


def _interpreter(environment: Environment) -> str:
    pyenv = Path.home() / ".pyenv" / "versions"
    for name in environment.python:
        minor = name.removeprefix("python")
        installed = [str(path) for path in sorted(pyenv.glob(f"{minor}.*/bin/python"))]
        for candidate in (name, *installed):
            try:
                said = subprocess.run([candidate, "--version"], capture_output=True, text=True, check=False).stdout
            except OSError:
                continue
            if said.startswith(f"Python {minor}."):
                return candidate
    raise SystemExit(f"error: none of {', '.join(environment.python)} is installed")


def _try(command: list[str]) -> None:
    try:
        _run(command)
    except SystemExit as error:
        print(f"left out: {str(error).splitlines()[0]}", file=sys.stderr)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
