"""Siblings that share a prompt when the model itself is shared by two processes: tensor parallelism and FSDP2."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.families import FAMILIES, family_folder
from tests.support.rank_processes import run_ranks


def run_both_ranks(tmp_path: Path, *cases: str) -> None:
    """HOW=FOLDER each."""
    codes, said = run_ranks("tests.support.sharded", *cases, world=2, folder=tmp_path)
    assert codes == [0, 0], said


@pytest.mark.slow
def test_tensor_parallel_ranks_score_as_one_process_does(tmp_path: Path) -> None:
    run_both_ranks(tmp_path, *(f"tensor_parallel={family_folder(family)}" for family in FAMILIES))


@pytest.mark.slow
def test_sharded_parameters_get_the_gradients_of_the_whole_model(tmp_path: Path) -> None:
    folder = family_folder("qwen3_vl")
    run_both_ranks(tmp_path, f"fsdp={folder}", f"fsdp_checkpointing={folder}")
