"""Decides whether a run may be started or resumed, and with what: before any process is.

`vaopd up --resume RUN` takes every setting from the run itself: RUN/config.toml, and from RUN/launch.json the addresses
as they were configured (a start puts free ports and the embedded Redis's into config.toml) and the options of `up`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from vaopd.config import Config, Section, load_config, validate
from vaopd.errors import ConfigError, InvalidInput, NotFound
from vaopd.files.durable import write_atomic
from vaopd.files.plain import read_plain
from vaopd.run import settings
from vaopd.run.checkpoints import find_readable_checkpoint, read_checkpoint, read_checkpoint_teacher
from vaopd.run.settings import Changes
from vaopd.run.status import read_status
from vaopd.run.teacher import TeacherRecord, check_teacher
from vaopd.types import TeacherDescription

FILE = "launch.json"


class _Recorded(Section):
    """RUN/launch.json."""

    addresses: dict[str, str] = Field(default_factory=dict)
    teacher: str | None = None
    service: Path | None = None
    gpus: dict[str, tuple[str, ...]] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """How a run was started: its configuration, and the options of `vaopd up` that a resume takes over."""

    config_path: Path
    overrides: tuple[str, ...]
    teacher: str | None
    service: Path | None
    gpus: dict[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """What a start does. `finished`: nothing, since the run has taken all its steps."""

    changes: Changes
    finished: bool = False


def read_launch(run: Path) -> Launch:
    """Returns how the run in `run` was started. Raises NotFound for no run, ConfigError for a renamed folder.

    A run that `up` didn't start, or of an earlier vaopd, has its config.toml only.
    """
    path = run / "config.toml"
    if not path.is_file():
        raise NotFound(f"--resume {run}: the folder has no config.toml; RUN is a run's folder, e.g. runs/first")
    recorded = load_config(path)
    name = run.resolve().name
    if recorded.run.name != name:
        raise ConfigError(
            f"--resume {run}: this is run {recorded.run.name!r}, whose requests and checkpoints name it; rename the "
            f"folder to {recorded.run.name}"
        )
    launch = validate(_Recorded, _read_table(run / FILE), origin=str(run / FILE))
    overrides = [f"run.folder={run.resolve().parent}"]
    overrides += [f"{key}={value}" for key, value in launch.addresses.items()]
    return Launch(
        config_path=path,
        overrides=tuple(overrides),
        teacher=launch.teacher,
        service=launch.service,
        gpus=launch.gpus,
    )


def has_own_redis(run: Path) -> bool:
    """Returns whether `up` started the run with a Redis of its own, which ends with it."""
    return bool(_read_table(run / FILE).get("addresses", {}).get("queue.url") == "embedded")


def write_launch(
    config: Config, *, teacher: str | None, service: Path | None, gpus: Mapping[str, tuple[str, ...]]
) -> None:
    """Writes RUN/launch.json for a later `--resume RUN`."""
    addresses = {"teacher.address": config.teacher.address, "api.address": config.api.address}
    if config.queue.url == "embedded":  # any other URL is in config.toml
        addresses["queue.url"] = config.queue.url
    values = {
        "addresses": addresses,
        "teacher": teacher,
        "service": str(service.resolve()) if service else None,
        "gpus": {role: list(devices) for role, devices in gpus.items()},
    }
    write_atomic(config.run_folder / FILE, json.dumps(values, indent=1))


def check_start(config: Config, *, resume: bool, accept_teacher: str | None, say: Callable[[str], None]) -> Start:
    """Returns what the start changes; says it. Raises ConfigError for a run that may not be started so."""
    folder, name = config.run_folder, config.run.name
    status = read_status(folder) if folder.is_dir() else None
    if status is not None and status.alive:
        raise ConfigError(
            f"run {name!r} is {status.state}: {status.writer} works on it; `vaopd watch "
            f"{shlex.quote(str(folder))}` shows it. Stop that process first, or choose another run.name"
        )
    if (folder / "metrics.jsonl").exists() and not resume:
        state = f" ({status.label})" if status is not None else ""
        raise ConfigError(
            f"run {name!r} already exists, in {folder}{state}; continue it with --resume, or name another one: "
            "--set run.name=NAME"
        )
    if not resume or not (folder / "config.toml").is_file():
        return Start(changes={})
    newest = find_readable_checkpoint(folder / "checkpoints")
    done = 0 if newest is None else read_checkpoint(newest)[0]
    changes = settings.check_resume(
        _dump(load_config(folder / "config.toml")),
        _dump(config),
        name=name,
        done=done,
        accept_teacher=accept_teacher is not None,
    )
    for key, (before, after) in changes.items():
        say(f"{key} changes from {before} to {after}")
    if status is not None and status.state == "finished" and done >= config.trainer.steps:
        say(
            f"run {name!r} is finished: all {done} steps are done, and the model is in {folder / 'model'}; --set "
            "trainer.steps=N with more steps continues it"
        )
        return Start(changes=changes, finished=True)
    return Start(changes=changes)


def check_same_teacher(
    config: Config, description: TeacherDescription, *, address: str, accept_teacher: str | None
) -> None:
    """Raises Mismatch when the teacher is not the one that the run to be resumed learns from.

    The trainer compares again, with the LM head.
    """
    folder = config.run_folder
    newest = find_readable_checkpoint(folder / "checkpoints")
    known = None if newest is None else read_checkpoint_teacher(newest)
    check_teacher(
        known,
        TeacherRecord.of(description, payload=config.teacher.payload),
        run=config.run.name,
        address=address,
        accept=accept_teacher,
        accepted_before=[line.get("accept") for line in settings.read_history(folder)],
    )


def _dump(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude_none=True)


def _read_table(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(read_plain(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{path} can't be read ({error}); remove it and give the options of `up` again") from None
    if not isinstance(values, dict):
        raise InvalidInput(f"{path} holds no table; remove it and give the options of `up` again")
    return values
