"""Ranks that hold a student whole or sharded: real processes over gloo take the steps of a plain one in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from tests.support.families import family_folder
from tests.support.rank_processes import run_ranks
from tests.support.sharded_training import Reference, Run, make_config, take_steps
from vaopd.run.snapshots import has_tied_head, publish_snapshot
from vaopd.vlm.model import Vlm

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def accelerate_begins_afresh() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def save_tied(folder: Path) -> Path:
    student = Vlm.load(family_folder("qwen3_vl"))
    student.model.config.tie_word_embeddings = student.model.config.text_config.tie_word_embeddings = True
    student.model.tie_weights()
    student.model.save_pretrained(folder)
    student.processor.save_pretrained(folder)
    assert has_tied_head(folder)
    return folder


def start_ranks(world: int, model: Path, tied: Path, folder: Path) -> None:
    codes, said = run_ranks("tests.support.sharded_training", model, tied, folder, world=world, folder=folder)
    assert codes == [0] * world, said


def test_one_rank_takes_the_steps_of_plain_float64(tmp_path: Path) -> None:
    """Full weights and adapters: loss, gradient norm and weights of three steps."""
    take_steps(family_folder("qwen3_vl"), tmp_path, ("none",))


def test_two_ranks_take_the_steps_of_one(tmp_path: Path) -> None:
    """Whole and sharded, full weights and adapters."""
    start_ranks(2, family_folder("qwen3_vl"), tmp_path, tmp_path)


def test_four_ranks_train_resume_and_export_as_one_process_does(tmp_path: Path) -> None:
    """The same steps; and checkpoints of 1, 4 and 2 × 2 ranks continued by one another."""
    model, tied = family_folder("qwen3_vl"), save_tied(tmp_path / "tied")
    config = make_config("none")
    whole = Run(model, config, tmp_path / "whole")
    whole.step()
    whole.trainer._checkpoint()

    start_ranks(4, model, tied, tmp_path)

    (checkpoint,) = (tmp_path / "full").iterdir()
    assert len(list(checkpoint.glob("shard-*.safetensors"))) == 4
    sizes = [sum(f.stat().st_size for f in (tmp_path / kind).rglob("shard-*")) for kind in ("full", "hybrid")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)  # of two copies, each tensor is written once

    whole.resume(tmp_path / "hybrid")  # after two steps
    whole.step()
    whole.finish(Reference(model, config))
    assert whole.recorder is not None
    policy = publish_snapshot(tmp_path, 3, whole.recorder.weights, model_files_from=model)
    Vlm.load(policy.path)
