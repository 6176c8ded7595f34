"""Trains stages. Started by `deepspeed`, `torchrun` or plain `python`:

deepspeed scripts/train.py --config stage1.yaml stage2.yaml --set batch.max_tokens=8192
"""

import argparse
import sys
from pathlib import Path

from llava_train.cli import run


def main() -> int:
    parser = argparse.ArgumentParser(description="Run stages in order; the same command resumes.")
    parser.add_argument("--config", type=Path, nargs="+", required=True, help="stage files")
    parser.add_argument("--set", dest="overrides", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_args()
    return run(arguments.config, arguments.overrides)


if __name__ == "__main__":
    sys.exit(main())
