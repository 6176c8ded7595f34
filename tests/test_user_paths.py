"""`~` is the home folder, and a variable is refused: in every path of a stage file and on every command line."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from PIL import Image
from typer.testing import CliRunner

from llava_train.cli import app, run
from llava_train.config import StageConfig
from llava_train.errors import UserError
from llava_train.places import is_path_key
from llava_train.stage_file import ConfigError, load_stage
from llava_train.use.images import read_image
from llava_train.user_paths import PathError, expand
from tests.tiny import LANGUAGE_MODEL, stage_content

GROUP: Any = typer.main.get_command(app)
PATH_KEYS = (
    "output",
    "init_from",
    "model.language_model",
    "model.vision_tower",
    "model.chat_template",
    "data.0.path",
    "data.0.images",
    "data.0.images.coco",
    "eval.data.0.path",
    "eval.data.0.images",
    "eval.questions.path",
    "eval.questions.images",
    "engine.deepspeed",
    "model.language_model.tokenizer",
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder; tests run in another one."""
    (tmp_path / "work").mkdir()
    (tmp_path / "home/x").mkdir(parents=True)
    (tmp_path / "home/template.jinja").write_text("x")
    (tmp_path / "home/ds.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def stage_with(key: str, value: str) -> dict[str, Any]:
    """A stage file where a key has a value, and whatever that key needs."""
    content = stage_content(Path("data.json"))
    if key.startswith("eval"):
        content["eval"] = {"every": 1, "data": [{"path": "x"}], "metric": "exact", "questions": {"path": "q.json"}}
    if key.startswith("model.language_model."):
        content["model"]["language_model"] = {"config": LANGUAGE_MODEL}
    if key == "data.0.images.coco":
        content["data"][0]["images"] = {}
    node: Any = content
    *parents, last = key.split(".")
    for name in parents:
        node = node[int(name)] if isinstance(node, list) else node[name]
    node[last] = value
    return content


def at(config: StageConfig, key: str) -> Any:
    node: Any = config.model_dump(mode="json")
    for name in key.split("."):
        node = node[int(name)] if isinstance(node, list) else node[name]
    return node


def file_for(key: str) -> str:
    return {"model.chat_template": "template.jinja", "engine.deepspeed": "ds.json"}.get(key, "x")


@pytest.mark.parametrize("key", PATH_KEYS)
def test_a_home_folder_is_replaced_and_a_variable_refused_in_every_path_of_a_stage_file(key: str, home: Path) -> None:
    file = file_for(key)
    Path("stage.yaml").write_text(yaml.safe_dump(stage_with(key, f"~/{file}")))
    assert at(load_stage("stage.yaml"), key) == f"{home}/{file}"
    for variable in ("$SCRATCH", "${SCRATCH}", "${SCRATCH:-/tmp}", "${oc.env:SCRATCH}", "$(pwd)"):
        Path("stage.yaml").write_text(yaml.safe_dump(stage_with(key, f"{variable}/{file}")))
        with pytest.raises(ConfigError, match=rf"^stage.yaml: {key}: .*{re.escape(variable)} is a variable, .*write"):
            load_stage("stage.yaml")
    assert not Path("~").exists()


@pytest.mark.parametrize("key", PATH_KEYS)
def test_a_home_folder_is_replaced_behind_set(key: str, home: Path) -> None:
    Path("stage.yaml").write_text(yaml.safe_dump(stage_with(key, file_for(key) if key == "output" else "auto")))
    if key in ("engine.deepspeed", "model.chat_template"):
        Path("auto").write_text("{}")
    assert at(load_stage("stage.yaml", [f"{key}=~/{file_for(key)}"]), key) == f"{home}/{file_for(key)}"


def test_every_text_of_the_schema_that_names_a_file_is_among_the_keys_above() -> None:
    """A new key that takes a path must be one of them."""
    texts = {"name", "data.0.name", "data.0.subset", "data.0.split", "logging.wandb.project", "logging.wandb.entity"}
    texts |= {f"eval.data.0.{name}" for name in ("name", "subset", "split")}
    found = set(_texts(StageConfig.model_json_schema()))
    assert found - texts == {key.replace(".coco", "") for key in PATH_KEYS}
    assert {key for key in PATH_KEYS if not is_path_key(key)} == {"output"}


def _texts(schema: dict[str, Any]) -> set[str]:
    """Keys of free text in a JSON schema."""

    def walk(node: dict[str, Any], key: str) -> None:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        for name, inner in node.get("properties", {}).items():
            walk(inner, f"{key}.{name}" if key else name)
        for inner in node.get("anyOf", ()):
            walk(inner, key)
        if "items" in node:
            walk(node["items"], f"{key}.0")
        if node.get("type") == "string" and not {"enum", "const", "pattern"} & node.keys() or key == "name":
            found.add(key)

    found: set[str] = set()
    walk(schema, "")
    return found


def test_paths_without_either_are_left_alone() -> None:
    for text in ("", "a/b", "/x/~/y", "x~", "lmsys/vicuna-7b-v1.5", "https://host/a?b=$c", "s3://bucket/$x", "price$"):
        assert expand(text) == text


def test_what_is_really_named_so_is_not_lost(home: Path) -> None:
    Path("cost$usd").touch()
    assert expand("cost$usd") == "cost$usd"
    Path("~/runs/old").mkdir(parents=True)  # as `output: ~/runs` made it once
    with pytest.raises(
        PathError, match=rf"~/runs means {home}/runs, but there is a folder named ~ here.*move .*work/~/runs to"
    ):
        expand("~/runs")
    assert expand("~/x") == f"{home}/x" and expand("./~/runs") == "./~/runs"


def test_an_unknown_user_is_named() -> None:
    with pytest.raises(PathError, match=r"^~no-such-user/x: there is no user no-such-user; write"):
        expand("~no-such-user/x")


def path_params() -> list[tuple[str, str]]:
    """Options and arguments that take a path, by what the help calls their values."""
    names = re.compile(r"FILE|FOLDER|PATH|PICTURE|MODEL|OUT|RUN|IMAGE")
    return [
        (name, param.name)
        for name in sorted(GROUP.commands)
        for param in GROUP.commands[name].params
        if names.search(str(param.metavar))
    ]


@pytest.mark.parametrize(("command", "param"), path_params())
def test_paths_on_the_command_line_of_every_command(command: str, param: str, home: Path) -> None:
    """Quoted, or behind `=`, where a shell leaves them."""
    found = next(each for each in GROUP.commands[command].params if each.name == param)
    context = _context(command, found, "~/x")
    value = context.params[param]
    assert str(value[0] if isinstance(value, list | tuple) else value) == f"{home}/x"
    with pytest.raises(typer.BadParameter, match="is a variable"):
        _context(command, found, "$HOME/y")


def _context(command: str, param: Any, value: str) -> Any:
    """The parsed arguments of a command of which one has a value, and the others what they need."""
    arguments = []
    for each in GROUP.commands[command].params:
        text = value if each is param else {"metric": "exact"}.get(each.name, "y")
        if each is param or each.required:
            arguments += [text] if each.param_type_name == "argument" else [f"{each.opts[0]}={text}"]
    return GROUP.commands[command].make_context(command, arguments)


def test_scripts_train_py_and_python_know_the_home_folder_too(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([Path("~/none.yaml")], []) == 2
    assert f"{home}/none.yaml: cannot read the stage file" in capsys.readouterr().err
    assert run([Path("$HOME/none.yaml")], []) == 2
    assert "$HOME is a variable" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"{home}/none.png"):
        read_image("~/none.png")


def test_a_text_that_is_no_path_is_read_as_base64_or_shortened() -> None:
    buffer = io.BytesIO()
    Image.effect_noise((40, 30), 90).save(buffer, "PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    assert read_image(text).size == (40, 30)
    with pytest.raises(UserError, match="too long for the path of a file") as caught:
        read_image("x" * 100_000)
    assert len(str(caught.value)) < 400


def test_tasks_of_lmms_eval_may_be_files_below_the_home_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("llava_train.use.lmms_eval.evaluate", lambda evaluation: asked.append(evaluation) or 0)
    assert CliRunner().invoke(app, ["lmms-eval", "~/x", "--tasks", "mme,~/held_out.json"]).exit_code == 0
    assert (asked[0].model, asked[0].tasks) == (f"{home}/x", ("mme", f"{home}/held_out.json"))
