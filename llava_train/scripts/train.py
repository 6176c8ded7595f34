"""Trains stages. Started by `deepspeed`, `torchrun`, `srun` or plain `python`:

deepspeed scripts/train.py --config stage1.yaml stage2.yaml --set batch.max_tokens=8192
"""

import argparse
import sys
from pathlib import Path

from llava_train.cli import run

EPILOG = """exit codes:
  0 done; 1 a failure that nobody foresaw; 2 something that you can mend;
  85 asked to stop, and saved; 86 a rank hung; 130 Ctrl-C

examples:
  deepspeed scripts/train.py --config stage1.yaml stage2.yaml
  torchrun --nproc_per_node 8 scripts/train.py --config stage2.yaml --set seed=1
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Train stages, one after another. The same command starts, resumes and finishes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", type=Path, nargs="+", required=True, metavar="FILE", help="stage files, trained in this order")
    add(
        "--set",
        dest="overrides",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="keys of the stage files, changed: batch.size=64 seed=1",
    )
    add("--stop-file", type=Path, metavar="FILE", help="save and exit with code 85 as soon as this file exists")
    add("--suffix", default="", metavar="TEXT", help="name each run NAME-TEXT")
    add("--allow-config-change", action="store_true", help="go on with a run though its stage file or data changed")
    add("--verbose", action="store_true", help="show what libraries say, too")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
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
