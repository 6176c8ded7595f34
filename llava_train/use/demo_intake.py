"""What the demo page takes from a client, who can send anything in place of what the page would.

gradio checks a file that a request names only where the file is marked as gradio marks it, downloads an address in
place of any input, reads requests of any size, and keeps a session's last inputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from gradio_client.utils import is_file_obj_with_meta, is_http_url_like, traverse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_train.errors import UserError

_LARGEST_REQUEST_BYTES = 2**18
"""Of a request that uploads nothing: a question and its settings."""

_ENVELOPE_BYTES = 2**20
"""What may surround the file in an upload."""


class Page(gr.Blocks):
    """A page that downloads nothing. (A block that is updated is made anew, so that it cannot be a block's matter.)"""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *more: Any, **settings: Any) -> Any:
        traverse(inputs, _refuse_address, is_file_obj_with_meta)
        return await super().preprocess_data(block_fn, inputs, *more, **settings)


def _refuse_address(file: dict[str, Any]) -> dict[str, Any]:
    if is_http_url_like(file["path"]):
        raise gr.Error("a picture is uploaded, not named by its address", print_exception=False)
    return file


class RequestLimit:
    """ASGI middleware that ends a request with status 413 when its body grows too large."""

    def __init__(self, app: ASGIApp, upload_bytes: int) -> None:
        self._app, self._upload_bytes = app, upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_upload = scope["path"].endswith("/gradio_api/upload")
        limit = self._upload_bytes + _ENVELOPE_BYTES if is_upload else _LARGEST_REQUEST_BYTES
        n_bytes = 0

        async def receive_within() -> Message:
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > limit:
                raise HTTPException(413, f"a request of more than {limit} bytes")
            return message

        await self._app(scope, receive_within, send)


def uploaded_file(file: Any, folder: Path, largest_mb: float) -> Path:
    """The file that a client names, which must be one of the uploads in `folder`. Nothing is opened.

    Raises:
        UserError: something else (another file of this machine, a device, nothing), or too large.
    """
    named = file.get("path") if isinstance(file, dict) else None
    try:
        path = Path(named if isinstance(named, str) else "").resolve()
        is_upload = path.is_relative_to(folder.resolve()) and path.is_file()
    except (OSError, ValueError, RuntimeError):  # a name that no file can have; before Python 3.13, a link to itself
        is_upload = False
    if not is_upload:
        raise UserError("that is no upload; upload the picture again")
    if path.stat().st_size > largest_mb * 2**20:
        raise UserError(f"{path.name}: larger than {largest_mb:g} MB")
    return path
