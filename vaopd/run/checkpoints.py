"""Finds a run's checkpoints; reads and writes their state.json and ledger.jsonl. Torch-free.

state.json holds digests of the checkpoint's other files and, as `sha256`, of itself: what was damaged since it was
written is refused by name.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vaopd.errors import InvalidInput
from vaopd.files.plain import MIB, read_plain_bytes
from vaopd.run.teacher import TeacherRecord, read_teacher

FILE = "ledger.jsonl"
STATE_FILE = "state.json"
STATE_BYTES, LEDGER_BYTES = 64 * MIB, 1024 * MIB
"""The most that is read of them: a line of the ledger takes about 100 bytes."""
_STEP = re.compile(r"step_\d{6,}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerLine:
    """One trained group, as a checkpoint holds it; `skipped`: nothing changed, the gradient was not finite."""

    group_id: str
    step: int
    policy_version: int
    skipped: bool = False


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints of RUN/checkpoints, oldest first; one that has lost its files, too."""
    found = [path for path in folder.glob("step_*") if _STEP.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def find_latest_checkpoint(folder: Path) -> Path | None:
    """Returns the newest checkpoint; None for a run that ended before its first, and resumes at step 0."""
    return next(reversed(list_checkpoints(folder)), None)


def find_readable_checkpoint(folder: Path) -> Path | None:
    """Returns the newest checkpoint with a sound state and ledger, None where no checkpoint exists.

    The trainer also checks the tensors. Raises InvalidInput when there are checkpoints and none can be read.
    """
    found = list_checkpoints(folder)
    reasons = []
    for path in reversed(found):
        try:
            read_checkpoint(path)
        except DamagedCheckpoint as error:
            reasons.append(error.reason)
        else:
            return path
    if found:
        raise NoSoundCheckpoint(folder, reasons)
    return None


class DamagedCheckpoint(InvalidInput):
    """A file of a checkpoint is missing, or is not as it was written."""

    def __init__(self, checkpoint: Path, reason: object) -> None:
        """reason: which file, and how."""
        self.reason = f"{checkpoint} can't be read ({reason})"
        super().__init__(f"checkpoint {self.reason}; remove that folder to resume from the one before it")


class NoSoundCheckpoint(InvalidInput):
    """A run has checkpoints, and each is damaged."""

    def __init__(self, folder: Path, reasons: list[str]) -> None:
        """reasons: one for each checkpoint."""
        lines = "".join(f"\n  {reason}" for reason in reasons)
        super().__init__(
            f"none of the {len(reasons)} checkpoints in {folder} is sound:{lines}\n"
            "  Copy one back from a backup, or begin a new run: --set run.name=NAME"
        )


def read_checkpoint(checkpoint: Path) -> tuple[int, list[LedgerLine]]:
    """Returns the number of steps taken and the groups that they trained; raises InvalidInput on a damaged file."""
    values = read_state(checkpoint)
    step = values["step"]
    try:
        text = read_plain_bytes(checkpoint / FILE, limit_bytes=LEDGER_BYTES)
        if hashlib.sha256(text).hexdigest() != values["ledger"]:
            raise ValueError("it is not the one that was written with its state.json")
        lines = [LedgerLine(**json.loads(line)) for line in text.decode().splitlines()]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DamagedCheckpoint(checkpoint, f"{FILE}: {error}") from None
    return step, lines


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Returns state.json's table, as it was written; raises InvalidInput for a damaged one."""
    try:
        values = json.loads(read_plain_bytes(checkpoint / STATE_FILE, limit_bytes=STATE_BYTES))
        if not isinstance(values, dict) or values.pop("sha256", None) != _digest(values):
            raise ValueError("it is not as it was written")
        if checkpoint.name != make_name(values["step"]) and _STEP.fullmatch(checkpoint.name):
            raise ValueError(f"it is of step {values['step']}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DamagedCheckpoint(checkpoint, f"{STATE_FILE}: {error}") from None
    return values


def make_name(step: int) -> str:
    """Returns the name of a checkpoint's folder."""
    return f"step_{step:06d}"


@dataclass(kw_only=True)
class RunState:
    """A run's state after `step` optimizer steps. The data cursor and the policy version follow from the step."""

    step: int = 0
    schedule: dict[str, Any] = field(default_factory=dict)
    teacher: TeacherRecord | None = None
    """The teacher that the steps learned from last."""
    ledger: list[LedgerLine] = field(default_factory=list)

    def list_last_skipped(self) -> list[LedgerLine]:
        """Returns the groups of the skipped steps that no other step has followed, in the order of the ledger."""
        lines = list(itertools.takewhile(lambda line: line.skipped, reversed(self.ledger)))
        return lines[::-1]


def write_run_state(folder: Path, state: RunState, *, files: Mapping[str, str]) -> None:
    """Writes state.json and ledger.jsonl into a checkpoint's folder; files: digests of the others, by name."""
    ledger = "".join(json.dumps(asdict(line)) + "\n" for line in state.ledger).encode()
    (folder / FILE).write_bytes(ledger)
    values = {
        "step": state.step,
        "schedule": state.schedule,
        "teacher": state.teacher and asdict(state.teacher),
        "files": dict(files),
        "ledger": hashlib.sha256(ledger).hexdigest(),
    }
    (folder / STATE_FILE).write_text(json.dumps(values | {"sha256": _digest(values)}, indent=1))


def load_run_state(checkpoint: Path) -> RunState:
    """Reads what `write_run_state` wrote; raises InvalidInput when it is missing or damaged."""
    step, lines = read_checkpoint(checkpoint)
    schedule = read_state(checkpoint)["schedule"]
    return RunState(step=step, schedule=schedule, teacher=read_checkpoint_teacher(checkpoint), ledger=lines)


def read_checkpoint_teacher(checkpoint: Path) -> TeacherRecord | None:
    """Returns the teacher that a checkpoint names; None for one of a run that had reached none."""
    teacher = read_state(checkpoint)["teacher"]
    return None if teacher is None else read_teacher(teacher, origin=str(checkpoint / STATE_FILE))


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
