"""The commands of `llava-train` that talk with a trained model."""

from __future__ import annotations

import sys
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from llava_train.cli_help import USE, Command, expanded
from llava_train.errors import UserError, user_errors
from llava_train.train.terminal import is_read

app = typer.Typer()


class DtypeName(str, Enum):
    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class QuantizationName(str, Enum):
    four = "4bit"
    eight = "8bit"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Run folder, its model/, a LLaVA model of any origin, or a hub id.", parser=expanded
    ),
]
OnDevice = Annotated[
    str, typer.Option("--device", metavar="NAME", help="cpu, cuda or cuda:1. auto: a GPU where there is one.")
]
InDtype = Annotated[
    DtypeName, typer.Option("--dtype", metavar="NAME", help="bf16, fp16 or fp32. auto: that of the weights.")
]
Quantize = Annotated[
    QuantizationName | None, typer.Option(help="Hold the language model in 4 or 8 bits, on a CUDA device.")
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told before the conversation.")]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option(metavar="T", help="Of the draws. 0: always the likeliest token.")]
TopP = Annotated[
    float, typer.Option(metavar="SHARE", help="Draw from the likeliest tokens that together have this probability.")
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Of the draws. Default: another one each time.")]
ChatTemplate = Annotated[
    str | None,
    typer.Option(metavar="NAME|FILE", help="A template or a jinja file. Default: the model's own.", parser=expanded),
]
AllowUrls = Annotated[
    bool, typer.Option("--allow-urls", help="Fetch pictures from http(s) addresses, too; public ones only.")
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model brings along.")]


@app.command(cls=Command, rich_help_panel=USE)
def ask(
    model: Model,
    image: Annotated[str, typer.Argument(metavar="PICTURE", help="Picture file.", parser=expanded)],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask.")],
    more: Annotated[
        list[str] | None,
        typer.Option("--image", metavar="FILE", help="One more picture; repeatable.", parser=expanded),
    ] = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    device: OnDevice = "auto",
    dtype: InDtype = DtypeName.auto,
    quantize: Quantize = None,
    chat_template: ChatTemplate = None,
    allow_urls: AllowUrls = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Ask a model about a picture; the answer is printed as it is made.

    The model is loaded for this one question: `chat` and `demo` keep it.

    Example:
      llava-train ask runs/llava-1.5-7b-stage2 dog.jpg "What can you see?"
    """
    with user_errors():
        from llava_train.use.generation import Sampling
        from llava_train.use.images import read_image

        chosen = Sampling(max_new_tokens, temperature, top_p, seed=seed)
        pictures = [read_image(picture, allow_urls) for picture in [image, *(more or [])]]
        llava = _load(model, device, dtype, quantize, chat_template, trust_remote_code)
        for piece in llava.chat(system).stream(question, pictures, sampling=chosen):
            _say(piece)
            if not is_read():
                break
        _say("\n")


@app.command(cls=Command, rich_help_panel=USE)
def chat(
    model: Model,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    device: OnDevice = "auto",
    dtype: InDtype = DtypeName.auto,
    quantize: Quantize = None,
    chat_template: ChatTemplate = None,
    allow_urls: AllowUrls = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk with a model in the terminal; /image PATH shows it a picture.

    /help lists what else it understands.

    Example:
      llava-train chat runs/llava-1.5-7b-stage2 --temperature 0.2
    """
    with user_errors():
        from llava_train.use.generation import Sampling
        from llava_train.use.terminal_chat import TerminalChat

        with suppress(ImportError):
            import readline  # noqa: F401  # arrows and history in `input`
        chosen = {"sampling": Sampling(max_new_tokens, temperature, top_p, seed=seed)}
        llava = _load(model, device, dtype, quantize, chat_template, trust_remote_code)
        TerminalChat(llava, input, _say, system, allow_urls, chosen).run()


@app.command(cls=Command, rich_help_panel=USE)
def demo(
    model: Model,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="0.0.0.0 lets everyone in the network ask.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="N", help="Port of the page.")] = 7860,
    examples: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Pictures to offer; questions in .txt beside.")
    ] = None,
    max_upload_mb: Annotated[float, typer.Option(min=0.1, metavar="MB", help="Largest file to take.")] = 10,
    max_megapixels: Annotated[float, typer.Option(min=0.1, metavar="MPX", help="Largest picture to take.")] = 25,
    device: OnDevice = "auto",
    dtype: InDtype = DtypeName.auto,
    quantize: Quantize = None,
    chat_template: ChatTemplate = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show a page in the browser where a model can be asked about pictures.

    Works offline; needs pip install 'llava_train\\[demo]'.

    Example:
      llava-train demo runs/llava-1.5-7b-stage2
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
    device: str,
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
    llava = LLaVA.from_pretrained(model, device, **settings)
    if llava.ignores_question:
        print("note: this model's template leaves the question out (stage 1): it says what it sees", file=sys.stderr)
    return llava


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
