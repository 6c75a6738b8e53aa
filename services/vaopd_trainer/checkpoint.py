"""Writes and reads checkpoints: all that a resumed run needs, in a folder that appears whole or not at all.

RUN/checkpoints/step_000020/ holds the safetensors files student, optimizer and rng (of a sharded student, one file for
each rank in place of the first two), state.json (step, schedule and the digest of every file) and ledger.jsonl (each
trained group once, with the step that trained it). No pickles.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vaopd.errors import LimitExceeded
from vaopd.files.durable import atomic_folder
from vaopd.run.checkpoints import (
    DamagedCheckpoint,
    NoSoundCheckpoint,
    RunState,
    list_checkpoints,
    make_name,
    read_checkpoint,
    read_state,
    write_run_state,
)
from vaopd.run.tensor_files import compute_digest, write_tensors
from vaopd_trainer import kill_points
from vaopd_trainer.student_weights import StudentWeights

log = logging.getLogger(__name__)

RNG = "rng.safetensors"


def save(folder: Path, state: RunState, weights: StudentWeights, *, keep: int) -> Path:
    """Writes a checkpoint, fsynced and renamed into place, and removes all but the newest `keep`.

    On rank 0; the others call `weights.save(None)` meanwhile. Raises LimitExceeded when the disk is full; older
    checkpoints are intact then.
    """
    target = folder / make_name(state.step)
    try:
        with atomic_folder(target) as part:
            files = weights.save(part)
            files[RNG] = write_tensors({"cpu": torch.get_rng_state()}, part / RNG)
            write_run_state(part, state, files=files)
            kill_points.pass_point("written", state.step)
    except (OSError, SafetensorError) as error:
        raise LimitExceeded(
            f"checkpoint {target} can't be written ({error}); nothing of it was acknowledged and the one before it is "
            "intact: make room, and resume"
        ) from None
    kill_points.pass_point("renamed", state.step)
    for old in list_checkpoints(folder)[:-keep]:
        try:
            shutil.rmtree(old)
        except OSError as error:  # a link, or another account's: no reason to end a run
            log.warning("checkpoint %s can't be removed (%s); remove it by hand", old, error)
    return target


def set_damaged_aside(folder: Path) -> None:
    """Checks the checkpoints, newest first, until one is sound; renames those newer than it to damaged_step_….

    Then every reader finds the sound one as the newest. Raises NoSoundCheckpoint, and renames nothing, when there are
    checkpoints and all are damaged; PermissionError for files that this process may not read.
    """
    found: list[tuple[Path, str]] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            check(path)
        except DamagedCheckpoint as error:
            found.append((path, error.reason))
        else:
            break
    else:
        if found:
            raise NoSoundCheckpoint(folder, [reason for _, reason in found])
        return
    for bad, reason in found:
        aside = bad.with_name(f"damaged_{bad.name}")
        if aside.exists():
            shutil.rmtree(aside)
        bad.rename(aside)
        log.error(
            "checkpoint %s; the run continues from %s, and repeats the steps since. It is now %s",
            reason,
            path.name,
            aside,
        )


def check(checkpoint: Path) -> None:
    """Compares every file with its digest. Raises DamagedCheckpoint, PermissionError."""
    read_checkpoint(checkpoint)
    for name, digest in read_state(checkpoint)["files"].items():
        try:
            same = compute_digest(checkpoint / name) == digest
        except PermissionError:  # not the file's fault
            raise
        except OSError as error:
            raise DamagedCheckpoint(checkpoint, f"{name}: {error}") from None
        if not same:
            raise DamagedCheckpoint(checkpoint, f"{name}: it is not as it was written")


def load(checkpoint: Path, weights: StudentWeights) -> None:
    """Restores weights, moments and the process's random state, in place; raises DamagedCheckpoint."""
    try:
        weights.load(checkpoint)
        torch.set_rng_state(load_file(checkpoint / RNG)["cpu"])
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise DamagedCheckpoint(checkpoint, error) from None


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
