"""Generated answers end where training ended them, and are measured the same on any number of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from llava_train.data.samples import Turn
from llava_train.model.processor import byte_tokenizer
from llava_train.train import stage as train_stage
from llava_train.train.evaluate import _different, generating
from llava_train.train.heaviest import PackShape
from llava_train.use.generation import Prompt, Sampling, answers_of
from llava_train.use.metrics import vqa_accuracy
from llava_train.use.prompts import Prompts
from tests.tiny import dataset_of, model_section, stage, tiny_llava
from tests.train.helpers import read_lines, run_many, run_ranks, write_samples, write_stage


class Scripted(nn.Module):
    """A head that makes the model say tokens one by one."""

    def __init__(self, input_ids: list[int], n_tokens: int) -> None:
        super().__init__()
        self.rest, self.n_tokens = list(input_ids), n_tokens

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        said = torch.tensor(self.rest.pop(0))
        return nn.functional.one_hot(said, self.n_tokens).float().expand(*hidden_states.shape[:-1], -1)


@pytest.mark.parametrize(("template", "end"), [("llava_v0", "###"), ("vicuna_v1", "</s>"), ("chatml", "<|im_end|>")])
def test_an_answer_ends_with_the_text_that_ends_turns_in_training(template: str, end: str) -> None:
    llava = tiny_llava(model_section(chat_template=template))
    said = llava.tokenizer(f"A # cat{end}Human: more", add_special_tokens=False).input_ids
    llava.model.lm_head = Scripted(said, llava.model.config.text_config.vocab_size)
    known = Prompts(llava)
    prompt = Prompt(known.encode((Turn("user", "What?"),), 0), None)
    with generating(llava.model):
        assert answers_of(llava, known, [prompt], Sampling(max_new_tokens=30)) == ["A # cat"]
    assert llava.tokenizer.decode(llava.model.lm_head.rest) == "Human: more"


@pytest.mark.parametrize(("n_tokens", "max_tokens"), [(1740, 1740), (300, 512), (4096, 4096), (5000, 4096)])
def test_held_out_samples_make_no_heavier_packs_than_those_that_train(
    n_tokens: int, max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {}
    monkeypatch.setattr(train_stage, "open_held_out", lambda *_: None)
    batch = {"size": 12, "max_tokens": 4096, "max_sample_tokens": 512}
    config = stage(Path("x"), batch=batch, eval={"every": 1, "data": [{"path": "x"}]})
    pack = PackShape((n_tokens,), 1, 4, 28)
    new_dataset = lambda mixture, **given: settings.update(given)  # noqa: E731
    unused: Any = object()
    train_stage._evaluation(config, unused, unused, unused, new_dataset, unused, pack, 2, unused)
    assert settings == {"seed": None, "batch_size": 12, "max_tokens": max_tokens}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of three steps under every ZeRO stage, on one rank and on two, with and without a metric or an evaluation."""
    folder = tmp_path_factory.mktemp("metrics")
    write_samples(folder / "data.json", "iitiitiitiit")
    write_samples(folder / "held-out.json", "titxiiittbiitmiii", seed=1)
    rows = [{"question_id": i, "text": "Is it?", "label": "yes" if i % 3 else "no"} for i in range(5)]
    (folder / "pope.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation = {"every": 2, "data": [{"path": "held-out.json"}], "generate": 3, "max_new_tokens": 6}
    measured: dict[str, Any] = {
        "vqa": {"metric": "vqa", "metric_samples": 12},
        "pope": {"metric": "pope", "questions": {"path": "pope.jsonl"}},
        "none": {},
    }
    for n_ranks in (1, 2):
        stages = {}
        for zero, name in [(0, "vqa"), (2, "vqa"), (3, "vqa"), (3, "pope"), (3, "none"), (3, "without")]:
            evaluated = {**evaluation, **measured[name]} if name in measured else None
            settings = {"eval": evaluated, "engine": {"zero": zero, "precision": "fp32"}}
            run = f"{name}-{zero}-{n_ranks}"
            stages[run] = write_stage(folder / f"{run}.yaml", on_bad_sample="skip", max_bad_share=1, **settings)
        outcomes = run_many({run: ["--config", path] for run, path in stages.items()}, folder, n_ranks)
        for run, ranks in outcomes.items():
            assert [outcome.code for outcome in ranks] == [0] * n_ranks, f"{run}: {ranks[0].stderr[-3000:]}"
    return folder


def evaluations(folder: Path, run: str) -> list[dict[str, Any]]:
    return [line for line in read_lines(folder / "runs" / run / "metrics.jsonl") if "eval_loss" in line]


def answers(folder: Path, run: str) -> list[dict[str, Any]]:
    return read_lines(folder / "runs" / run / "answers.jsonl")


@pytest.mark.parametrize("run", ["vqa-2-1", "vqa-3-1", "vqa-0-2", "vqa-2-2", "vqa-3-2"])
def test_score_and_answers_are_the_same_on_any_ranks_and_zero_stage(folder: Path, run: str) -> None:
    expected = evaluations(folder, "vqa-0-1")
    assert [line["step"] for line in expected] == [0, 2, 3], "before the first step too"
    assert {"eval_vqa", "eval_vqa_low", "eval_vqa_high"} <= expected[0].keys()
    for ours, theirs in zip(evaluations(folder, run), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert answers(folder, run) == answers(folder, "vqa-0-1")


def test_an_evaluation_changes_nothing_that_is_learnt(folder: Path) -> None:
    """Training goes on as if nothing had been generated, before the first step and after others."""
    for n_ranks in (1, 2):
        kept = [
            read_lines(folder / f"runs/{name}-3-{n_ranks}/metrics.jsonl") for name in ("without", "vqa", "pope", "none")
        ]
        losses = [[(line["loss"], line["grad_norm"]) for line in lines if "loss" in line] for lines in kept]
        assert losses[0] == losses[1] == losses[2] == losses[3] and len(losses[0]) == 3
    assert answers(folder, "none-3-2") == answers(folder, "vqa-3-2")


def test_questions_of_a_file_are_measured(folder: Path) -> None:
    for run in ("pope-3-1", "pope-3-2"):
        last = evaluations(folder, run)[-1]
        assert 0 <= last["eval_pope_low"] <= last["eval_pope"] <= last["eval_pope_high"] <= 1
        names = ("precision", "recall", "f1", "yes_share")
        assert {f"eval_pope_{name}" for name in names} <= last.keys()
        assert len(answers(folder, run)) == 3 * 3


def test_the_score_is_that_of_the_answers(folder: Path, tmp_path: Path) -> None:
    """With every measured answer shown, it can be computed again."""
    stage = write_stage(
        folder / "all.yaml",
        on_bad_sample="skip",
        max_bad_share=1,
        eval={"every": 3, "data": [{"path": "held-out.json"}], "generate": 50, "metric": "vqa", "max_new_tokens": 6},
    )
    [done] = run_many({"all": ["--config", stage]}, folder)["all"]
    assert done.code == 0, done.stderr
    shown = [line for line in answers(folder, "all") if line["step"] == 3]
    assert len(shown) == 15, "all but the two whose pictures cannot be read"
    expected = sum(vqa_accuracy(line["answer"], [line["expected"]]) for line in shown) / len(shown)
    assert evaluations(folder, "all")[-1]["eval_vqa"] == pytest.approx(expected)
    assert "held-out loss" in done.stdout and "vqa " in done.stdout


def test_what_cannot_be_measured_is_told_before_training(folder: Path) -> None:
    stages = {
        "bad-label": {"metric": "pope"},
        "no-metric": {"questions": {"path": "pope.jsonl"}},
        "no-answers": {"metric": "vqa", "questions": {"path": "pope.jsonl"}},
        "no-file": {"metric": "vqa", "questions": {"path": "none.jsonl"}},
    }
    held_out = {"every": 1, "data": [{"path": "held-out.json"}]}
    (folder / "images/broken.png").write_bytes(b"no picture")
    rows = [{"question_id": i, "image": "images/broken.png", "text": "Is it?", "label": "yes"} for i in range(3)]
    (folder / "unreadable.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    readable = {"data": [{"path": "data.json"}]}
    stages["none-asked"] = {"metric": "pope", "questions": {"path": "unreadable.jsonl"}, **readable}
    paths = {name: write_stage(folder / f"{name}.yaml", eval={**held_out, **more}) for name, more in stages.items()}
    done = run_many({name: ["--config", path] for name, path in paths.items()}, folder)
    told = {name: ranks[0].stderr for name, ranks in done.items()}
    assert {ranks[0].code for ranks in done.values()} == {2}
    assert 'wanted "yes" or "no"' in told["bad-label"] and "eval.data, sample 0" in told["bad-label"]
    assert "eval.questions: no score is computed over them; set eval.metric" in told["no-metric"]
    assert "pope.jsonl:1: metric vqa measures by answers or answer" in told["no-answers"]
    assert "none.jsonl: there is no such file or folder" in told["no-file"]
    assert "eval.metric: none of its 3 questions can be asked, the first is 0" in told["none-asked"]
    assert not any((folder / "runs" / name / "metrics.jsonl").is_file() for name in stages)


def test_shown_questions_differ_in_text_and_picture_where_they_can(tmp_path: Path) -> None:
    for name in "abc":
        Image.new("RGB", (8, 8), {"a": "red", "b": "blue", "c": "green"}[name]).save(tmp_path / f"{name}.png")
    asked = ["a What?", "b What?", "a Where?", "c What?", "x Why?", "c Who?", "- How?", "b When?"]
    records = []
    for number, (picture, question) in enumerate(each.split() for each in asked):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "It is."}]
        record: dict[str, Any] = {"id": number, "conversations": turns}
        if picture != "-":  # x is missing
            record["image"], turns[0]["value"] = f"{picture}.png", f"<image>\n{question}"
        records.append(record)
    (tmp_path / "data.json").write_text(json.dumps(records))
    dataset = dataset_of(tiny_llava(), tmp_path / "data.json")
    assert _different(dataset, 0) == []
    assert _different(dataset, 1) == [0]
    assert _different(dataset, 4) == [0, 5, 6, 7]
    assert _different(dataset, 5) == [0, 2, 5, 6, 7], "another question is better than nothing new"
    assert _different(dataset, 99) == [0, 1, 2, 3, 5, 6, 7], "all that can be read"


def test_a_run_says_once_what_its_template_leaves_out(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    write_samples(tmp_path / "data.json", "it" * 6)
    stage = write_stage(tmp_path / "a.yaml", checkpoint={"every": 1})
    again = ["--config", stage]
    content = stage.read_text().replace("language_model:\n", "language_model:\n    tokenizer: tokenizer\n", 1)
    stage.write_text(content)
    [begun] = run_many({"begin": again}, tmp_path)["begin"]
    shutil.rmtree(tmp_path / "runs/a/model")  # so that it goes on from its newest checkpoint
    [resumed] = run_many({"go on": again}, tmp_path)["go on"]
    assert (begun.code, resumed.code) == (0, 0), begun.stderr + resumed.stderr
    note = "chatml differs from the language model's own template, which also writes '<|im_start|>system"
    assert begun.stdout.count(note) == 1 and "chat_template: auto keeps it" in begun.stdout
    assert note not in resumed.stdout and "from step" in resumed.stdout
    for command in ("check", "preview"):
        shown = run_ranks(["-m", "llava_train", command, "--config", stage], tmp_path).check()
        assert "own template" not in shown.stdout[0] + shown.stderr[0]
