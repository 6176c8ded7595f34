"""Stand-ins for the commands of SLURM: they note in the working directory what is asked of them."""

from __future__ import annotations

from pathlib import Path

STAND_INS = {
    "sbatch": 'printf "%s\\n" "$@" > sbatch.arguments; env > sbatch.environment; echo "${SBATCH_SAYS:-71;cluster}"\n'
    'echo "${SBATCH_COMPLAINS:-}" >&2; exit "${SBATCH_CODE:-0}"',
    "scontrol": 'if [[ $1 == show ]]; then echo node1; echo node2; else echo "$@" >> scontrol.calls; fi\n'
    'exit "${SCONTROL_CODE:-0}"',
    # What srun does: it starts the command that follows its options.
    "srun": 'echo "$@" >> srun.calls; while [[ $1 == --* ]]; do shift; done\n'
    'SLURM_NODEID=0 SLURMD_NODENAME=node1 exec "$@"',
    "apptainer": 'echo "apptainer $*" >> apptainer.calls; shift 7; exec "$@"',
    "python": 'printf "%s\\n" "$@" > python.arguments; env > python.environment; touch started\n'
    "if [[ -n ${UNTIL_STOPPED:-} ]]; then\n"
    '  until [[ -e stop-71 ]]; do sleep 0.02; done; sleep "$UNTIL_STOPPED"\nfi\n'
    'exit "${PYTHON_CODE:-0}"',
}


def install_stand_ins(folder: Path) -> Path:
    """Writes the stand-ins to `bin` in a folder; returns the folder."""
    (folder / "bin").mkdir()
    for name, script in STAND_INS.items():
        (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (folder / "bin" / name).chmod(0o755)
    return folder


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
