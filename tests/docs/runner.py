"""Runs the commands of a page in bash, where `python`, `llava-train` and the launchers are stand-ins.

A new process with torch takes seconds on a small machine, and a page has a dozen. So a stand-in hands its arguments to
this process, over a socket, which forks one that has made the imports (`tests.train.helpers`). What a command of
`NOT_RUN` is asked is looked at in place of being run. The shell itself is real: variables, pipes, texts up to `END`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from tests.docs import checks
from tests.docs.commands import Command, not_run
from tests.train.helpers import TIMEOUT_S, start_ranks, wait

STAND_INS = ("llava-train", "python", "python3", "pip", "deepspeed", "torchrun", "git", "sbatch", "srun", "scancel")
STAND_INS += (
    "scontrol",
    "squeue",
    "sacct",
    "sinfo",
    "vllm",
    "transformers",
    "curl",
    "jupyter",
    "tensorboard",
    "mkdocs",
)
STAND_INS += ("wandb", "hf", "unzip", "nvidia-smi", "bash")
N_RANKS = 2
"""Of a launcher that was asked for more: two do all that eight do."""

_ENDS = 'tail() { command tail "${@/#-f/-n1}"; }'
"""What would follow a file for ever."""
_environment = threading.Lock()
"""Of this process, which those that it forks inherit."""

_CLIENT = """#!{python} -SE
import json, os, socket, sys
asked = {{"words": [os.path.basename(sys.argv[0]), *sys.argv[1:]], "cwd": os.getcwd(), "env": dict(os.environ)}}
line = socket.socket(socket.AF_UNIX)
line.connect({address!r})
line.sendall(json.dumps(asked).encode())
line.shutdown(socket.SHUT_WR)
reply = json.loads(b"".join(iter(lambda: line.recv(1 << 16), b"")))
sys.stdout.write(reply["stdout"])
sys.stdout.flush()
sys.stderr.write(reply["stderr"])
sys.exit(reply["code"])
"""


@dataclass(frozen=True)
class Outcome:
    """What a command did: its exit code, standard output and error together."""

    command: Command
    code: int
    said: str


class Runner:
    """Bash in a folder, with stand-ins for our programs and for what a test must not start. A context manager."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._tools = tempfile.TemporaryDirectory(prefix="llava-train-docs-")
        self._bin = Path(self._tools.name) / "bin"

    def __enter__(self) -> Runner:
        self._bin.mkdir()
        self._listener = socket.socket(socket.AF_UNIX)
        address = str(Path(self._tools.name) / "asked")
        self._listener.bind(address)
        self._listener.listen()
        places = [self._bin / name for name in STAND_INS]
        for place in [*places, *self.home.glob("*/bin/p*")]:
            place.write_text(_CLIENT.format(python=sys.executable, address=address))
            place.chmod(0o755)
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._tools.cleanup()

    def run(self, script: Sequence[Command]) -> list[Outcome]:
        """Runs commands one after another in one shell, a failed one too does not end it."""
        mark = "\x1e"
        names = {command.text: checks.named(command.text.split(), self.home) for command in script if command.is_name}
        if names:  # a code span stands alone
            (wrong,) = names.values()
            return [Outcome(script[0], 1 if wrong else 0, wrong or "")]
        lines = [f"{command.text}\nprintf '{mark}%s{mark}' $?" for command in script]
        done = subprocess.run(
            ["/bin/bash", "-o", "pipefail", "-c", "\n".join([_ENDS, *lines])],
            cwd=self.home,
            env={**os.environ, "PATH": f"{self._bin}:/usr/bin:/bin", "HOME": str(self.home)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
            check=False,
        ).stdout.decode(errors="replace")
        said = re.split(f"{mark}(\\d+){mark}", done)
        return [Outcome(one, int(code), text) for one, text, code in zip(script, said[::2], said[1::2], strict=False)]

    def _serve(self) -> None:
        while True:
            try:
                line, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=_reply_to, args=(line,), daemon=True).start()  # what is asked may ask in its turn


def _reply_to(line: socket.socket) -> None:
    with line:
        asked = json.loads(b"".join(iter(lambda: line.recv(1 << 16), b"")))
        try:
            reply = answer(asked["words"], Path(asked["cwd"]), asked["env"])
        except Exception:
            reply = _reply(70, stderr=traceback.format_exc())
        line.sendall(json.dumps(reply).encode())


def answer(words: list[str], cwd: Path, env: dict[str, str]) -> dict[str, Any]:
    """Does what a program was asked, or looks at it."""
    program, *arguments = words
    if exception := not_run(shlex.join(words)):
        wrong = exception.check(words, cwd)
        return _reply(64, stderr=wrong) if wrong else _reply(0, stdout=exception.says)
    if program == "llava-train":
        return forked(["-m", "llava_train", *arguments], cwd, env)
    if program.startswith("python"):
        return forked(_as_file(arguments, cwd), cwd, env)
    if program in ("deepspeed", "torchrun"):
        return forked(launched(program, arguments), cwd, env, N_RANKS)
    done = subprocess.run(["/usr/bin/env", *words], cwd=cwd, capture_output=True, text=True, check=False)
    return _reply(done.returncode, done.stdout, done.stderr)


def forked(arguments: list[str], cwd: Path, env: dict[str, str], n_ranks: int = 1) -> dict[str, Any]:
    """`python ARGUMENTS` on each of the ranks."""
    with tempfile.TemporaryDirectory() as said:
        with _environment, mock.patch.dict(os.environ, env, clear=True):
            started = start_ranks(arguments, cwd, n_ranks, Path(said))
        done = wait(started, Path(said), TIMEOUT_S)
    return _reply(max(done.codes, key=abs), "".join(done.stdout), "".join(done.stderr))


def launched(program: str, arguments: list[str]) -> list[str]:
    """What a launcher would start on each rank, by its own parser. Raises ValueError with what that says."""
    from deepspeed.launcher.runner import parse_args as parse_deepspeed
    from torch.distributed.run import parse_args as parse_torchrun

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            if program == "deepspeed":
                asked = parse_deepspeed(arguments)
                return [*(["-m"] if asked.module else []), asked.user_script, *asked.user_args]
            asked = parse_torchrun(arguments)
            return [*(["-m"] if asked.module else []), asked.training_script, *asked.training_script_args]
    except SystemExit:
        raise ValueError(said.getvalue()) from None


def _as_file(arguments: list[str], cwd: Path) -> list[str]:
    """`python -c CODE` as a file."""
    if arguments[0] != "-c":
        return arguments
    file = cwd / ".code.py"
    file.write_text(arguments[1], encoding="utf-8")
    return [str(file), *arguments[2:]]


def _reply(code: int, stdout: str = "", stderr: str = "") -> dict[str, Any]:
    return {"code": code, "stdout": stdout, "stderr": stderr}
