"""The folder of a run: who works in it, and whether it is still the run that the stage file describes.

Two processes that write to one folder would ruin it, and a checkpoint continued with another learning rate or other
data is another experiment under the name of the first. Both are refused. The keys that are only speed knobs (how many
tokens fit a pack, ZeRO stage, workers, how often to log and save) may change freely.
"""

from __future__ import annotations

import fcntl
import getpass
import hashlib
import json
import os
import platform
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import yaml

from llava_train import __version__
from llava_train.config import NAME, StageConfig
from llava_train.data.mixture import Mixture
from llava_train.errors import UserError
from llava_train.files import MANIFEST, rename_durably, sha256, write_durably
from llava_train.places import is_path_key, places_of
from llava_train.run_files import RESULT_FOLDER, flatten
from llava_train.stage_file import RUN_CARD

_LOCK_PATIENCE_S, _FAR_LOCK_PATIENCE_S = 15.0, 120.0
"""A launcher may still be ending the run before; of a machine that died, a file server holds the lock for a lease."""

FREE_KEYS = (
    "name",
    "output",
    "max_bad_share",
    "max_bad_steps",
    "batch.max_tokens",
    "batch.packing",
    "engine.zero",
    "engine.offload_optimizer",
    "engine.offload_parameters",
    "engine.activation_checkpointing",
    "engine.kernels",
    "engine.deepspeed",
    "engine.hang_timeout_s",
    "loader",
    "checkpoint",
    "logging",
    "eval",
)
"""Keys (and everything below them) that change neither what a step trains on nor what it learns."""

_CONTENT, _CONTENT_OF_START = "content of data", "content of init_from"

POLICIES = ("on_bad_sample", "batch.over_long")
"""Keys that the error of a run tells to change from `error`: no sample was left out so far."""


class RunFolderError(UserError):
    """The folder of a run is in use, or is another run's."""


@contextmanager
def held(run_dir: Path, lock_file: Path) -> Iterator[None]:
    """Keeps a run's folder to this process and says to others whose it is, in a file beside it; on rank 0.

    A lock of POSIX: unlike others it dies with the process at once, whoever it started, and works on NFS.

    Raises:
        RunFolderError: another process has it, named by machine, process and job.
    """
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_file.open("a+", encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"output: cannot write to {lock_file}: {error.strerror}") from error
    with lock:
        _take(lock, run_dir)
        lock.truncate(0)
        lock.write(json.dumps(_this_process()))
        lock.flush()
        yield
        lock.truncate(0)


def _take(lock: TextIO, run_dir: Path) -> None:
    started = time.monotonic()
    while True:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            patience_s = _LOCK_PATIENCE_S if _is_here(lock) else _FAR_LOCK_PATIENCE_S
            if time.monotonic() > started + patience_s:
                raise RunFolderError(
                    f"{run_dir} is in use by {_owner(lock)}; wait for it, stop it, or give this run another name (if "
                    f"that machine is gone, delete {lock.name})"
                ) from None
            time.sleep(0.2)
        except OSError as error:
            print(f"warning: {run_dir} cannot be locked ({error.strerror}); start no second run in it", flush=True)
            return


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "user": getpass.getuser(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "since": datetime.now().isoformat(sep=" ", timespec="seconds"),
    }


def _is_here(lock: TextIO) -> bool:
    """Whether the owner of a folder runs on this machine."""
    with suppress(OSError, ValueError, KeyError):
        lock.seek(0)
        return bool(json.loads(lock.read())["host"] == socket.gethostname())
    return True


def _owner(lock: TextIO) -> str:
    """Who holds a folder, in words."""
    with suppress(OSError, ValueError, KeyError):
        lock.seek(0)
        owner = json.loads(lock.read())
        job = f", SLURM job {owner['job']}" if owner["job"] else ""
        return f"process {owner['pid']} of {owner['user']} on {owner['host']}{job}, since {owner['since']}"
    return "another process"


def describe(config: StageConfig, mixture: Mixture | None = None) -> dict[str, Any]:
    """What makes a run what it is: the resolved config, and what is in the data, where that is open."""
    resolved = json.loads(config.model_dump_json())
    if mixture is None:
        return resolved
    data = [
        {"path": s.path, "name": s.name, "n_samples": len(s), "fingerprint": s.fingerprint()} for s in mixture.sources
    ]
    about: dict[str, Any] = {"data": data, "places": places_of(config)}
    with suppress(OSError, TypeError):
        about["init_from"] = sha256(Path(config.start or "") / RESULT_FOLDER / MANIFEST)
    return {**resolved, "about": about}


def decisive(card: dict[str, Any]) -> dict[str, Any]:
    """The keys of a run's description that decide its result, flat: `{"batch.size": 128, ...}`."""
    flat = dict(flatten({key: value for key, value in card.items() if key != "about"}))
    if "about" in card:
        flat |= flatten({_CONTENT: [source["fingerprint"] for source in card["about"]["data"]]})
        flat |= flatten({_CONTENT_OF_START: card["about"].get("init_from")})
    return {key: value for key, value in flat.items() if not any(_below(key, free) for free in FREE_KEYS)}


def config_hash(card: dict[str, Any]) -> str:
    """One word for `decisive`."""
    return hashlib.sha256(json.dumps(decisive(card), sort_keys=True).encode()).hexdigest()[:16]


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What decides the result and is different, a line each: `batch.size: 64 -> 128`."""
    old, new = decisive(before), decisive(now)
    found = []
    for key in sorted(old.keys() | new.keys()):
        if "about" not in now and (_below(key, _CONTENT) or key == _CONTENT_OF_START):
            continue
        was, is_ = old.get(key, "not set"), new.get(key, "not set")
        if was != is_ and not (key in POLICIES and was == "error") and not _is_one_place(key, before, now):
            found.append(f"{key}: {_shown(was)} -> {_shown(is_)}")
    return found


def _is_one_place(key: str, *cards: dict[str, Any]) -> bool:
    """True for a key whose values in two cards are two names of one file, folder or run."""
    if key == "init_from":
        contents = {card.get("about", {}).get("init_from") for card in cards}
        first, second = map(_starts, cards)
        return (len(contents) == 1 and None not in contents) or bool(first & second)
    values = [dict(flatten(card)).get(key) for card in cards]
    places = {Path(value).expanduser().resolve() if isinstance(value, str) else None for value in values}
    return is_path_key(key) and len(places) == 1 and None not in places


def _starts(card: dict[str, Any]) -> set[Path]:
    """Where the start of a run is, or may have been: its `init_from` as the name of a run, and as a path."""
    init_from, of_run = str(card.get("init_from")), Path(card.get("output", "runs")) / str(card.get("init_from"))
    is_name = re.fullmatch(NAME, init_from) is not None and init_from != card.get("name")
    if is_name and of_run.is_dir():
        return {of_run.resolve()}
    found = {Path(init_from).expanduser().resolve()}
    return found | {of_run.resolve()} if is_name and not Path(init_from).exists() else found


def read_card(run_dir: Path) -> dict[str, Any] | None:
    """The description that a run left, None when there is none that can be read."""
    try:
        card = yaml.safe_load((run_dir / RUN_CARD).read_text(encoding="utf-8"))
        decisive(card)
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return None
    with suppress(ValueError):  # keys that are newer than the run have their defaults
        config = StageConfig.model_validate({key: value for key, value in card.items() if key != "about"})
        card |= json.loads(config.model_dump_json())
    return card


def check_finished(run_dir: Path, card: dict[str, Any]) -> None:
    """Refuses a finished run whose stage file has changed: it takes no further steps, whatever is allowed.

    Raises:
        RunFolderError: something that decides the result has changed.
    """
    before = read_card(run_dir)
    if found := changes(before, card) if before is not None else []:
        listed = "\n  ".join(found)
        raise RunFolderError(
            f"{run_dir} is finished, and was trained with another stage file:\n  {listed}\n"
            "It takes no more steps: that would change the learning rate, or the samples, of steps already taken.\n"
            "Undo the change, leave this stage out of the command, or write a new `name` to train another run. To go "
            f"on from its result, write a new `name` and `init_from: {run_dir.name}` in the stage file"
        )


def check_unchanged(run_dir: Path, card: dict[str, Any], saved_hash: str | None, allowed: bool) -> list[str]:
    """What has changed since the run in this folder began, and is allowed to.

    Args:
        saved_hash: `config_hash` when the newest checkpoint was saved; it speaks where config.yaml is lost.

    Raises:
        RunFolderError: something that decides the result has changed.
    """
    before = read_card(run_dir)
    if before is not None:
        found = changes(before, card)
    else:
        found = ["config.yaml is lost, and the checkpoint was saved with another one"]
        as_path = {**card, "init_from": f"{card['output']}/{card['init_from']}"}  # as earlier versions named runs
        found = found if saved_hash not in (None, config_hash(card), config_hash(as_path)) else []
    if found and not allowed:
        listed = "\n  ".join(found)
        raise RunFolderError(
            f"{run_dir} was begun with another stage file or other data:\n  {listed}\n"
            "Undo that, give the run another name, or go on all the same with --allow-config-change"
        )
    return found


def write_card(run_dir: Path, card: dict[str, Any], n_ranks: int, step: int, changed: bool) -> None:
    """Writes config.yaml: the resolved config, versions, git commit, data fingerprint.

    Args:
        changed: the one that is there described another run; it is kept, with the step up to which it held.
    """
    packages = ("torch", "transformers", "deepspeed", "peft", "pillow")
    about = {
        "llava_train": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "git_commit": _git_commit(),
        "n_ranks": n_ranks,
        **card["about"],
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    if changed and (run_dir / RUN_CARD).is_file():
        rename_durably(run_dir / RUN_CARD, run_dir / f"config-until-step-{step:08d}.yaml")
    text = yaml.safe_dump({**card, "about": about}, sort_keys=False, allow_unicode=True)
    write_durably(run_dir / RUN_CARD, text)


def _git_commit() -> str | None:
    """Commit of the code that runs, when it runs from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    return None


def _below(key: str, parent: str) -> bool:
    return key == parent or key.startswith(parent + ".")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
