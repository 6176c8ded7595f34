"""Exported models on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from llava_train.errors import UserError
from llava_train.files import MANIFEST


class HubError(UserError):
    """Nothing can be uploaded. The message says what to do."""


def check_push(repo: str) -> None:
    """Refuses an upload that cannot work, before the export takes its time.

    Raises:
        HubError: a name that the hub does not allow, or nobody is logged in.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise HubError(f"--push-to-hub {repo}: {error}") from error
    if get_token() is None:
        raise HubError("--push-to-hub needs a token that may write: run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repo: str, private: bool) -> str:
    """Uploads an exported model to a repository, made where it is missing; returns its address. Raises HubError."""
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=str(folder), ignore_patterns=[MANIFEST]))
    except Exception as error:  # of its HTTP library, which is another one in each version
        raise HubError(
            f"{folder} is complete, but was not uploaded: {error}; try `hf upload {repo} {folder}`"
        ) from error
