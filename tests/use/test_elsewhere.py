"""A run is used from another folder, and after its project was moved: its parts are where they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from llava_train.cli import app
from llava_train.config import StageConfig
from llava_train.data.mixture import open_mixture
from llava_train.model.compatibility import BuildError
from llava_train.model.processor import load_tokenizer, load_vision_config
from llava_train.stage_file import parse_stage
from llava_train.train.assembly import write_result
from llava_train.train.run_folder import describe, write_card
from llava_train.use.examples import examples_for
from llava_train.use.loading import load_llava
from tests.model import originals
from tests.tiny import LANGUAGE_MODEL, stage_content, write_data

LORA = {"projector": {"lr": 1e-3}, "language_model": {"lr": 1e-3, "lora": {"rank": 2, "alpha": 4}}}
KEPT = "config.yaml"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the runs of a stage 1 and a stage 2 with LoRA, of parts and a template that it names by folder."""
    project = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        language_model, vision_tower = originals.save_parts(project / "parts")
        language_model.rename("parts/lm")
        vision_tower.rename("parts/tower")
        write_data(project / "data")
        (project / "mine.jinja").write_text(TEMPLATE)
        stage1 = finished(name="one", init_from=None, trainable={"projector": {"lr": 1e-3}})
        finished(name="two", init_from=stage1.name, trainable=LORA)
    return project


TEMPLATE = """{{ bos_token }}{% for message in messages %}{% if message.role == "assistant" %}\
A: {% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{% else %}\
Q: {{ message.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"""


def finished(language_model: Any = "parts/lm", **changes: Any) -> StageConfig:
    """A run that has ended, without having trained."""
    model = {"language_model": language_model, "vision_tower": "parts/tower", "chat_template": "mine.jinja"}
    ds = {"zero": 0, "precision": "fp32", "deepspeed": "ds.json"}
    Path("ds.json").write_text("{}")
    eval_ = {"every": 1, "data": [{"path": "data/data-0.json"}]}
    content = stage_content(Path("data/data-0.json"), model=model, engine=ds, eval=eval_, **changes)
    config = parse_stage(content, "test")
    write_result(config, {}, config.run_dir / "model")
    write_card(config.run_dir, describe(config, open_mixture(config.data)), n_ranks=1, step=0, changed=False)
    return config


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    Image.new("RGB", (40, 30), "red").save("red.png")
    return tmp_path


def as_before(run: Path) -> None:
    """Makes a run's config.yaml one of an earlier version, which kept no places."""
    card = yaml.safe_load((run / KEPT).read_text())
    del card["about"]["places"]
    card["init_from"] = card["init_from"] and f"runs/{card['init_from']}"
    (run / KEPT).write_text(yaml.safe_dump(card))


@pytest.mark.parametrize("name", ["one", "two", "two/adapter"])
@pytest.mark.parametrize("version", ["now", "before"])
def test_a_run_is_used_from_another_folder_and_after_its_project_was_moved(
    name: str, version: str, trained: Path, elsewhere: Path
) -> None:
    project = Path(shutil.copytree(trained, elsewhere / "project"))
    if version == "before":
        as_before(project / "runs/one")
        as_before(project / "runs/two")
    elif name == "one":
        places = yaml.safe_load((trained / "runs/one" / KEPT).read_text())["about"]["places"]
        assert places["data.0.path"] == {
            "absolute": f"{trained}/data/data-0.json",
            "from_run": "../../data/data-0.json",
        }
        assert set(places) >= {"model.language_model", "model.vision_tower", "model.chat_template", "engine.deepspeed"}
    shutil.move(trained / "parts", trained / "gone")  # what is moved must not lean on what was
    try:
        llava = load_llava(project / "runs" / name)
    finally:
        shutil.move(trained / "gone", trained / "parts")
    assert "Q: " in llava.processor.chat_template


def test_ask_export_and_the_demos_examples_work_from_another_folder(trained: Path, elsewhere: Path) -> None:
    run = str(trained / "runs/one")
    done = CliRunner().invoke(app, ["ask", run, "red.png", "What?", "--max-new-tokens", "2"])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["export", run, "out"])
    assert done.exit_code == 0, done.output
    assert {example.question for example in examples_for(run)} & questions(trained / "data/data-0.json")


def questions(path: Path) -> set[str]:
    rows = json.loads(path.read_text())
    return {row["conversations"][0]["value"].replace("<image>", "").strip() for row in rows}


@pytest.mark.parametrize("key", ["language_model", "vision_tower", "chat_template"])
@pytest.mark.parametrize("version", ["now", "before"])
def test_what_is_missing_is_named_with_the_places_where_it_was_looked_for(
    key: str, version: str, trained: Path, elsewhere: Path
) -> None:
    project = Path(shutil.copytree(trained, elsewhere / "project"))
    run = project / "runs/one"
    card = yaml.safe_load((run / KEPT).read_text())
    card["about"]["places"][f"model.{key}"]["absolute"] = "/no/such/place"
    (run / KEPT).write_text(yaml.safe_dump(card))
    if version == "before":
        as_before(run)
    named = card["model"][key]
    shutil.move(project / named, elsewhere / "hidden")
    done = CliRunner().invoke(app, ["ask", str(run), "red.png", "What?"])
    assert done.exit_code == 2
    if (version, key) != ("before", "chat_template"):  # a word or a file: an old run does not say which it was
        assert f"error: {run} was trained with model.{key}: {named}, which is not there any more" in done.output
        assert f"\n  {project / named}\n" in done.output
        assert ("\n  /no/such/place\n" in done.output) == (version == "now")
    assert named in done.output
    assert "hf download" not in done.output and "raceback" not in done.output and "HF_HUB" not in done.output


def test_an_adapter_whose_base_is_gone_says_so(trained: Path, elsewhere: Path) -> None:
    project = Path(shutil.copytree(trained, elsewhere / "project"))
    card = project / "runs/two" / KEPT
    card.write_text(card.read_text().replace(str(trained), "/no/such"))
    shutil.move(project / "runs/one", elsewhere / "hidden")
    done = CliRunner().invoke(app, ["ask", str(project / "runs/two/adapter"), "red.png", "What?"])
    assert done.exit_code == 2 and "was trained with init_from: one, which is not there any more" in done.output
    assert "raceback" not in done.output


@pytest.mark.parametrize("name", ["parts/dinov2-small", "/no/such", "./here", "../there", "a/b/c", "runs/x"])
def test_a_local_path_gets_no_advice_about_the_hub(name: str, elsewhere: Path) -> None:
    for key, load in (("language_model", load_tokenizer), ("vision_tower", load_vision_config)):
        with pytest.raises(BuildError, match=f"^model.{key}: cannot load {name}: there is no such folder") as caught:
            load(name)
        assert "hf download" not in str(caught.value) and caught.value.__cause__ is None
        assert ("build_small_parts.py" in str(caught.value)) == name.startswith("parts/")
        assert name.startswith("/") or f"its path counts from {Path.cwd()}" in str(caught.value)


def test_a_random_part_with_a_tokenizer_from_a_folder_is_found_too(trained: Path, elsewhere: Path) -> None:
    """A projector's card holds the part that it was trained for, with the path of its tokenizer."""
    project = Path(shutil.copytree(trained, elsewhere / "project"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        random_part = {"config": LANGUAGE_MODEL, "tokenizer": "parts/lm"}
        finished(name="random", init_from=None, trainable={"projector": {"lr": 1e-3}}, language_model=random_part)
    assert load_llava(project / "runs/random").tokenizer.name_or_path == f"{project}/parts/lm"
