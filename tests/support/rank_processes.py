"""Runs a command as the ranks of a process group: one process each, all with the same arguments."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_ranks(
    command: Sequence[str], *, world: int, folder: Path, environment: Mapping[str, str] | None = None
) -> tuple[list[int], str]:
    """Returns the exit codes of all ranks, and the end of what each said; none is left when this returns."""
    shared = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "WORLD_SIZE": str(world),
        **(environment or {}),
    }
    logs = [(folder / f"rank{rank}.log").open("w+") for rank in range(world)]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(600) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for log in logs:
            log.close()
    return codes, "\n".join((folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(world))
