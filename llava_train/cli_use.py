"""The commands of `llava-train` that talk with a trained model."""

from __future__ import annotations

import sys
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from llava_train.errors import UserError, user_errors

app = typer.Typer()


class DtypeName(str, Enum):
    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class QuantizationName(str, Enum):
    four = "4bit"
    eight = "8bit"


Model = Annotated[str, typer.Argument(help="Run folder, its model/, a LLaVA model of any origin, or a hub id.")]
OnDevice = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1; auto: a GPU where there is one.")]
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
    question: Annotated[str, typer.Argument(help="What to ask.")],
    more: Annotated[list[str] | None, typer.Option("--image", help="One more picture.")] = None,
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

    Example: llava-train ask runs/llava-1.5-7b-stage2 dog.jpg "What can you see in this image?"
    """
    with user_errors():
        from llava_train.use.generation import Sampling
        from llava_train.use.images import read_image

        chosen = Sampling(max_new_tokens, temperature, top_p, seed=seed)
        pictures = [read_image(picture, allow_urls) for picture in [image, *(more or [])]]
        llava = _load(model, device, dtype, quantize, chat_template, trust_remote_code)
        for piece in llava.chat(system).stream(question, pictures, sampling=chosen):
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
    device: OnDevice = "auto",
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
        from llava_train.use.generation import Sampling
        from llava_train.use.terminal_chat import TerminalChat

        with suppress(ImportError):
            import readline  # noqa: F401  # arrows and history in `input`
        chosen = {"sampling": Sampling(max_new_tokens, temperature, top_p, seed=seed)}
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
    device: OnDevice = "auto",
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
