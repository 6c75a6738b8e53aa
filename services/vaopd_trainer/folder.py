"""The run's folder at a trainer's start: a new one is made, an existing one is resumed only as what it is.

In: the configuration, and the teacher that answers. Out: RUN/config.toml, RUN/settings.jsonl. On rank 0 alone.
"""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import asdict
from pathlib import Path

from vaopd.config import Config, load_config, to_toml
from vaopd.errors import ConfigError, Mismatch, VaopdError
from vaopd.files.durable import write_atomic
from vaopd.run import settings
from vaopd.run.checkpoints import find_latest_checkpoint, read_checkpoint, read_checkpoint_teacher
from vaopd.run.settings import Changes
from vaopd.run.teacher import TeacherRecord, check_teacher, describe_change, read_teacher
from vaopd_trainer import checkpoint

log = logging.getLogger(__name__)


def prepare_folder(config: Config, *, resume: bool, accept_teacher: bool = False) -> Changes:
    """Makes RUN; returns the settings that a resume changes.

    Raises ConfigError for the folder of another run unless it is resumed, and for changes that a resume may not make;
    InvalidInput when no checkpoint of a run to be resumed is sound.
    """
    folder = config.run_folder
    if not resume and (folder / "metrics.jsonl").exists():
        raise ConfigError(f"run folder {folder} is in use; pass --resume to continue, or choose another run.name")
    folder.mkdir(parents=True, exist_ok=True)
    changes: Changes = {}
    if not resume:
        shutil.rmtree(config.snapshots_folder / "policy", ignore_errors=True)
        (folder / settings.FILE).unlink(missing_ok=True)
    else:
        checkpoint.set_damaged_aside(folder / "checkpoints")
    if resume and (folder / "config.toml").exists():  # a trainer may die before it has written anything
        recorded = load_config(folder / "config.toml")
        changes = settings.check_resume(
            recorded.model_dump(mode="json", exclude_none=True),
            config.model_dump(mode="json", exclude_none=True),
            name=config.run.name,
            done=find_done(find_latest_checkpoint(folder / "checkpoints")),
            accept_teacher=accept_teacher,
        )
    for key, (before, after) in changes.items():
        log.warning("%s changes from %s to %s", key, before, after)
    if not resume or not (folder / "config.toml").exists():
        write_config(config)
    return changes


def find_done(start: Path | None) -> int:
    """Returns the optimizer steps of a checkpoint; 0 without one."""
    return 0 if start is None else read_checkpoint(start)[0]


def write_config(config: Config) -> None:
    """Writes RUN/config.toml: the settings that hold from now on."""
    write_atomic(config.run_folder / "config.toml", to_toml(config))


def begin(config: Config, found: TeacherRecord, *, start: Path | None, changes: Changes, accept: str | None) -> None:
    """Records a start: its teacher and its changed settings. Raises Mismatch for a teacher that isn't accepted.

    start: the checkpoint that it continues. Without one, the run's own records still name its teacher.
    """
    folder = config.run_folder
    history = settings.read_history(folder)
    known = read_checkpoint_teacher(start) if start is not None else None
    if known is None and history:
        known = read_teacher(history[-1]["teacher"], origin=str(folder / settings.FILE))
    accepted = check_teacher(
        known,
        found,
        run=config.run.name,
        address=config.teacher.address,
        accept=accept,
        accepted_before=[each.get("accept") for each in history],
    )
    if accepted and known is not None:
        log.warning("another teacher is accepted:\n%s", describe_change(known, found))
    line = {"step": find_done(start), "time_s": time.time(), "changes": changes, "accept": accept}
    settings.append(folder, line | {"teacher": asdict(found), "accepted": accepted})
    write_config(config)


def explain_replaced_teacher(
    error: VaopdError, *, config: Config, known: TeacherRecord, found: TeacherRecord, step: int
) -> VaopdError:
    """Returns the error of a run whose teacher was replaced during it; `error` itself if it was not."""
    if not known.find_differences(found):
        return error
    try:
        check_teacher(known, found, run=config.run.name, address=config.teacher.address)
    except Mismatch as refusal:
        return Mismatch(f"{refusal}\n  Step {step} is in a checkpoint; nothing is lost.")
    return error
