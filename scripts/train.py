"""Trains stages. Started by `deepspeed`, `torchrun`, `srun` or plain `python`:

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
    parser.add_argument("--stop-file", type=Path, help="save and exit with code 85 when this file appears")
    parser.add_argument("--suffix", default="", help="name each run NAME-SUFFIX")
    parser.add_argument("--allow-config-change", action="store_true", help="go on though stage file or data changed")
    parser.add_argument("--verbose", action="store_true", help="show what libraries say, too")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_args()
    return run(
        arguments.config,
        arguments.overrides,
        arguments.stop_file,
        arguments.suffix,
        arguments.allow_config_change,
        arguments.verbose,
    )


if __name__ == "__main__":
    sys.exit(main())
