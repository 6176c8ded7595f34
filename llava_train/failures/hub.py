"""Failures of the Hugging Face hub: gated, missing, out of reach."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from llava_train.failures.words import Context, Explain, Explanation, chain, first_lines, is_a, shortened

_HUB = "https://huggingface.co"
_HUB_ANSWER = "huggingface_hub.errors.HfHubHTTPError"


def _gated(error: BaseException, context: Context) -> Explanation | None:
    of_datasets = is_a(error, "datasets.exceptions.DatasetNotFoundError") and "gated" in str(error)
    if not (of_datasets or is_a(error, "huggingface_hub.errors.GatedRepoError")):
        return None
    name = context.subject or repository_of(error)
    page = f"{_HUB}/{'datasets/' * of_datasets}{name}" if name else "its page on the hub"
    return Explanation(
        "it is gated: the hub gives it only to accounts that have accepted its terms",
        (
            f"Accept them at {page}, run `hf auth login` with that account (or set HF_TOKEN), and start again;",
            "or name a folder with a copy of it instead.",
        ),
        name,
        by_user=True,
    )


def _not_on_hub(error: BaseException, context: Context) -> Explanation | None:
    names = ("huggingface_hub.errors.RepositoryNotFoundError", "datasets.exceptions.DatasetNotFoundError")
    if not any(is_a(error, name) for name in names):
        return None
    return Explanation(
        "there is no such folder here, and no such repository on the hub that this account may see",
        (
            f"Check the spelling. If a folder is meant, its path counts from {Path.cwd()}.",
            "A private repository needs `hf auth login` with an account that may read it (or HF_TOKEN).",
        ),
        context.subject or repository_of(error),
        by_user=True,
    )


def _no_hub(error: BaseException, context: Context) -> Explanation | None:
    name = context.subject or repository_of(error)
    copied = f"Or `hf download {name or 'NAME'} --local-dir FOLDER` where there is a network, and name that folder."
    is_local = is_a(error, "huggingface_hub.errors.LocalEntryNotFoundError")
    answers = [link for link in (chain(error) if is_local else (error,)) if is_a(link, _HUB_ANSWER)]
    if answers and (code := getattr(getattr(answers[0], "response", None), "status_code", None)):
        login = "Check which account `hf auth whoami` shows, and what its token may do; `hf auth login` changes it."
        mend = login if code in (401, 403) else "Start again later; https://status.huggingface.co tells of outages."
        return Explanation(f"the hub refuses it, by code {code}", (mend, copied), name)
    is_offline = is_a(error, "huggingface_hub.errors.OfflineModeIsEnabled") or "OfflineModeIsEnabled" in str(error)
    if is_offline or (is_local and getattr(sys.modules.get("huggingface_hub.constants"), "HF_HUB_OFFLINE", False)):
        return Explanation(
            "it is no folder here and not in the hub's cache, and HF_HUB_OFFLINE forbids to download it",
            ("Unset HF_HUB_OFFLINE where there is a network, or give the folder of a copy.", copied),
            name,
            by_user=True,
        )
    by_datasets = isinstance(error, ConnectionError) and "on the Hub" in str(error)
    if not (is_local or by_datasets or _is_of_http(error)):
        return None
    *_, last = chain(error)
    why = shortened(first_lines(last, 1), 80) if _is_of_http(last) else type(last).__name__
    return Explanation(
        f"the hub cannot be reached ({why}), and it is no folder here",
        ("Check the network and its proxy (HTTPS_PROXY, HF_ENDPOINT), and start again.", copied),
        name,
    )


def _is_of_http(error: BaseException) -> bool:
    """Whether the HTTP library of the hub failed to reach a server: it is another one in each version."""
    libraries = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
    unreached = ("TransportError", "NetworkError", "ConnectionError", "Timeout")
    classes = [of for of in type(error).__mro__ if of.__module__.split(".")[0] in libraries]
    return any(of.__name__ in unreached for of in classes)


def repository_of(error: BaseException) -> str:
    """The repository that an error of the hub is about, by the address in it."""
    found = re.search(r"https?://[^/\s]+/(?:api/)?(?:models/|datasets/)?([\w.-]+/[\w.-]+)", str(error))
    return found[1] if found else ""


KNOWN: tuple[Explain, ...] = (_gated, _not_on_hub, _no_hub)
