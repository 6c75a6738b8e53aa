"""Siblings that share a prompt when the model itself is shared by two processes: tensor parallelism and FSDP2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.families import FAMILIES, family_folder

_ROOT = Path(__file__).parents[2]


def run_both_ranks(tmp_path: Path, *cases: str) -> None:
    """One pair of processes for all cases, HOW=FOLDER each: most of the time they import torch."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "tests.support.sharded", str(tmp_path / "store"), *cases]
    logs = [(tmp_path / f"rank{rank}.log").open("w+") for rank in range(2)]
    processes = [
        subprocess.Popen(
            command,
            cwd=_ROOT,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
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
    said = "\n".join((tmp_path / f"rank{rank}.log").read_text()[-3000:] for rank in range(2))
    assert codes == [0, 0], said


@pytest.mark.slow
def test_tensor_parallel_ranks_score_as_one_process_does(tmp_path: Path) -> None:
    run_both_ranks(tmp_path, *(f"tensor_parallel={family_folder(family)}" for family in FAMILIES))


@pytest.mark.slow
def test_sharded_parameters_get_the_gradients_of_the_whole_model(tmp_path: Path) -> None:
    folder = family_folder("qwen3_vl")
    run_both_ranks(tmp_path, f"fsdp={folder}", f"fsdp_checkpointing={folder}")
