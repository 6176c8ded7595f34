"""Every command of README.md and docs/ does what it says, in a tiny copy of the checkout."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import yaml

from llava_train.stage_file import parse_stage
from tests.docs import checks
from tests.docs.commands import NOT_RUN, PYTHON_NOT_RUN, Command, markdown, not_run, scripts_of, split
from tests.docs.home import make_home
from tests.docs.runner import Runner, forked
from tests.scripts import ROOT

PAGES = markdown.pages()
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
WITH_COMMANDS = [name for name in TEXTS if scripts_of(ROOT / name)]
TO_RUN = [name for name, text in TEXTS.items() if name in WITH_COMMANDS or "```python" in text]
WITH_YAML = [name for name, text in TEXTS.items() if "```yaml" in text]
OURS = re.compile(r"^\$? *(llava-train|deepspeed|torchrun|sbatch|pip|python|bash) \S", re.MULTILINE)
BASE = ROOT / "configs/llava-1.5-7b/stage2.yaml"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("docs") / "home"
    make_home(home)
    return home


@pytest.fixture
def home(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "home", symlinks=True)


@pytest.mark.parametrize("name", TO_RUN)
def test_the_commands_and_the_python_of_a_page_run(name: str, home: Path) -> None:
    """Those in fences and in prose, in their order, in a folder of the page's own; then its Python, as one program."""
    with Runner(home) as runner:
        done = [one for script in scripts_of(ROOT / name) for one in runner.run(script)]
    failed = [
        f"{one.command.place}: {one.command.text}\n  exit code {one.code}: {one.said[-1500:]}"
        for one in done
        if one.code
    ]
    program = python_of(name)
    if program.strip():
        (home / "page.py").write_text(program, encoding="utf-8")
        ran = forked(["page.py"], home, dict(os.environ))
        failed += [f"{name}, its lines being those of page.py:\n{ran['stderr'][-3000:]}"] if ran["code"] else []
    assert not failed, "\n\n".join(failed)
    assert len(done) == sum(map(len, scripts_of(ROOT / name)))


def python_of(name: str) -> str:
    """The blocks of Python of a page, each line where it stands there, but for what a test cannot run."""
    program: list[str] = []
    for block in markdown.blocks(TEXTS[name]):
        if block.language == "python":
            compile("\n" * (block.line - 1) + block.text, name, "exec")
            if not any(re.search(pattern, block.text) for pattern in PYTHON_NOT_RUN):
                program += [""] * (block.line - 1 - len(program)) + block.text.split("\n")
    return "\n".join(program)


@pytest.mark.parametrize("name", WITH_YAML)
def test_the_yaml_of_a_page_is_a_stage_file_or_a_part_of_one(name: str) -> None:
    base = yaml.safe_load(BASE.read_text(encoding="utf-8")) | {"engine": {"zero": 2}}
    for block in markdown.blocks(TEXTS[name]):
        if block.language == "yaml":
            content = yaml.safe_load(block.text)
            parse_stage(content if "model" in content else {**base, **content}, f"{name}:{block.line}")


@pytest.mark.parametrize("name", TEXTS)
def test_no_command_hides_from_the_tests(name: str) -> None:
    """One stands in a fence that says `bash`, or in prose as a code span: never indented, never in a nameless fence."""
    hidden = [
        f"{name}:{block.line}"
        for block in markdown.blocks(TEXTS[name])
        if not block.language and OURS.search(block.text)
    ]
    prose = markdown.prose(TEXTS[name]).split("\n")
    hidden += [
        f"{name}:{i}" for i, line in enumerate(prose, start=1) if line.startswith("    ") and OURS.match(line.strip())
    ]
    assert hidden == []


@pytest.mark.parametrize("rule", NOT_RUN, ids=lambda rule: rule.pattern)
def test_every_exception_is_needed(rule: object) -> None:
    commands = [command for name in WITH_COMMANDS for script in scripts_of(ROOT / name) for command in script]
    assert any(not_run(command.text) is rule for command in commands)


def test_a_command_that_fails_is_named_and_the_next_ones_run(home: Path) -> None:
    page = ROOT / "README.md"
    script = [
        Command(page, 3, "llava-train nonsense"),
        Command(page, 4, "X=$(llava-train schema | head -c 1)"),
        Command(page, 5, 'test "$X" = "{"'),
    ]
    with Runner(home) as runner:
        failed, *others = runner.run(script)
    assert failed.command.place == "README.md:3"
    assert failed.code == 2
    assert "No such command 'nonsense'" in failed.said
    assert [one.code for one in others] == [0, 0]


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ('pip install -c constraints.txt -e ".[nonsense]"', "no such extra: nonsense"),
        ("pip install -c missing.txt -e .", "no such file: missing.txt"),
        ("pip install 'llava_train[demo, nonsense]'", "no such extra: nonsense"),
        ("llava-train demo RUN --prot 7", "No such option"),
        ("llava-train evaluate RUN --metric vqa --quantize 4bit", "No such option"),
        ("bash scripts/test.sh.missing", "No such file"),
        ("sbatch scripts/slurm/missing.sbatch --config a.yaml", "no such file: scripts/slurm/missing.sbatch"),
        ("deepspeed --num_gpsu 8 scripts/train.py --config stage1.yaml", "unrecognized arguments"),
        ("python scripts/train.py --config stage1.yaml --set batch.sise=4", "did you mean"),
        ("nonsense --help", "command not found"),
    ],
)
def test_a_wrong_command_is_noticed(command: str, complaint: str, trained: Path) -> None:
    with Runner(trained) as runner:
        (done,) = runner.run([Command(ROOT / "README.md", 1, command)])
    assert done.code
    assert complaint in done.said


def test_a_script_is_cut_into_commands() -> None:
    script = "a 1   # why\n\n# only words\nb \\\n  2\ncurl -d @- <<END\n{\nEND\nfor x in 1 2; do\n  c $x\ndone\nd 'two\nlines'"
    assert list(split(script)) == [
        (0, "a 1   # why"),
        (3, "b \\\n  2"),
        (5, "curl -d @- <<END\n{\nEND"),
        (8, "for x in 1 2; do\n  c $x\ndone"),
        (11, "d 'two\nlines'"),
    ]


def test_names_of_commands_are_looked_up() -> None:
    assert checks.named(["llava-train", "plan"], ROOT) is None
    assert checks.named(["llava-train", "plna"], ROOT) == "no such command: llava-train plna"
    assert checks.named(["llava-train", "plan", "--json"], ROOT) is None
    assert checks.named(["llava-train", "plan", "--jsno"], ROOT) == "no such option: llava-train plan --jsno"
    assert checks.named(["python", "scripts/trian.py"], ROOT) == "no such file: scripts/trian.py"
