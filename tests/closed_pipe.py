"""Runs commands of `llava-train` whose output nobody reads: `python -m tests.closed_pipe COMMANDS.json`."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

from llava_train.cli import app


def run(arguments: list[str], descriptors: list[int]) -> int:
    """Returns the exit code of a command that writes to a pipe without a reader."""
    saved = {number: os.dup(number) for number in descriptors}
    reader, writer = os.pipe()
    os.close(reader)
    for number in descriptors:
        os.dup2(writer, number)
    os.close(writer)
    names = {1: "stdout", 2: "stderr"}
    for number in descriptors:
        stream = io.TextIOWrapper(io.FileIO(number, "w", closefd=False), write_through=True)
        setattr(sys, names[number], stream)
        setattr(sys, f"__{names[number]}__", stream)
    try:
        app(arguments)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    finally:
        for number in descriptors:
            getattr(sys, names[number]).flush()  # as Python does at its end
        for number, kept in saved.items():
            os.dup2(kept, number)
    return code


if __name__ == "__main__":
    content = json.loads(Path(sys.argv[1]).read_text())
    codes = {name: run(each["arguments"], each["descriptors"]) for name, each in content.items()}
    Path(sys.argv[1]).with_name("codes.json").write_text(json.dumps(codes))
