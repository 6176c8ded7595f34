"""The commands of README.md and docs/, how each is tested, and what is not really run.

python -m tests.docs.commands      prints how many there are, and which are not really run
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tests.docs import checks
from tests.docs.checks import Check
from tests.scripts import ROOT, load_script

markdown = load_script("scripts/docs/markdown_files.py")

SHELLS = ("bash", "sh", "shell", "console")
PROGRAMS = ("llava-train", "deepspeed", "torchrun", "python", "pip", "bash", "sbatch", "srun", "scancel", "scontrol")
PROGRAMS += ("jupyter", "mkdocs", "tensorboard", "vllm", "transformers", "wandb", "touch")
"""A code span that begins with one of these is a command."""
ABBREVIATED = {
    "train.py ...": "train.py --config stage1.yaml stage2.yaml",
    "llava_train train ...": "llava_train train --config stage1.yaml stage2.yaml",
    "--config ...": "--config stage1.yaml stage2.yaml",
    "evaluate ...": "evaluate RUN --data pope.jsonl --metric pope",
}
"""What `...` stands for in a code span."""


@dataclass(frozen=True)
class NotRun:
    """Commands that are looked at in place of being run.

    `pattern` is searched for in the command; `check` gets its arguments and says what is wrong with them.
    """

    pattern: str
    check: Check
    reason: str
    says: str = ""


_NO_4_BITS = NotRun(r"^(python|llava-train (plan|export)) .*-qlora", checks.nothing, "bitsandbytes is not installed")
NOT_RUN = (
    NotRun(r"^python3? -m venv\b", checks.nothing, "takes half a minute; nothing of ours is in it"),
    NotRun(r"\bpip install\b", checks.pip_install, "takes minutes and the network; files and extras are looked up"),
    NotRun(
        r"\bscripts/(quickstart|test)\.sh\b", checks.shell_script, "CI and its users run it; here its syntax is read"
    ),
    NotRun(r"^llava-train demo\b", checks.llava_train, "a server; tests/use/test_demo.py opens it in a browser"),
    NotRun(r"^llava-train .*--push-to-hub", checks.llava_train, "needs the hub"),
    NotRun(
        r"^llava-train lmms-eval\b",
        checks.llava_train,
        "another environment; tests/use/test_lmms_eval.py runs it in CI",
    ),
    NotRun(r"^llava-train .*--quantize", checks.llava_train, "needs CUDA"),
    NotRun(
        r"^(vllm|transformers) serve\b|sglang\.launch_server|^curl\b",
        checks.nothing,
        "a server of others, not installed here",
    ),
    NotRun(r"^(jupyter|tensorboard|mkdocs serve)\b|-m http\.server", checks.named_folders, "a server of others"),
    NotRun(r"^wandb\b", checks.nothing, "needs an account"),
    NotRun(r"^(hf|unzip)\b", checks.nothing, "downloads gigabytes"),
    NotRun(r"^llava-train doctor\b", checks.llava_train, "takes a fresh process; tests/doctor runs it"),
    NotRun(r"^sbatch\b", checks.sbatch, "tests/cluster runs it on a real SLURM; here its script is read", "71"),
    *([] if find_spec("bitsandbytes") else [_NO_4_BITS]),
    NotRun(r"^(srun|scancel|scontrol|squeue|sacct|sinfo)\b", checks.nothing, "tests/cluster has a real SLURM"),
)
"""Everything else is run, by bash, in a tiny copy of the checkout (`tests.docs.home`)."""

PYTHON_NOT_RUN = {r"llava-hf/|liuhaotian/": "downloads a 7B model"}
"""Blocks of Python in which one of these is found are compiled and not run."""


@dataclass(frozen=True)
class Command:
    """A command of a page."""

    page: Path
    line: int
    text: str
    in_prose: bool = False

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_name(self) -> bool:
        """Whether it names a command or option (`llava-train plan --json`) and is none to type."""
        program, *words = self.text.split()
        more = words[2:] if words[:1] == ["-m"] else words[1:]
        return self.in_prose and program in _NAMED and all(word.startswith("--") for word in more)


_NAMED = ("llava-train", "deepspeed", "torchrun", "python", "bash", "sbatch", "vllm", "transformers", "jupyter")


def scripts_of(page: Path) -> list[list[Command]]:
    """The commands of a page, those of a fenced block together; code spans come after the blocks."""
    text = page.read_text(encoding="utf-8")
    found = []
    for block in markdown.blocks(text):
        if block.language == "console":
            found.append([Command(page, block.line + i, line[2:]) for i, line in _typed(block.text)])
        elif block.language in SHELLS:
            found.append([Command(page, block.line + i, command) for i, command in split(block.text)])
    for line, span in markdown.code_spans(text):
        if span.split(" ")[0] in PROGRAMS and " " in span:
            for short, full in ABBREVIATED.items():
                span = span.replace(short, full)
            found.append([Command(page, line, span, in_prose=True)])
    return [script for script in found if script]


def _typed(text: str) -> Iterator[tuple[int, str]]:
    return ((i, line) for i, line in enumerate(text.split("\n")) if line.startswith("$ "))


def split(script: str) -> Iterator[tuple[int, str]]:
    """The commands of a shell script, with the line on which each begins, from 0.

    Lines belong together until bash understands them: continued ones, quotes, loops, texts up to `END`.
    """
    begun: list[str] = []
    for number, line in enumerate(script.split("\n")):
        if not begun and (not line.strip() or line.lstrip().startswith("#")):
            continue
        begun.append(line)
        text = "\n".join(begun)
        if _is_whole(text):
            yield number - len(begun) + 1, text
            begun = []
    if begun:
        raise ValueError("not shell: " + "\n".join(begun))


def _is_whole(text: str) -> bool:
    if text.endswith("\\"):
        return False
    simple = re.fullmatch(r"[^\n<'\"(){};]*", text) and not re.match(r"(for|while|if|case|until)\b", text)
    if simple:
        return True
    read = subprocess.run(["/bin/bash", "-n", "-c", text], capture_output=True, text=True, check=False)
    return read.returncode == 0 and not read.stderr


def not_run(command: str) -> NotRun | None:
    """Why a command is not run; None for those that are."""
    line = " ".join(command.replace("\\\n", " ").split())
    parts = [part.strip() for part in line.split("&&")]
    return next((one for one in NOT_RUN for part in parts if re.search(one.pattern, part)), None)


def main() -> None:
    pages = markdown.pages()
    scripts = [script for page in pages for script in scripts_of(page)]
    commands = [command for script in scripts for command in script]
    names = [command for command in commands if command.is_name]
    whole = [command for command in commands if not command.is_name]
    reasons = Counter(one.reason if (one := not_run(command.text)) else "" for command in whole)
    print(
        f"{len(pages)} pages, {len(whole)} commands: {reasons.pop('', 0)} are run for real, {sum(reasons.values())} are"
    )
    print(f"parsed and looked up only; {len(names)} names of commands are looked up, too")
    for reason, count in reasons.most_common():
        print(f"  {count:3} {reason}")


if __name__ == "__main__":
    main()
