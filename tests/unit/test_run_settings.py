"""What a resume may change of a run: settings by name, the rate by its definition, the teacher by its revision."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from tests.support.runs import MINIMAL
from vaopd.config import Config, validate
from vaopd.errors import ConfigError, Mismatch
from vaopd.launch.resume import read_launch
from vaopd.run import settings
from vaopd.run.checkpoints import RunState
from vaopd.run.teacher import ANY, TeacherRecord, check_teacher
from vaopd_trainer import checkpoint
from vaopd_trainer.optimizer import make_schedule


def dump(**sections: dict[str, object]) -> dict[str, object]:
    """A whole configuration with some settings of its own."""
    values: dict[str, dict[str, object]] = {
        "run": {"name": "r"},
        "data": {"source": "d"},
        "student": {"model": "s"},
        "teacher": {"model": "t"},
        "trainer": {"steps": 10},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return validate(Config, values, origin="test").model_dump(mode="json", exclude_none=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"objective": {"variant": "standard"}}, 'objective.variant: "va_opd" → "standard"'),
        ({"run": {"seed": 1}}, "run.seed: 0 → 1"),
        ({"data": {"source": "e"}}, 'data.source: "d" → "e"'),
        ({"student": {"model": "x"}}, 'student.model: "s" → "x"'),
        ({"teacher": {"payload": "sampled"}}, 'teacher.sampled_estimator: not set → "k3"'),
        ({"trainer": {"prompts_per_step": 8}}, "trainer.prompts_per_step: 16 → 8"),
        ({"degradation": {"strength": 0.2}}, "degradation.strength: 0.1 → 0.2"),
        ({"evaluation": {"samples": 2}}, "evaluation.samples: 8 → 2"),
        ({"teacher": {"model": "x"}}, "pass --accept-teacher REVISION"),
    ],
)
def test_another_experiment_is_refused_by_name(change: dict[str, dict[str, object]], named: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        settings.check_resume(dump(), dump(**change), name="r", done=4)
    assert "run 'r' can't be resumed with other settings than it has:" in str(refusal.value)
    assert named in str(refusal.value)


def test_more_steps_and_another_rate_are_returned_and_addresses_are_not() -> None:
    new = dump(
        trainer={"steps": 20, "learning_rate": 1e-5},
        teacher={"address": "127.0.0.1:1"},
        queue={"url": "embedded"},
        run={"folder": "elsewhere"},
    )
    assert settings.check_resume(dump(), new, name="r", done=4) == {
        "trainer.steps": [10, 20],
        "trainer.learning_rate": [1e-6, 1e-5],
    }
    assert settings.check_resume(dump(), dump(teacher={"model": "x"}), name="r", done=4, accept_teacher=True) == {
        "teacher.model": ["t", "x"]
    }


def test_fewer_steps_than_were_taken_are_refused() -> None:
    assert settings.check_resume(dump(), dump(trainer={"steps": 4}), name="r", done=4) == {"trainer.steps": [10, 4]}
    with pytest.raises(ConfigError, match=r"trainer\.steps = 3: run 'r' has taken 4 steps"):
        settings.check_resume(dump(), dump(trainer={"steps": 3}), name="r", done=4)


def test_the_history_keeps_every_start(tmp_path: Path) -> None:
    assert settings.read_history(tmp_path) == []
    for step in (0, 7):
        settings.append(tmp_path, {"step": step})
    assert settings.read_history(tmp_path) == [{"step": 0}, {"step": 7}]


def cosine(step: int, *, rate: float, warmup: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to zero, written out."""
    if step < warmup:
        return rate * step / warmup
    return rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def test_after_a_resume_the_rate_is_that_of_a_run_with_the_new_settings() -> None:
    """8 steps of 10 at 0.1; then as step 8, 9 and 10 of a run of 20 at 0.4."""

    def make(rate: float, warmup: int, steps: int) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
        weight = torch.nn.Parameter(torch.ones(1))
        weight.grad = torch.ones(1)
        optimizer = torch.optim.AdamW([weight], lr=rate)
        return optimizer, make_schedule(optimizer, warmup_steps=warmup, steps=steps)

    optimizer, schedule = make(0.1, 2, 10)
    for _ in range(8):
        optimizer.step()
        schedule.step()
    state = RunState(step=8, schedule=schedule.state_dict())

    again, same = make(0.1, 2, 10)
    checkpoint.continue_schedule(same, again, state)
    assert (again.param_groups[0]["lr"], same.get_last_lr()) == (
        optimizer.param_groups[0]["lr"],
        schedule.get_last_lr(),
    )

    more, longer = make(0.4, 4, 20)
    checkpoint.continue_schedule(longer, more, state)
    rates = []
    for _ in range(3):
        rates.append(more.param_groups[0]["lr"])
        assert longer.get_last_lr() == rates[-1:]
        more.step()
        longer.step()
    assert rates == pytest.approx([cosine(step, rate=0.4, warmup=4, steps=20) for step in (8, 9, 10)], rel=1e-12)


OLD = TeacherRecord(
    model="models/old",
    revision="aaaaaaaaaaaaaaaaaaaa",
    tokenizer_fingerprint="f",
    dtype="float32",
    payload="hidden",
    head_sha256="h",
)
NEW = dataclasses.replace(OLD, model="models/new", revision="bbbbbbbbbbbbbbbbbbbb", head_sha256="i")


def is_accepted(found: TeacherRecord, *, accept: str | None = None, before: tuple[str | None, ...] = (None,)) -> bool:
    return check_teacher(OLD, found, run="r", address="t:1", accept=accept, accepted_before=before)


def test_the_same_teacher_needs_no_word_wherever_its_files_are() -> None:
    assert not is_accepted(dataclasses.replace(OLD, model="/elsewhere"))
    assert not is_accepted(dataclasses.replace(OLD, head_sha256=""))  # before the head is fetched
    assert not check_teacher(None, NEW, run="r", address="t:1")  # a run that names none yet


@pytest.mark.parametrize(
    "changed",
    [{"revision": "c"}, {"tokenizer_fingerprint": "c"}, {"dtype": "c"}, {"payload": "c"}, {"head_sha256": "c"}],
)
def test_another_one_is_refused_whatever_it_differs_in(changed: dict[str, str]) -> None:
    (name,) = changed
    with pytest.raises(Mismatch, match=rf"the teacher at t:1 is not the one that run 'r' learns from:\n  {name}: "):
        is_accepted(dataclasses.replace(OLD, **changed))


def test_it_is_accepted_by_the_beginning_of_its_revision() -> None:
    assert is_accepted(NEW, accept="bbbbbbbb")
    for other in ("aaaaaaaa", "bbb", "bbbbbbbbc"):
        with pytest.raises(Mismatch, match="names another one"):
            is_accepted(NEW, accept=other)


def test_a_command_line_that_is_repeated_accepts_no_later_teacher() -> None:
    """A supervisor starts with the same words each time; without a revision they hold for one start."""
    assert is_accepted(NEW, accept=ANY)
    with pytest.raises(Mismatch, match="name the revision: --accept-teacher bbbbbbbbbbbbbbbb"):
        is_accepted(NEW, accept=ANY, before=(None, ANY))
    assert is_accepted(NEW, accept=ANY, before=(ANY, None))


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ({"addresses": ["x"]}, "addresses: "),
        ({"addresses": {"queue.url": ["x"]}}, "addresses.queue.url: "),
        ({"gpus": {"teacher": 1}}, "gpus.teacher: "),
        ({"service": 1}, "service: "),
        ({"teacher": [1]}, "teacher: "),
        ({"other": 1}, "other: no such key"),
    ],
)
def test_options_of_other_types_are_named_when_a_run_is_resumed(
    written: dict[str, object], named: str, tmp_path: Path
) -> None:
    run = tmp_path / "test"
    run.mkdir()
    (run / "config.toml").write_text(MINIMAL)
    (run / "launch.json").write_text(json.dumps(written))
    with pytest.raises(ConfigError, match=rf"launch\.json:\n  {named}"):
        read_launch(run)
