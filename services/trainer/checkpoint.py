"""Checkpoints: everything that a resumed run needs, in one folder that appears whole or not at all.

RUN/checkpoints/step_000020/ holds the safetensors files student, optimizer and rng, state.json (step and schedule) and
ledger.jsonl (each trained group once, with the step that trained it). No pickles.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vaopd.errors import InvalidInput
from vaopd.weights import atomic_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerLine:
    """One trained group."""

    group_id: str
    step: int
    policy_version: int


@dataclass(kw_only=True)
class Progress:
    """Where a run stands after `step` optimizer steps. The data cursor and the policy version follow from the step."""

    step: int = 0
    schedule: dict[str, Any] = field(default_factory=dict)
    ledger: list[LedgerLine] = field(default_factory=list)


def save(
    folder: Path, progress: Progress, *, student: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer, keep: int
) -> Path:
    """Writes a checkpoint, fsynced and renamed into place, and removes all but the newest `keep`."""
    target = folder / f"step_{progress.step:06d}"
    with atomic_folder(target) as part:
        save_file(student, part / "student.safetensors")
        save_file(_flatten(optimizer.state_dict()["state"]), part / "optimizer.safetensors")
        save_file({"cpu": torch.get_rng_state()}, part / "rng.safetensors")
        state = {k: v for k, v in asdict(progress).items() if k != "ledger"}
        (part / "state.json").write_text(json.dumps(state, indent=1))
        (part / "ledger.jsonl").write_text("".join(json.dumps(asdict(line)) + "\n" for line in progress.ledger))
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def latest(folder: Path) -> Path | None:
    """The newest checkpoint; None for a run that was ended before its first: it resumes at step 0."""
    return next(reversed(_checkpoints(folder)), None)


def load_progress(checkpoint: Path) -> Progress:
    with _reading(checkpoint):
        state = json.loads((checkpoint / "state.json").read_text())
        lines = (checkpoint / "ledger.jsonl").read_text().splitlines()
        return Progress(**state, ledger=[LedgerLine(**json.loads(line)) for line in lines])


def load_student(checkpoint: Path) -> dict[str, torch.Tensor]:
    with _reading(checkpoint):
        return load_file(checkpoint / "student.safetensors")


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Restores AdamW's moments and the process's random state in place."""
    with _reading(checkpoint):
        moments = load_file(checkpoint / "optimizer.safetensors")
        rng = load_file(checkpoint / "rng.safetensors")
    state = optimizer.state_dict()
    state["state"] = _unflatten(moments)
    optimizer.load_state_dict(state)
    torch.set_rng_state(rng["cpu"])


@contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise InvalidInput(
            f"checkpoint {checkpoint} can't be read ({error}); remove that folder to resume from the one before it"
        ) from None


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if (path / "state.json").is_file())


def _flatten(state: dict[int, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {f"{index}.{name}": tensor for index, entry in state.items() for name, tensor in entry.items()}


def _unflatten(tensors: dict[str, torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    return state
