"""The commands of `llava-train` that measure a trained model and hand it on."""

from __future__ import annotations

import re
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from llava_train.cli_help import MEASURE, Command, expanded
from llava_train.cli_use import (
    ChatTemplate,
    DtypeName,
    InDtype,
    MaxNewTokens,
    Model,
    OnDevice,
    TrustRemoteCode,
)
from llava_train.errors import UserError, user_errors

app = typer.Typer()


class MetricName(str, Enum):
    vqa = "vqa"
    exact = "exact"
    pope = "pope"
    anls = "anls"
    caption = "caption"
    choice = "choice"


@app.command(cls=Command, rich_help_panel=MEASURE)
def evaluate(
    model: Model,
    data: Annotated[
        Path, typer.Option(metavar="FILE", help="Questions: LLaVA's JSONL with references, or training data.")
    ],
    metric: Annotated[MetricName, typer.Option(metavar="NAME", help="vqa, exact, pope, anls, caption or choice.")],
    images: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Folder, ZIP or TAR of the pictures. Default: folder of --data.", parser=expanded
        ),
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Answers file. Default: in the run's folder.")
    ] = None,
    prompt_suffix: Annotated[str, typer.Option(metavar="TEXT", help="A line after each question.")] = "",
    max_new_tokens: MaxNewTokens = 128,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Questions answered together.")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Ask only the first N questions.")] = None,
    blind: Annotated[
        bool, typer.Option("--blind", help="Ask with blank pictures, too, and take the best guess for all.")
    ] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out what cannot be asked, and list it.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew; the old answers stay as NAME.bak.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
    device: OnDevice = "auto",
    dtype: InDtype = DtypeName.auto,
    chat_template: ChatTemplate = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure a model's answers to a file of questions.

    The same command goes on after an interruption.

    Example:
      llava-train evaluate runs/llava-1.5-7b-stage2 --data pope.jsonl \\
        --images coco/val2014 --metric pope --blind

    On several GPUs:
      torchrun --nproc_per_node 8 -m llava_train evaluate ...
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
            device,
            dtype.value,
            chat_template,
            trust_remote_code,
        )
        try:
            report = evaluate_plan(plan, Console(stderr=True))
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from the last answer", file=sys.stderr)
            raise SystemExit(130) from None
        if report is not None:
            print_report(plan, report, json_)


class LmmsEvalCommand(Command):
    """Takes lmms-eval's own spelling of its options, `--output_path`, which would break the help's columns."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [re.sub(r"^--(output|model)_(?=path|args)", r"--\1-", arg) for arg in args])


@app.command(
    "lmms-eval",
    cls=LmmsEvalCommand,
    rich_help_panel=MEASURE,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def lmms_eval(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Run folder, its model/, an exported folder, or a hub id.", parser=expanded
        ),
    ],
    tasks: Annotated[
        str, typer.Option(metavar="A,B,...", help="Tasks of lmms-eval and files of questions, with commas between.")
    ],
    images: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Pictures of the files of questions. Default: each one's folder."),
    ] = None,
    output_path: Annotated[Path, typer.Option(metavar="FOLDER", help="Where results go.")] = Path("runs/lmms-eval"),
    python: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Python of the environment with lmms-eval. Default: this one.", parser=expanded
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cuda, cuda:1 or cpu. Default: cuda where it is.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, metavar="N", help="GPUs that share the questions.")] = 1,
    model_args: Annotated[str, typer.Option(metavar="A=B,...", help="More for the model: dtype=float32.")] = "",
) -> None:
    """Run the benchmarks of lmms-eval on a model.

    Options that are not listed here go to lmms-eval as they are.

    Example:
      llava-train lmms-eval runs/NAME --tasks mme,gqa,held_out.json \\
        --python lmms-env/bin/python --limit 100
    """
    with user_errors():
        from llava_train.use.lmms_eval import Evaluation, evaluate

        names, more = tuple(expanded(name.strip()) for name in tasks.split(",")), tuple(context.args)
        raise SystemExit(
            evaluate(Evaluation(model, names, output_path, images, python, device, gpus, model_args, more))
        )


@app.command(cls=Command, rich_help_panel=MEASURE)
def export(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="Run folder, or any LLaVA model.", parser=expanded)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    dtype: InDtype = DtypeName.auto,
    merge_lora: Annotated[
        bool, typer.Option("--merge-lora", help="Add adapters to the weights; default: keep them beside.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    push_to_hub: Annotated[str | None, typer.Option(metavar="USER/NAME", help="Upload it, too.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    mm_projector: Annotated[
        bool, typer.Option("--mm-projector", help="Write only OUT/mm_projector.bin, as the original LLaVA has it.")
    ] = False,
    chat_template: ChatTemplate = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a model for transformers 4 and 5, vLLM, SGLang and lmms-eval.

    What was written is loaded again, and its logits are compared with those of
    the model.

    Example:
      llava-train export runs/llava-1.5-7b-stage2 llava-mine --dtype bf16 \\
        --push-to-hub me/llava-mine
    """
    with user_errors():
        if private and not push_to_hub:
            raise UserError("--private says how a repository is made; it needs --push-to-hub USER/NAME")
        if push_to_hub:
            from llava_train.use.hub import check_push, push

            check_push(push_to_hub)
        from llava_train.devices import DTYPES
        from llava_train.use.export import export as export_model
        from llava_train.use.export import export_projector

        if mm_projector:
            if push_to_hub or merge_lora:
                raise UserError("--mm-projector writes no model; leave --push-to-hub and --merge-lora out")
            print(export_projector(source, out, DTYPES.get(dtype.value), overwrite))
            return

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
