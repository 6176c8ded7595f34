"""Runs notebooks for real and keeps their outputs, small enough to be committed.

    python scripts/run_notebooks.py notebooks/2-look-inside.ipynb

Pictures are kept with 256 colours; progress bars, warnings of libraries, times and paths of this machine are left out.
CI runs the same cells on tiny parts (`notebooks/conftest.py`) and keeps nothing.
"""

from __future__ import annotations

import argparse
import base64
import io
import re
from collections.abc import Iterable
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

ROOT = Path(__file__).parents[1]
N_COLOURS = 256
DEEPSPEED_WARNING = re.compile(r"^\[[^\n]*\[WARNING\][^\0]*?detect it\.\n", re.MULTILINE)


def smaller(png: str) -> str:
    """A PNG in base64, with a palette."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(N_COLOURS, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def joined(outputs: Iterable[NotebookNode]) -> list[NotebookNode]:
    """The same with the pieces of a text that follow each other made one."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if kept and output.output_type == kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def tidy(notebook: NotebookNode) -> None:
    """Leaves what a reader of the notebook wants to see, in place."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.outputs = joined(output for output in cell.outputs if output.get("name") != "stderr")
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
            if "text" in output:
                output.text = DEEPSPEED_WARNING.sub("", output.text).replace(f"{ROOT}/", "")
    notebook.metadata.pop("language_info", None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", type=Path, nargs="+")
    for path in parser.parse_args().notebooks:
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=None).execute(cwd=str(path.parent))
        tidy(notebook)
        nbformat.write(notebook, path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
