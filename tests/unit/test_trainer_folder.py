"""A trainer and the folder of its run: a new run takes no folder of another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import MINIMAL
from vaopd.config import load_config
from vaopd.errors import ConfigError
from vaopd_trainer.folder import prepare_folder


def test_a_folder_that_holds_a_run_is_refused_unless_it_is_resumed(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(MINIMAL)
    config = load_config(file, [f"run.folder={tmp_path / 'runs'}"])
    prepare_folder(config, resume=False)
    folder = tmp_path / "runs" / "test"
    assert load_config(folder / "config.toml") == config
    (folder / "policy").mkdir()  # what a trainer leaves that died before it had recorded anything
    prepare_folder(config, resume=False)
    assert not (folder / "policy").exists()

    (folder / "metrics.jsonl").touch()
    (folder / "policy").mkdir()
    with pytest.raises(ConfigError, match=rf"run folder {folder} is in use; pass --resume to continue, or choose"):
        prepare_folder(config, resume=False)
    prepare_folder(config, resume=True)
    assert (folder / "policy").exists()


def test_runs_of_one_name_elsewhere_keep_their_snapshots_apart(tmp_path: Path) -> None:
    """Two teams on one host, both with weights.folder = "/dev/shm": a run removes its own leftovers only."""
    file = tmp_path / "run.toml"
    file.write_text(MINIMAL)
    one, other = (
        load_config(file, [f"run.folder={tmp_path / team}", f"weights.folder={tmp_path / 'shm'}"]) for team in "ab"
    )
    policies = [config.snapshots_folder / "policy" / "v000000" for config in (one, other)]
    for policy in policies:
        policy.mkdir(parents=True)
    prepare_folder(other, resume=False)
    assert [policy.exists() for policy in policies] == [True, False]
    assert {path.parent for path in (one.snapshots_folder, other.snapshots_folder)} == {tmp_path / "shm"}
