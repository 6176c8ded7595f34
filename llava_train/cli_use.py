"""The part of the `llava-train` command that uses trained models."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from llava_train.errors import UserError, user_errors

app = typer.Typer()


class DeviceName(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class DtypeName(str, Enum):
    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class QuantizationName(str, Enum):
    four = "4bit"
    eight = "8bit"


Model = Annotated[str, typer.Argument(help="Run folder, its model/, a LLaVA model of any origin, or a hub id.")]
OnDevice = Annotated[DeviceName, typer.Option("--device", help="auto: a GPU where there is one.")]
InDtype = Annotated[DtypeName, typer.Option("--dtype", help="auto: that of the weights.")]
Quantize = Annotated[QuantizationName | None, typer.Option(help="Language model in 4 or 8 bits, on CUDA.")]
System = Annotated[str | None, typer.Option(help="What the model is told before the conversation.")]
MaxNewTokens = Annotated[int, typer.Option(help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option(help="0: always the most likely token.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that have this share.")]
Seed = Annotated[int | None, typer.Option(help="Of the draws.")]
ChatTemplate = Annotated[str | None, typer.Option(help="Name or jinja file; default: the model's own.")]
AllowUrls = Annotated[bool, typer.Option("--allow-urls", help="Fetch http(s) pictures from public addresses.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model brings along.")]


@app.command()
def ask(
    model: Model,
    image: Annotated[str, typer.Argument(help="Picture file.")],
    question: str,
    more: Annotated[list[str] | None, typer.Option("--image", help="One more picture.")] = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    device: OnDevice = DeviceName.auto,
    dtype: InDtype = DtypeName.auto,
    quantize: Quantize = None,
    chat_template: ChatTemplate = None,
    allow_urls: AllowUrls = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Ask a model about a picture; the answer is printed as it is made.

    Example: llava-train ask runs/llava-1.5-7b-stage2 dog.jpg "What can you see in this image?"
    """
    with user_errors():
        from llava_train.use.images import read_image
        from llava_train.use.llava import question_about

        pictures = [read_image(picture, allow_urls) for picture in [image, *(more or [])]]
        llava = _load(model, device, dtype, quantize, chat_template, trust_remote_code)
        asked = question_about(pictures, question, system)
        chosen = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        for piece in llava.stream(asked, **chosen):
            _say(piece)
        _say("\n")


@app.command()
def chat(
    model: Model,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    device: OnDevice = DeviceName.auto,
    dtype: InDtype = DtypeName.auto,
    quantize: Quantize = None,
    chat_template: ChatTemplate = None,
    allow_urls: AllowUrls = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk with a model; /image PATH shows it a picture.

    Example: llava-train chat runs/llava-1.5-7b-stage2
    """
    with user_errors():
        from llava_train.use.terminal_chat import TerminalChat

        chosen = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        llava = _load(model, device, dtype, quantize, chat_template, trust_remote_code)
        TerminalChat(llava, input, _say, system, allow_urls, chosen).run()


@app.command()
def demo(
    model: Model,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets everyone in the network ask.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    examples: Annotated[Path | None, typer.Option(help="Folder of pictures; questions in .txt beside.")] = None,
    max_upload_mb: Annotated[float, typer.Option(min=0.1, help="Largest file to take.")] = 10,
    max_megapixels: Annotated[float, typer.Option(min=0.1, help="Largest picture to take.")] = 25,
    device: OnDevice = DeviceName.auto,
    dtype: InDtype = DtypeName.auto,
    quantize: Quantize = None,
    chat_template: ChatTemplate = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show a page in the browser where a model can be asked about pictures.

    Example: llava-train demo runs/llava-1.5-7b-stage2
    """
    with user_errors():
        try:
            from llava_train.use.demo import Limits, check_address, serve
        except ModuleNotFoundError as error:
            raise UserError(f"{error}; the page needs: pip install 'llava_train[demo]' (here: -e '.[demo]')") from None
        from llava_train.use.examples import examples_for

        check_address(host, port)
        shown = examples_for(model, examples)
        llava = _load(model, device, dtype, quantize, chat_template, trust_remote_code)
        serve(llava, shown, Limits(max_upload_mb, max_megapixels), host, port)


def _load(
    model: str,
    device: DeviceName,
    dtype: DtypeName,
    quantize: QuantizationName | None,
    chat_template: str | None,
    trust_remote_code: bool,
) -> Any:
    from llava_train.use.llava import LLaVA

    settings: dict[str, Any] = {
        "dtype": dtype.value,
        "chat_template": chat_template,
        "trust_remote_code": trust_remote_code,
    }
    if quantize:
        settings["quantization"] = quantize.value
    return LLaVA.from_pretrained(model, device.value, **settings)


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@app.command()
def export(
    source: Annotated[str, typer.Argument(metavar="RUN", help="Run folder, or any LLaVA model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    dtype: InDtype = DtypeName.auto,
    merge_lora: Annotated[bool, typer.Option("--merge-lora", help="Adapters into the weights, not beside.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    push_to_hub: Annotated[str | None, typer.Option(metavar="USER/NAME", help="Upload it, too.")] = None,
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    chat_template: ChatTemplate = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a model for transformers 4 and 5, vLLM, SGLang and lmms-eval, and check what was written.

    Example: llava-train export runs/llava-1.5-7b-stage2 llava-mine --dtype bf16 --push-to-hub me/llava-mine
    """
    with user_errors():
        if push_to_hub:
            from llava_train.use.hub import check_push, push

            check_push(push_to_hub)
        from llava_train.devices import DTYPES
        from llava_train.use.export import export as export_model

        wanted = DTYPES.get(dtype.value)
        found = export_model(source, out, wanted, merge_lora, overwrite, chat_template, trust_remote_code, push_to_hub)
        print(f"{found.folder}: loaded again, its logits (up to {found.largest:.3g}) differ from the model's by")
        print(f"  {found.difference:.3g} at most")
        if wanted:
            print(f"  {found.by_dtype:.3g} at most from those before --dtype {dtype.value}")
        if found.by_adapter is not None:
            print(f"  {found.by_adapter:.3g} at most from the trained model's, with {found.folder}/adapter on")
        if push_to_hub:
            print(push(found.folder, push_to_hub, private))


class MetricName(str, Enum):
    vqa = "vqa"
    exact = "exact"
    pope = "pope"
    anls = "anls"
    caption = "caption"
    choice = "choice"


@app.command()
def evaluate(
    model: Model,
    data: Annotated[Path, typer.Option(help="Questions: LLaVA's JSONL with references, or training data.")],
    metric: Annotated[MetricName, typer.Option(help="How answers are measured.")],
    images: Annotated[str | None, typer.Option(help="Folder, ZIP or TAR of the pictures. Default: of --data.")] = None,
    answers: Annotated[Path | None, typer.Option(help="Answers file. Default: in the run's folder.")] = None,
    prompt_suffix: Annotated[str, typer.Option(help="A line after each question.")] = "",
    max_new_tokens: MaxNewTokens = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many questions.")] = None,
    blind: Annotated[bool, typer.Option("--blind", help="Also with blank pictures, and the best guess.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out what cannot be asked, and list it.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an answers file.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
    device: OnDevice = DeviceName.auto,
    dtype: InDtype = DtypeName.auto,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure a model's answers to a file of questions. The same command goes on after an interruption.

    Example: llava-train evaluate runs/llava-1.5-7b-stage2 --data pope.jsonl --images coco/val2014 --metric pope --blind

    On several GPUs: torchrun --nproc_per_node 8 -m llava_train evaluate ...
    """
    with user_errors():
        from llava_train.use.evaluate import Evaluation, print_report
        from llava_train.use.evaluate import evaluate as evaluate_plan

        plan = Evaluation(
            model,
            data,
            metric.value,
            images,
            answers,
            prompt_suffix,
            max_new_tokens,
            batch_size,
            limit,
            blind,
            skip_bad,
            overwrite,
            device.value,
            dtype.value,
            trust_remote_code,
        )
        report = evaluate_plan(plan, Console(stderr=True))
        if report is not None:
            print_report(plan, report, json_)


@app.command("lmms-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def lmms_eval(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Run folder, its model/, an exported folder, or a hub id.")],
    tasks: Annotated[str, typer.Option(help="Tasks of lmms-eval and files of questions, with commas between.")],
    images: Annotated[
        Path | None, typer.Option(help="Pictures of the files of questions. Default: the folder of each.")
    ] = None,
    output_path: Annotated[Path, typer.Option("--output-path", "--output_path")] = Path("runs/lmms-eval"),
    python: Annotated[str | None, typer.Option(help="Of the environment with lmms-eval; default: this one.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu. Default: cuda where it is.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share the questions.")] = 1,
    model_args: Annotated[str, typer.Option("--model-args", "--model_args", help="dtype=float32 for example.")] = "",
) -> None:
    """Run lmms-eval on a model; other options go to it as they are.

    Example: llava-train lmms-eval runs/NAME --tasks mme,gqa,held_out.json --python lmms-env/bin/python --limit 100
    """
    with user_errors():
        from llava_train.use.lmms_eval import Evaluation, evaluate

        names, more = tuple(name.strip() for name in tasks.split(",")), tuple(context.args)
        raise SystemExit(
            evaluate(Evaluation(model, names, output_path, images, python, device, gpus, model_args, more))
        )
