"""Which checkpoints a run has, and what their state.json and ledger.jsonl say. Torch-free."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vaopd.errors import InvalidInput

FILE = "ledger.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerLine:
    """One trained group, as a checkpoint holds it."""

    group_id: str
    step: int
    policy_version: int


def checkpoints_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if (path / "state.json").is_file())


def latest_checkpoint(folder: Path) -> Path | None:
    return next(reversed(checkpoints_in(folder)), None)


def lines_to_text(lines: list[LedgerLine]) -> str:
    return "".join(json.dumps(asdict(line)) + "\n" for line in lines)


def lines_from_text(text: str) -> list[LedgerLine]:
    return [LedgerLine(**json.loads(line)) for line in text.splitlines()]


def read_checkpoint(checkpoint: Path) -> tuple[int, list[LedgerLine]]:
    """-> the steps done, and the groups that they trained."""
    try:
        step = json.loads((checkpoint / "state.json").read_text())["step"]
        return step, lines_from_text((checkpoint / FILE).read_text())
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InvalidInput(
            f"checkpoint {checkpoint} can't be read ({error}); remove that folder to resume from the one before it"
        ) from None


@dataclass(kw_only=True)
class Progress:
    """Where a run stands after `step` optimizer steps. The data cursor and the policy version follow from the step."""

    step: int = 0
    schedule: dict[str, Any] = field(default_factory=dict)
    ledger: list[LedgerLine] = field(default_factory=list)


def write_progress(folder: Path, progress: Progress) -> None:
    state = {key: value for key, value in asdict(progress).items() if key != "ledger"}
    (folder / "state.json").write_text(json.dumps(state, indent=1))
    (folder / FILE).write_text(lines_to_text(progress.ledger))


def load_progress(checkpoint: Path) -> Progress:
    step, lines = read_checkpoint(checkpoint)
    schedule = json.loads((checkpoint / "state.json").read_text()).get("schedule")
    if not isinstance(schedule, dict):
        raise InvalidInput(
            f"checkpoint {checkpoint} can't be read (no schedule in its state.json); remove that folder to resume from "
            "the one before it"
        )
    return Progress(step=step, schedule=schedule, ledger=lines)
