"""Writes and reads checkpoints: all that a resumed run needs, in a folder that appears whole or not at all.

RUN/checkpoints/step_000020/ holds the safetensors files student, optimizer and rng, state.json (step and schedule) and
ledger.jsonl (each trained group once, with the step that trained it). No pickles.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vaopd.errors import InvalidInput, LimitExceeded
from vaopd.files.durable import atomic_folder
from vaopd.run.checkpoints import RunState, list_checkpoints, write_run_state
from vaopd.run.tensor_files import write_tensors
from vaopd_trainer import kill_points


def save(
    folder: Path, state: RunState, *, student: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer, keep: int
) -> Path:
    """Writes a checkpoint, fsynced and renamed into place, and removes all but the newest `keep`.

    Raises LimitExceeded when the disk is full; older checkpoints are intact then.
    """
    target = folder / f"step_{state.step:06d}"
    try:
        with atomic_folder(target) as part:
            write_tensors(student, part / "student.safetensors")
            write_tensors(_flatten(optimizer.state_dict()["state"]), part / "optimizer.safetensors")
            write_tensors({"cpu": torch.get_rng_state()}, part / "rng.safetensors")
            write_run_state(part, state)
            kill_points.pass_point("written", state.step)
    except (OSError, SafetensorError) as error:
        raise LimitExceeded(
            f"checkpoint {target} can't be written ({error}); nothing of it was acknowledged and the one before it is "
            "intact: make room, and resume"
        ) from None
    kill_points.pass_point("renamed", state.step)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def load_student(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Returns the student's weights, float32; raises InvalidInput when they can't be read."""
    with _name_damaged(checkpoint):
        return load_file(checkpoint / "student.safetensors")


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Restores AdamW's moments and the process's random state, in place; raises InvalidInput on a damaged file."""
    with _name_damaged(checkpoint):
        moments = load_file(checkpoint / "optimizer.safetensors")
        rng = load_file(checkpoint / "rng.safetensors")
    state = optimizer.state_dict()
    state["state"] = _unflatten(moments)
    optimizer.load_state_dict(state)
    torch.set_rng_state(rng["cpu"])


def continue_schedule(schedule: LambdaLR, optimizer: Optimizer, state: RunState) -> None:
    """Continues the schedule at the state's step, and sets the optimizer's rate.

    The rate of a step is a function of the step and of the settings alone: with other settings than before (steps,
    learning rate, warm-up) it is from here on the rate that a run with these settings from its beginning would have.
    """
    rates = [base * factor(state.step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    own = {"base_lrs": schedule.base_lrs, "last_epoch": state.step, "_last_lr": rates}
    schedule.load_state_dict(state.schedule | own)
    # The schedule sets the optimizer's rate after a step only; this one still has step 0's.
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


@contextmanager
def _name_damaged(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise InvalidInput(
            f"checkpoint {checkpoint} can't be read ({error}); remove that folder to resume from the one before it"
        ) from None


def _flatten(state: dict[int, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {f"{index}.{name}": tensor for index, entry in state.items() for name, tensor in entry.items()}


def _unflatten(tensors: dict[str, torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    return state
