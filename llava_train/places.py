"""Where the files that a stage file names were when its run trained, so that the run can be used from another folder.

`config.yaml` of a run keeps what its stage file said (`parts/dinov2-small`, which counts from the folder where training
started), and below `about.places` where that was: its absolute path, and its path from the run's folder. The first of
them that is still there is used, so that a run works from any folder, and after the whole project was moved.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_train.config import CHAT_TEMPLATES, StageConfig
from llava_train.files import is_hub_id

Keys = tuple[str | int, ...]
_SOURCE = r"path|images(\..+)?"
_IS_PATH = re.compile(
    r"model\.(language_model(\.tokenizer)?|vision_tower|chat_template)|init_from|engine\.deepspeed"
    rf"|(eval\.)?data\.\d+\.({_SOURCE})|eval\.questions\.({_SOURCE})"
)
_WORDS = {*CHAT_TEMPLATES, "auto", "random", "bytes"}


def is_path_key(key: str) -> bool:
    """True for the dotted keys of a stage file whose values may be paths, such as `data.0.images.coco`."""
    return _IS_PATH.fullmatch(key) is not None


def places_of(config: StageConfig) -> dict[str, dict[str, str]]:
    """Return where the files and folders of a stage file are: `{"init_from": {"absolute": ..., "from_run": ...}}`.

    What is not on this machine, such as hub ids, is left out.
    """
    run_dir, found = config.run_dir.resolve(), {}
    for keys, text in _paths(config.model_dump(mode="json")):
        path = Path(str(config.start) if keys == ("init_from",) else text)
        if path.exists():
            place = {"absolute": str(path.absolute()), "from_run": os.path.relpath(path.absolute(), run_dir)}
            found[_dotted(keys)] = place
    return found


def find_again(content: dict[str, Any], about: dict[str, Any], run_dir: Path) -> dict[str, tuple[str, list[str]]]:
    """Replace each path in a run's stage file by the place where it is now, in place.

    Args:
        content: the stage file.
        about: what the run noted beside it.

    Returns:
        For each key whose file is nowhere, its value and the places that were tried. Hub ids are not missed.
    """
    missing = {}
    recorded: dict[str, dict[str, str]] = about.get("places") or {}
    for keys, text in list(_paths(content)):
        place = recorded.get(_dotted(keys), {})
        tried = [Path(place["absolute"]), run_dir.resolve() / place["from_run"]] if place else []
        tried += [_started_in(content, run_dir) / text, Path(text).expanduser()]
        if keys == ("init_from",) and (place or about.get("init_from")):
            tried.append(run_dir.resolve().parent / Path(text).name)  # runs that were moved together
        found = next((path for path in tried if path.exists()), None)
        if found is not None:
            _set(content, keys, os.path.normpath(found))
        elif place or ("/" in text and not is_hub_id(text)):
            missing[_dotted(keys)] = text, list(dict.fromkeys(os.path.normpath(path.absolute()) for path in tried))
    return missing


def _paths(content: Any, keys: Keys = ()) -> Iterator[tuple[Keys, str]]:
    """Yield the values that may be paths, with their keys."""
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _paths(value, (*keys, key))
    elif isinstance(content, str) and is_path_key(_dotted(keys)) and content not in _WORDS:
        yield keys, content


def _started_in(content: dict[str, Any], run_dir: Path) -> Path:
    """The folder where the run started, by its `output`: all that runs of earlier versions tell about it."""
    ending = Path(str(content.get("output", "runs")), str(content.get("name"))).parts
    whole = run_dir.resolve().parts
    return Path(*whole[: -len(ending)]) if whole[-len(ending) :] == ending else run_dir.resolve()


def _set(content: Any, keys: Keys, value: str) -> None:
    for key in keys[:-1]:
        content = content[key]
    content[keys[-1]] = value


def _dotted(keys: Keys) -> str:
    return ".".join(map(str, keys))
