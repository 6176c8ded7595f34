from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_train.files import write_manifest
from llava_train.train.finished import next_commands, written
from tests.tiny import stage
from tests.train.helpers import write_stage


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/tiny/model").mkdir(parents=True)
    return tmp_path


def test_after_a_stage_1_the_stage_files_beside_it_that_start_from_it_come_next(in_folder: Path) -> None:
    config = stage(Path("data.json"))
    (in_folder / "runs/tiny/model/projector.safetensors").touch()
    assert next_commands(config, Path("stage1.yaml")) == [
        "llava-train train --config STAGE2.yaml   # with init_from: runs/tiny"
    ]
    write_stage(in_folder / "stage2.yaml", init_from="runs/tiny/")
    write_stage(in_folder / "my lora.yaml", init_from="runs/tiny")
    write_stage(in_folder / "other.yaml", init_from="runs/other")
    (in_folder / "broken.yaml").write_text("init_from: [")
    assert next_commands(config, Path("stage1.yaml")) == [
        "llava-train train --config 'my lora.yaml'",
        "llava-train train --config stage2.yaml",
    ]


def test_stage_files_that_name_the_run_come_next_too_and_look_where_it_is(in_folder: Path) -> None:
    config = stage(Path("data.json"))
    (in_folder / "runs/tiny/model/projector.safetensors").touch()
    write_stage(in_folder / "stage2.yaml", init_from="tiny")
    write_stage(in_folder / "stage3.yaml", init_from="tiny", output="./runs/")
    write_stage(in_folder / "other.yaml", init_from="other")
    assert next_commands(config, Path("stage1.yaml")) == [
        "llava-train train --config stage2.yaml",
        "llava-train train --config stage3.yaml",
    ]
    (in_folder / "my runs").mkdir()
    (in_folder / "runs/tiny").rename(in_folder / "my runs/tiny")
    config = stage(Path("data.json"), output="my runs")
    assert (
        next_commands(config, Path("stage1.yaml"))[0] == "llava-train train --config stage2.yaml --set 'output=my runs'"
    )


def test_a_whole_model_can_be_asked_what_the_run_itself_asked_it(in_folder: Path) -> None:
    config, report = stage(Path("data.json")), "llava-train report runs/tiny"
    assert next_commands(config, Path("stage2.yaml")) == [
        "llava-train ask runs/tiny PICTURE 'What is in this picture?'",
        report,
    ]
    answers = [
        {"step": 0, "prompt": "no picture?", "pictures": []},
        {"step": 0, "prompt": "<image>\nclear\x1b[2J", "pictures": ["pictures/a.jpg"]},
        {"step": 0, "prompt": "<image>\nWhat's this?", "pictures": ["pictures/b.jpg"]},
    ]
    (in_folder / "runs/tiny/answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
    assert next_commands(config, Path("stage2.yaml")) == [
        """llava-train ask runs/tiny runs/tiny/pictures/b.jpg 'What'"'"'s this?'""",
        report,
    ]


def test_what_a_run_left_is_named_and_what_it_did_not_leave_is_not(in_folder: Path) -> None:
    config = stage(Path("data.json"))
    assert list(written(config)) == []
    (in_folder / "runs/tiny/adapter").mkdir()
    (in_folder / "runs/tiny/report.html").touch()
    for name in ("step-00000004", "step-00000008"):
        folder = in_folder / "runs/tiny/checkpoints" / name
        folder.mkdir(parents=True)
        write_manifest(folder)
    (in_folder / "runs/tiny/checkpoints/step-00000012").mkdir()  # never finished
    assert dict(written(config)) == {
        "adapter": "runs/tiny/adapter: LoRA's weights by themselves, for peft",
        "checkpoints": "runs/tiny/checkpoints: after step 4, 8",
        "report": "runs/tiny/report.html",
    }
