"""`python -m llava_train` is the `llava-train` command."""

from llava_train.cli import app

app(prog_name="llava-train")
