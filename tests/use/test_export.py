"""`llava-train export`: what it refuses, what it leaves, and that it never leaves half of it."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration
from typer.testing import CliRunner, Result

from llava_train import LLaVA
from llava_train.cli import app
from llava_train.files import damage, write_manifest
from llava_train.model.weights import save_projector
from llava_train.use import export as export_room
from llava_train.use import hub
from llava_train.use.export import ExportError, export
from tests.model.test_export_files import as_vllm_reads
from tests.tiny import model_section, tiny_llava
from tests.use.exports import LORA, QUESTION, export_tiny, write_picture, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "mine")


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "mine-lora", trainable=LORA)


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def nothing_left(folder: Path) -> bool:
    return not any(folder.iterdir())


def test_a_run_is_exported_and_what_was_found_is_printed(run: Path, tmp_path: Path) -> None:
    done = command(run, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "differ from the model's by\n  0 at most\n" in done.output
    assert damage(tmp_path / "out") is None
    ours, theirs = weights(run / "model"), weights(tmp_path / "out")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_stage_leaves_the_files_that_the_command_writes(run: Path, tmp_path: Path) -> None:
    export(str(run), tmp_path / "out")
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name != "COMPLETE"}
    assert files.pop("README.md")
    assert files == {path.name: path.read_bytes() for path in (run / "model").iterdir() if path.name != "COMPLETE"}


def test_a_projector_alone_is_exported_between_its_parts(run: Path, tmp_path: Path) -> None:
    section = model_section()
    llava = tiny_llava(section)
    torch.nn.init.normal_(llava.model.model.multi_modal_projector.linear_1.weight)
    save_projector(llava.model, section, tmp_path / "stage1/model")
    write_manifest(tmp_path / "stage1/model")
    (tmp_path / "stage1/config.yaml").write_text((run / "config.yaml").read_text())
    export(str(tmp_path / "stage1"), tmp_path / "out")
    expected = llava.model.model.multi_modal_projector.linear_1.weight
    assert torch.equal(weights(tmp_path / "out")["multi_modal_projector.linear_1.weight"], expected)


def test_an_export_is_a_source_too(run: Path, tmp_path: Path) -> None:
    export(str(run), tmp_path / "first")
    export(str(tmp_path / "first"), tmp_path / "second")
    card = (tmp_path / "second/README.md").read_text()
    assert "from first" in card and "## Training" not in card


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_dtype_is_that_of_every_tensor_and_config(run: Path, tmp_path: Path, dtype: str) -> None:
    done = command(run, tmp_path / "out", "--dtype", dtype)
    assert done.exit_code == 0, done.output
    assert f" at most from those before --dtype {dtype}\n" in done.output
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {wanted}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {part["dtype"] for part in (config, config["text_config"], config["vision_config"])} == {
        str(wanted).removeprefix("torch.")
    }
    assert LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").dtype == wanted


def test_weights_beyond_fp16_are_refused(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = export_room.load_llava

    def large(*arguments: Any, **settings: Any) -> Any:
        llava = load(*arguments, **settings)
        llava.model.lm_head.weight.data.fill_(1e6)
        return llava

    monkeypatch.setattr(export_room, "load_llava", large)
    with pytest.raises(ExportError, match="not finite in torch.float16; choose --dtype bf16 or fp32"):
        export(str(run), tmp_path / "out", torch.float16)
    assert nothing_left(tmp_path)


# LoRA


def test_a_lora_run_leaves_its_base_and_the_adapter_beside_it(lora_run: Path, tmp_path: Path) -> None:
    done = command(lora_run, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert f" at most from the trained model's, with {tmp_path / 'out'}/adapter on\n" in done.output
    assert sorted(path.name for path in (tmp_path / "out/adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    adapter = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    in_vllm = [as_vllm_reads(name.removeprefix("base_model.model.")) for name in adapter]
    assert all(name.startswith("language_model.model.layers.") for name in in_vllm)
    trained, base = weights(lora_run / "model"), weights(tmp_path / "out")
    differ = {name for name in trained if not torch.equal(trained[name], base[name])}
    assert differ and all("_proj.weight" in name and name.startswith("language_model.") for name in differ)


def test_a_vision_tower_that_trained_beside_adapters_is_in_the_base(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", trainable={**LORA, "vision_tower": {"lr": 1e-4}})
    export(str(run), tmp_path / "out")
    trained, base = weights(run / "model"), weights(tmp_path / "out")
    assert all(torch.equal(trained[name], base[name]) for name in trained if name.startswith("vision_tower"))


@pytest.mark.parametrize("below", ["", "adapter"])
def test_an_adapter_is_merged_on_request(lora_run: Path, tmp_path: Path, below: str) -> None:
    done = command(lora_run / below, tmp_path / "out", "--merge-lora")
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "out/adapter").exists()
    for name, tensor in weights(lora_run / "model").items():
        torch.testing.assert_close(weights(tmp_path / "out")[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("computing", [torch.float32, torch.bfloat16], ids=["CPU without bf16", "with"])
def test_an_adapter_beside_weights_of_16_bits_is_compared_as_such(
    lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computing: torch.dtype
) -> None:
    monkeypatch.setattr(export_room, "pick_dtype", lambda name, stored, device: max(computing, stored, key=str))
    found = export(str(lora_run), tmp_path / "out", torch.bfloat16)
    assert found.by_adapter is not None and 1e-4 < found.by_adapter / found.largest < 0.1


def test_the_merged_model_of_a_lora_run_can_be_named(lora_run: Path, tmp_path: Path) -> None:
    export(str(lora_run / "model"), tmp_path / "out")
    assert not (tmp_path / "out/adapter").exists()
    assert "| mine-lora | projector" in (tmp_path / "out/README.md").read_text()


def test_merging_does_no_harm_without_adapters(run: Path, tmp_path: Path) -> None:
    assert command(run, tmp_path / "out", "--merge-lora").exit_code == 0


# OUT


def test_a_folder_that_something_else_lives_in_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for flags in ([], ["--overwrite"]):
        done = command(run, tmp_path, *flags)
        assert done.exit_code == 2
        assert f"error: {tmp_path} exists and is no earlier export; name another folder" in done.output
    assert (tmp_path / "thesis.txt").exists()
    assert command(run, run / "model", "--overwrite").exit_code == 2, "the run itself is no export"


def test_the_folder_one_is_in_can_be_exported_to(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export(str(run), Path())
    assert damage(tmp_path / "here") is None


def test_an_earlier_export_is_replaced_on_request_only(run: Path, tmp_path: Path) -> None:
    assert command(run, tmp_path / "out").exit_code == 0
    done = command(run, tmp_path / "out", "--dtype", "bf16")
    assert done.exit_code == 2
    assert f"holds an export of {run}; --overwrite replaces it" in done.output
    assert command(run, tmp_path / "out", "--dtype", "bf16", "--overwrite").exit_code == 0
    assert weights(tmp_path / "out")["language_model.lm_head.weight"].dtype == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "failure, raised",
    [(OSError(errno.ENOSPC, "No space left on device"), ExportError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["disk full", "Ctrl-C"],
)
@pytest.mark.parametrize(
    "step", ["use.export.write_model", "use.export._load_plainly", "use.export.write_manifest", "files.rename_durably"]
)
def test_a_failed_export_leaves_nothing_and_spares_the_earlier_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, failure: BaseException, raised: Any
) -> None:
    export(str(run), tmp_path / "earlier")

    def fail(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(f"llava_train.{step}", fail)
    for out in ("earlier", "out"):
        with pytest.raises(raised):
            export(str(run), tmp_path / out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["earlier"]
    assert damage(tmp_path / "earlier") is None


def test_a_disk_that_is_too_small_is_refused_before_it_is_full(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = export_room.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(export_room.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ExportError, match=r"the model takes 0.0 GB, .* has 0.0 GB left"):
        export(str(run), tmp_path / "out")


def damaged(what: str) -> Any:
    """`write_model`, and then something goes wrong with one of its files."""
    write = export_room.write_model

    def write_and_damage(*arguments: Any) -> None:
        write(*arguments)
        folder: Path = arguments[-1]
        state = load_file(folder / "model.safetensors")
        name = "language_model.model.layers.1.mlp.up_proj.weight"
        if what == "weights":
            state[name] = state[name] + 0.01
        elif what == "missing":
            del state[name]
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        for file, old, new in [("chat_template.json", "USER", "User"), ("preprocessor_config.json", "0.48", "0.47")]:
            if file.startswith(what):
                for path in [folder / file, folder / "chat_template.jinja", folder / "processor_config.json"]:
                    path.write_text(path.read_text().replace(old, new))

    return write_and_damage


@pytest.mark.parametrize(
    "what, message",
    [
        ("weights", "what was written computes other logits: they differ by up to .*, the largest is"),
        ("missing", "transformers does not load what was written as it is .*up_proj"),
        ("chat_template", "the processor that was written makes other tokens of a prompt"),
        ("preprocessor", "the processor that was written makes other pixels of a picture"),
    ],
)
def test_an_export_that_is_not_the_model_never_comes_to_be(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, message: str
) -> None:
    monkeypatch.setattr(export_room, "write_model", damaged(what))
    with pytest.raises(ExportError, match=message):
        export(str(run), tmp_path / "out")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("source", ["nowhere/at/all", "."])
def test_a_source_without_a_model_is_refused(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = command(source, tmp_path / "out")
    assert done.exit_code == 2
    assert done.output.startswith("error: ")
    assert nothing_left(tmp_path)


# The model card


def test_the_card_tells_recipe_data_metrics_and_use(lora_run: Path, tmp_path: Path) -> None:
    export(str(lora_run), tmp_path / "out")
    _, front, body = (tmp_path / "out/README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "license": "other",
        "tags": ["llava", "llava_train"],
    }
    for words in (
        "# out\n",
        "| mine-lora | projector (0.001); language_model (0.0001, LoRA of rank 2 and alpha 4) | 6 | 10 | pad | vicuna_v1 | fp32 |",
        "| mine-lora | data | 12,345 |",
        "| mine-lora | 1.2500 | 1.5000 |",
        "vllm serve out --enable-lora --max-lora-rank 8 --lora-modules trained=out/adapter",
        'PeftModel.from_pretrained(model, "out", subfolder="adapter")',
        "## Licence\n\nNot stated.",
    ):
        assert words in body
    assert "/home/me" not in body + front, "where the data was is nobody's business"


def test_the_card_names_hub_parts_data_sets_and_earlier_stages(run: Path, tmp_path: Path) -> None:
    for name, init_from in (("stage1", "random"), ("stage2", "elsewhere/stage1")):
        card = yaml.safe_load((run / "config.yaml").read_text()) | {"name": name, "init_from": init_from}
        card["model"] |= {"language_model": "lmsys/vicuna-7b-v1.5", "vision_tower": "openai/clip-vit-large-patch14-336"}
        card["data"] = [{"path": "me/captions" if name == "stage1" else "data/mix.json"}]
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(card))
    (tmp_path / "stage2/model").symlink_to(run / "model")
    export(str(tmp_path / "stage2"), tmp_path / "out", name="me/llava-mine")
    _, front, body = (tmp_path / "out/README.md").read_text().split("---\n", 2)
    parsed = yaml.safe_load(front)
    assert parsed["base_model"] == ["openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5"]
    assert parsed["datasets"] == ["me/captions"]
    assert body.index("| stage1 | projector") < body.index("| stage2 | projector")
    assert 'from_pretrained("me/llava-mine")' in body


def test_the_code_of_the_card_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(str(run), tmp_path / "out")
    write_picture(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    [code] = [part.split("```")[0] for part in (tmp_path / "out/README.md").read_text().split("```python\n")[1:]]
    exec(code.replace(', device_map="auto"', ""), {})  # which needs accelerate
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert QUESTION in processor.apply_chat_template([{"role": "user", "content": QUESTION}])


def test_a_template_that_ends_in_text_tells_servers_so(tmp_path: Path) -> None:
    section = model_section(chat_template="llava_v0").model_dump(mode="json")
    run = write_run(tmp_path / "v0", model=section)
    export(str(run), tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert '"stop": ["###"]' in card and 'stop_strings=["###"], tokenizer=processor.tokenizer' in card
    assert "stop_strings" not in (tmp_path / "out/generation_config.json").read_text()


# The hub


class FakeHub:
    """Takes what would be uploaded."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def create_repo(self, repo: str, **settings: Any) -> None:
        self.calls.append((repo, settings))

    def upload_folder(self, **settings: Any) -> str:
        self.calls.append(("upload", settings))
        return f"https://huggingface.co/{settings['repo_id']}"


def test_an_export_is_uploaded_without_our_manifest(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub()
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_token")
    done = command(run, tmp_path / "out", "--push-to-hub", "me/llava-mine", "--private")
    assert done.exit_code == 0, done.output
    assert done.output.rstrip().endswith("https://huggingface.co/me/llava-mine")
    assert fake.calls == [
        ("me/llava-mine", {"private": True, "exist_ok": True}),
        (
            "upload",
            {"repo_id": "me/llava-mine", "folder_path": str(tmp_path / "out"), "ignore_patterns": ["COMPLETE"]},
        ),
    ]
    assert 'from_pretrained("me/llava-mine")' in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    "repo, token, message",
    [
        ("me/mine", None, "needs a token that may write: run `hf auth login`"),
        ("a/b/c", "hf_token", "--push-to-hub a/b/c: "),
    ],
)
def test_an_upload_that_cannot_work_is_refused_before_the_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo: str, token: str | None, message: str
) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: token)
    done = command(run, tmp_path / "out", "--push-to-hub", repo)
    assert done.exit_code == 2 and message in done.output
    assert nothing_left(tmp_path)


def test_a_failed_upload_keeps_the_export(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreachable(FakeHub):
        def create_repo(self, repo: str, **settings: Any) -> None:
            raise ConnectionError("no network")

    monkeypatch.setattr(hub, "HfApi", Unreachable)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_token")
    done = command(run, tmp_path / "out", "--push-to-hub", "me/mine")
    assert done.exit_code == 2
    assert f"{tmp_path / 'out'} is complete, but was not uploaded: no network; try `hf upload me/mine" in done.output
    assert damage(tmp_path / "out") is None


def test_the_projector_alone_goes_out_under_the_names_of_the_original(tmp_path: Path) -> None:
    source = export_tiny(tmp_path / "model")
    done = CliRunner().invoke(app, ["export", str(source), str(tmp_path / "out"), "--mm-projector"])
    assert done.exit_code == 0, done.output
    written = torch.load(tmp_path / "out/mm_projector.bin", weights_only=True)
    projector = LLaVA.from_pretrained(source).model.model.multi_modal_projector
    assert torch.equal(written["model.mm_projector.0.weight"], projector.linear_1.weight)
    assert torch.equal(written["model.mm_projector.2.bias"], projector.linear_2.bias)
    again = CliRunner().invoke(app, ["export", str(source), str(tmp_path / "out"), "--mm-projector"])
    assert again.exit_code == 2 and "exists; --overwrite replaces it" in again.output
