from __future__ import annotations

import copy
import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from PIL import Image
from transformers import AutoProcessor
from typer.testing import CliRunner, Result

from llava_train import LLaVA
from llava_train.cli import app
from llava_train.data.chat_templates import load_template
from llava_train.errors import UserError
from llava_train.model.weights import export_model
from llava_train.use import lmms_functions
from llava_train.use.lmms_eval import Evaluation, LmmsEvalError, command, find_model
from llava_train.use.lmms_task import write_task
from tests.data.chat_tokenizers import TOKENIZERS
from tests.model.originals import save_full, save_lora, save_parts
from tests.tiny import encoder_of, model_section, tiny_llava

REAL = os.environ.get("LMMS_EVAL_PYTHON")
QUESTIONS = [
    {"question_id": 7, "image": "red.png", "text": "What colour?", "answer": "red"},
    {"question_id": 8, "image": "blue.png", "text": "Is it red?\n<image>", "answer": "no"},
]
CONVERSATION = {
    "id": "two",
    "image": ["red.png", "blue.png"],
    "conversations": [
        {"from": "human", "value": "Is <image> like <image>"},
        {"from": "gpt", "value": "no"},
        {"from": "human", "value": "Why?"},
        {"from": "gpt", "value": "red, blue"},
    ],
}


def export(folder: Path, chat_template: str) -> Path:
    llava = tiny_llava(model_section(chat_template=chat_template))
    export_model(llava.model, llava.processor, encoder_of(llava).end_of_turn_id(), folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose turns end with another token than texts do, pictures and files of questions."""
    place = tmp_path_factory.mktemp("lmms")
    export(place / "run", "chatml")
    for colour in ("red", "blue"):
        Image.new("RGB", (40, 30), colour).save(place / f"{colour}.png")
    (place / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (place / "talk.json").write_text(json.dumps([CONVERSATION]))
    return place


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A python with a GPU and a stand-in for lmms-eval, which keeps its arguments and leaves with code $CODE."""
    modules = tmp_path / "modules"
    for package in ("lmms_eval", "filelock"):
        (modules / package).mkdir(parents=True)
        (modules / package / "__init__.py").touch()
    (modules / "filelock/_api.py").touch()
    (modules / "decord.py").touch()
    (modules / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: True)\n")
    (modules / "lmms_eval/__main__.py").write_text(
        "import json, os, pathlib, sys\n"
        "output = pathlib.Path(sys.argv[sys.argv.index('--output_path') + 1], 'run__model')\n"
        "output.mkdir(parents=True, exist_ok=True)\n"
        "(output / 'arguments.json').write_text(json.dumps(sys.argv[1:]))\n"
        "if 'BROKEN' not in os.environ: (output / '1_results.json').touch()\n"
        "sys.exit(int(os.environ.get('CODE', 0)))\n"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(modules))} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["lmms-eval", *map(str, arguments)])


def read_task(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings of a task, and its questions as lmms-eval loads them."""
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda loader, node: node.value)  # type: ignore[attr-defined]
    settings = yaml.load((folder / f"{folder.name}.yaml").read_text(), loader)  # type: ignore[arg-type]
    files = {split: str(folder / name) for split, name in settings["dataset_kwargs"]["data_files"].items()}
    cache = str(folder / "cache")
    loaded = datasets.load_dataset(settings["dataset_path"], data_files=files, cache_dir=cache)
    return settings, list(loaded[settings["test_split"]])


def parts_of(question: dict[str, Any]) -> list[Any]:
    (message,) = lmms_functions.doc_to_messages(question)
    return [part["url"].getpixel((0, 0)) if part["type"] == "image" else part["text"] for part in message["content"]]


RED, BLUE = (255, 0, 0), (0, 0, 255)


def test_original_questions_become_a_task_with_pictures_in_their_places(place: Path, tmp_path: Path) -> None:
    assert write_task(place / "questions.jsonl", None, tmp_path) == "local_questions"
    settings, questions = read_task(tmp_path / "local_questions")
    assert settings["task"] == "local_questions"
    for key in ("doc_to_visual", "doc_to_text", "doc_to_messages", "process_results"):
        module, name = settings[key].split(".")
        assert (tmp_path / "local_questions" / f"{module}.py").is_file()
        assert hasattr(lmms_functions, name)
    assert [parts_of(question) for question in questions] == [[RED, "What colour?"], ["Is it red?", BLUE]]
    assert [lmms_functions.doc_to_text(question) for question in questions][0] == "<image>\nWhat colour?"
    assert lmms_functions.process_results(questions[0], [" Red\n"]) == {"exact_match": 1.0}
    assert lmms_functions.process_results(questions[0], ["Reddish"]) == {"exact_match": 0.0}


def test_each_question_of_a_conversation_is_asked_on_its_own_with_all_pictures(place: Path, tmp_path: Path) -> None:
    write_task(place / "talk.json", place, tmp_path)
    _, questions = read_task(tmp_path / write_task(place / "talk.json", place, tmp_path))
    assert [parts_of(question) for question in questions] == [["Is", RED, "like", BLUE], [RED, BLUE, "Why?"]]
    assert [question["answers"] for question in questions] == [["no"], ["red, blue"]]


def test_pictures_in_records_are_written_beside_the_task(place: Path, tmp_path: Path) -> None:
    rows = [{"image": {"bytes": (place / f"{colour}.png").read_bytes()}, **ASKED} for colour in ("red", "blue")]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    _, questions = read_task(tmp_path / write_task(tmp_path / "rows.parquet", None, tmp_path))
    assert [parts_of(question) for question in questions] == [[RED, "What?"], [BLUE, "What?"]]


def test_pictures_that_pillow_would_show_otherwise_are_decoded_beside_the_task(place: Path, tmp_path: Path) -> None:
    """Pillow's `convert` cuts 16 bits off at 255, which is white for all but the darkest."""
    Image.new("I;16", (8, 8), 0x4321).save(tmp_path / "gray.png")
    shutil.copy(place / "red.png", tmp_path / "red.png")
    rows = [{"image": name, "text": "What?", "answer": "it"} for name in ("gray.png", "red.png")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, questions = read_task(tmp_path / write_task(tmp_path / "rows.jsonl", None, tmp_path))
    assert [parts_of(question)[0] for question in questions] == [(0x43, 0x43, 0x43), RED]
    assert questions[1]["images"] == [str(tmp_path / "red.png")]


ASKED = {"conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "it"}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "red.png", "text": "What?"}, "metric exact measures by answers or answer, which is missing"),
        ({"text": "What?", "answer": "it"}, "a question without a picture, which lmms-eval's llava_hf cannot ask"),
        ({"image": "green.png", "text": "What?", "answer": "it"}, "green.png: the image file is missing"),
        ({"image": "../red.png", "text": "What?", "answer": "it"}, "leaves the image folder"),
        (
            {"image": "red.png", "conversations": [{"from": "system", "value": "Be."}, *ASKED["conversations"]]},
            "a system turn, which lmms-eval's llava_hf does not hand on",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_with_its_line(
    place: Path, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(QUESTIONS[0]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError) as raised:
        write_task(path, place, tmp_path)
    assert str(raised.value).startswith(f"{path}:2: ")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("tokenizer", "template", "end"),
    [
        ("llama", "vicuna_v1", "</s>"),
        ("llama3", "llama3", "<|eot_id|>"),
        ("llama3", "gemma", "<end_of_turn>"),
        ("bytes", "chatml", "<|im_end|>"),
        ("bytes", "vicuna_v1", "</s>"),
        ("bytes", "phi3", "<|end|>"),
        ("llama", "llava_v0", "</s>"),
    ],
)
def test_lmms_eval_sees_the_text_of_training_and_stops_where_a_turn_ends(
    tmp_path: Path, tokenizer: str, template: str, end: str
) -> None:
    processor = tiny_llava().processor
    trained = TOKENIZERS[tokenizer]
    processor.tokenizer = copy.deepcopy(trained)
    processor.chat_template = original = load_template(template, trained)
    chat = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}]

    export_model(tiny_llava().model, processor, trained.convert_tokens_to_ids(end), tmp_path)
    adapted = AutoProcessor.from_pretrained(tmp_path).tokenizer
    for messages in (chat[:1], chat):
        settings = {"tokenize": False, "add_generation_prompt": messages != chat}
        text = adapted.apply_chat_template(messages, **settings)
        expected = trained.apply_chat_template(messages, chat_template=original, **settings)
        assert adapted(text).input_ids == trained(expected, add_special_tokens=False).input_ids
    assert adapted.eos_token == end


def test_several_gpus_are_started_by_accelerate_and_more_arguments_go_last(tmp_path: Path) -> None:
    evaluation = Evaluation(
        "owner/name", ("mme",), tmp_path, python="py", gpus=4, model_args="dtype=float32", more=("--limit", "8")
    )
    called = command(evaluation, "owner/name", "cuda", ["mme", "gqa"], tmp_path)
    accelerate = "py -m accelerate.commands.launch --multi_gpu --num_processes=4 -m lmms_eval --model llava_hf"
    assert " ".join(called) == (
        f"{accelerate} --model_args pretrained=owner/name,dtype=float32 --tasks mme,gqa --device cuda --batch_size 1 "
        f"--output_path {tmp_path} --log_samples --include_path {tmp_path} --limit 8"
    )


def test_a_hub_id_and_a_folder_are_told_apart(place: Path) -> None:
    assert find_model("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"
    assert find_model(str(place / "run")) == find_model(str(place / "run/model")) == place / "run/model"
    with pytest.raises(LmmsEvalError, match="tests/nothing holds no model"):
        find_model("tests/nothing")


@pytest.mark.parametrize("form", [save_full, save_lora])
def test_an_original_checkpoint_is_to_be_exported_first(tmp_path: Path, form: Any) -> None:
    base, tower = save_parts(tmp_path)
    folder = form(tmp_path / "original", *([base] if form is save_lora else []), tower)
    with pytest.raises(LmmsEvalError, match=f"original LLaVA checkpoint.*`llava-train export {folder} OUT`"):
        find_model(str(folder))


def test_a_model_whose_adapter_lies_beside_it_is_to_be_exported_merged(tmp_path: Path) -> None:
    folder = export(tmp_path, "chatml")
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(LmmsEvalError, match="llava-train export --merge-lora"):
        find_model(str(folder))


def test_the_command_runs_lmms_eval_where_it_is_and_on_the_gpu_it_has(
    place: Path, tmp_path: Path, environment: Path
) -> None:
    tasks = f"mme,{place / 'questions.jsonl'}"
    done = run(
        place / "run", "--tasks", tasks, "--python", environment, "--output_path", tmp_path / "out", "--limit", 2
    )
    assert done.exit_code == 0, done.output
    arguments = json.loads((tmp_path / "out/run__model/arguments.json").read_text())
    options = dict(zip(arguments[::2], arguments[1::2], strict=False))
    model = place / "run/model"
    assert options["--model_args"] == f"pretrained={model},device_map=cuda"
    assert options["--tasks"] == "mme,local_questions"
    assert arguments[-4:] == ["--include_path", str(tmp_path / "out/tasks"), "--limit", "2"]
    assert f"results: {tmp_path / 'out/run__model/1_results.json'}" in done.output


@pytest.mark.parametrize(("variables", "code"), [({"CODE": "7"}, 7), ({"BROKEN": "1"}, 1)])
def test_a_failure_of_lmms_eval_is_handed_on_even_where_it_ends_with_0(
    place: Path,
    tmp_path: Path,
    environment: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    code: int,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = run(place / "run", "--tasks", "mme", "--python", environment, "--output-path", tmp_path)
    assert done.exit_code == code
    assert ("error: lmms-eval wrote no results" in done.output) == (code == 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "--tasks", "mme"], "nothing holds no model (config.json)"),
        (["run", "--tasks", "missing.jsonl"], "--tasks: there is no file missing.jsonl"),
        (["run", "--tasks", "questions.jsonl,again/questions.jsonl"], "two files would become the task"),
        (["run", "--tasks", "questions.jsonl", "--include_path=x"], "lmms-eval has one --include_path"),
        (["run", "--tasks", "mme", "--gpus", "2", "--device", "cpu"], "--gpus 2: the environment that runs"),
        (["a,b", "--tasks", "mme"], "lmms-eval takes no path with a comma"),
        (["run", "--tasks", "mme", "--python", "no-python"], "--python no-python: No such file"),
        (["run", "--tasks", "mme", "--python", "false"], "false fails"),
        (["run", "--tasks", "mme", "--python", sys.executable], 'pip install lmms-eval decord "filelock<4.3"'),
    ],
)
def test_what_cannot_be_run_is_refused(
    place: Path,
    tmp_path: Path,
    environment: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run", "a,b"):
        (tmp_path / name).symlink_to(place / "run")
    for name in ("questions.jsonl", "again/questions.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((place / "questions.jsonl").read_text())
    done = run("--python", environment, "--images", place, *arguments)
    assert done.exit_code == 2
    assert done.output.startswith("error: ")
    assert message in done.output


@pytest.mark.lmms_eval
@pytest.mark.skipif(REAL is None, reason="LMMS_EVAL_PYTHON names no python that has lmms-eval")
def test_lmms_eval_gets_the_answers_that_ask_gets(place: Path, tmp_path: Path) -> None:
    settings = ["--limit", "2", "--gen_kwargs", "max_new_tokens=8"]
    tasks = ["--tasks", place / "questions.jsonl", "--output-path", tmp_path]
    done = run(place / "run", *tasks, "--python", REAL, "--device", "cpu", *settings)
    assert done.exit_code == 0, done.output
    (samples,) = tmp_path.glob("run__model/*_samples_local_questions.jsonl")
    answers = [json.loads(line)["filtered_resps"].strip() for line in samples.read_text().splitlines()]
    llava = LLaVA.from_pretrained(place / "run/model", "cpu")
    assert answers[0] == llava.generate_from_image(place / "red.png", "What colour?", max_new_tokens=8)
    assert len(answers) == 2
