"""Where a run stands, as its checkpoints hold it: state.json and the ledger of trained groups. Torch-free."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vaopd import ledger
from vaopd.errors import InvalidInput
from vaopd.ledger import LedgerLine


@dataclass(kw_only=True)
class Progress:
    """Where a run stands after `step` optimizer steps. The data cursor and the policy version follow from the step."""

    step: int = 0
    schedule: dict[str, Any] = field(default_factory=dict)
    ledger: list[LedgerLine] = field(default_factory=list)


def write_progress(folder: Path, progress: Progress) -> None:
    state = {key: value for key, value in asdict(progress).items() if key != "ledger"}
    (folder / "state.json").write_text(json.dumps(state, indent=1))
    (folder / ledger.FILE).write_text(ledger.lines_to_text(progress.ledger))


def load_progress(checkpoint: Path) -> Progress:
    step, lines = ledger.read_checkpoint(checkpoint)
    schedule = json.loads((checkpoint / "state.json").read_text()).get("schedule")
    if not isinstance(schedule, dict):
        raise InvalidInput(
            f"checkpoint {checkpoint} can't be read (no schedule in its state.json); remove that folder to resume from "
            "the one before it"
        )
    return Progress(step=step, schedule=schedule, ledger=lines)
