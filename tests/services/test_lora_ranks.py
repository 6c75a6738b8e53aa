"""Two ranks that train adapters, each with the whole student or with its share of it: the steps are one process's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.families import family_folder
from tests.support.rank_processes import run_ranks
from vaopd.net.ports import LOOPBACK, free_port


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "full"])
def test_two_ranks_take_the_steps_of_one(kind: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.lora_training", str(family_folder("qwen3_vl")), kind]
    meeting = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port())}
    codes, said = run_ranks(command, world=2, folder=tmp_path, environment=meeting)
    assert codes == [0, 0], said
