"""Finds a run's checkpoints; reads and writes their state.json and ledger.jsonl. Torch-free."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vaopd.errors import InvalidInput
from vaopd.run.teacher import TeacherRecord, read_teacher

FILE = "ledger.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerLine:
    """One trained group, as a checkpoint holds it; `skipped`: nothing changed, the gradient was not finite."""

    group_id: str
    step: int
    policy_version: int
    skipped: bool = False


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the complete checkpoints of RUN/checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / "state.json").is_file())


def find_latest_checkpoint(folder: Path) -> Path | None:
    """Returns the newest checkpoint; None for a run that ended before its first, and resumes at step 0."""
    return next(reversed(list_checkpoints(folder)), None)


def read_checkpoint(checkpoint: Path) -> tuple[int, list[LedgerLine]]:
    """Returns the number of steps taken and the groups that they trained; raises InvalidInput on a damaged file."""
    try:
        step = json.loads((checkpoint / "state.json").read_text())["step"]
        return step, [LedgerLine(**json.loads(line)) for line in (checkpoint / FILE).read_text().splitlines()]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InvalidInput(
            f"checkpoint {checkpoint} can't be read ({error}); remove that folder to resume from the one before it"
        ) from None


@dataclass(kw_only=True)
class RunState:
    """A run's state after `step` optimizer steps. The data cursor and the policy version follow from the step."""

    step: int = 0
    schedule: dict[str, Any] = field(default_factory=dict)
    teacher: TeacherRecord | None = None
    """The teacher that the steps learned from last; None in a checkpoint of an earlier vaopd."""
    ledger: list[LedgerLine] = field(default_factory=list)

    def list_last_skipped(self) -> list[LedgerLine]:
        """Returns the groups of the skipped steps that no other step has followed, in the order of the ledger."""
        lines = list(itertools.takewhile(lambda line: line.skipped, reversed(self.ledger)))
        return lines[::-1]


def write_run_state(folder: Path, state: RunState) -> None:
    """Writes state.json and ledger.jsonl into a checkpoint's folder."""
    values = {"step": state.step, "schedule": state.schedule, "teacher": state.teacher and asdict(state.teacher)}
    (folder / "state.json").write_text(json.dumps(values, indent=1))
    (folder / FILE).write_text("".join(json.dumps(asdict(line)) + "\n" for line in state.ledger))


def load_run_state(checkpoint: Path) -> RunState:
    """Reads what `write_run_state` wrote; raises InvalidInput when it is missing or damaged."""
    step, lines = read_checkpoint(checkpoint)
    values = json.loads((checkpoint / "state.json").read_text())
    schedule = values.get("schedule")
    if not isinstance(schedule, dict):
        raise InvalidInput(
            f"checkpoint {checkpoint} can't be read (no schedule in its state.json); remove that folder to resume from "
            "the one before it"
        )
    return RunState(step=step, schedule=schedule, teacher=read_checkpoint_teacher(checkpoint), ledger=lines)


def read_checkpoint_teacher(checkpoint: Path) -> TeacherRecord | None:
    """Returns the teacher that a checkpoint names; None for one of an earlier vaopd."""
    try:
        teacher = json.loads((checkpoint / "state.json").read_text()).get("teacher")
    except (OSError, ValueError, AttributeError) as error:
        raise InvalidInput(f"checkpoint {checkpoint} can't be read ({error})") from None
    return None if teacher is None else read_teacher(teacher, origin=str(checkpoint / "state.json"))
