"""Ranks that share a step unevenly: real processes over gloo, each of which compares with one process's step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.families import family_folder
from tests.support.rank_processes import run_ranks


@pytest.mark.slow
@pytest.mark.parametrize(("world", "groups", "fails_in"), [(3, 5, "backward"), (3, 2, "backward"), (2, 3, "forward")])
def test_a_number_of_ranks_that_does_not_divide_the_groups_takes_the_step_of_one(
    tmp_path: Path, world: int, groups: int, fails_in: str
) -> None:
    """With 3 ranks and 2 groups the last rank has none. The second one runs out of memory."""
    folder = family_folder("qwen3_vl")
    codes, said = run_ranks(
        "tests.support.ranks_step", folder, tmp_path, groups, fails_in, world=world, folder=tmp_path
    )
    assert codes == [0] * world, said
