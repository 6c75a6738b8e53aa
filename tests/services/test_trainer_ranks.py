"""Ranks that share a step unevenly: real processes over gloo, each of which compares with one process's step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.families import family_folder
from vaopd.net.ports import LOOPBACK, free_port

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "groups"), [(3, 5), (3, 2), (2, 3)])
def test_a_number_of_ranks_that_does_not_divide_the_groups_takes_the_step_of_one(
    tmp_path: Path, world: int, groups: int
) -> None:
    """With 3 ranks and 2 groups the last rank has none. The second one runs out of memory in its backward."""
    shared = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    command = [sys.executable, "-m", "tests.support.ranks_step", str(family_folder("qwen3_vl")), str(groups)]
    logs = [(tmp_path / f"rank{rank}.log").open("w+") for rank in range(world)]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ
            | shared
            | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(300) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for log in logs:
            log.close()
    said = "\n".join((tmp_path / f"rank{rank}.log").read_text()[-3000:] for rank in range(world))
    assert codes == [0] * world, said
