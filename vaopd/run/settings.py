"""What a resume may change of a run's settings, and RUN/settings.jsonl, the history of what it did change.

A configuration is compared key by key, as "section.key". Keys of `FIXED` make the experiment: a resume with another
value is refused by name. `PLACES` are addresses and folders, which differ from start to start and are not recorded. All
others may change and are recorded, with the step from which the new value holds. Torch-free.

A line of settings.jsonl, one for each start of the trainer:

    step     optimizer steps done at this start
    time_s   seconds since the epoch
    changes  key -> [old, new]; null stands for a key that one of them doesn't have
    teacher  `vaopd.run.teacher.TeacherRecord`
    accept   the value of --accept-teacher; null without it
    accepted whether another teacher than before was accepted
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vaopd.errors import ConfigError, InvalidInput
from vaopd.files.durable import write_atomic
from vaopd.run.json_lines import read_json_lines

FILE = "settings.jsonl"
FIXED = (
    "run.seed",
    "data",
    "student",
    "degradation",
    "objective",
    "teacher.model",
    "teacher.dtype",
    "teacher.payload",
    "teacher.top_k",
    "teacher.sampled_estimator",
    "rollout.temperature",
    "rollout.top_p",
    "rollout.max_new_tokens",
    "trainer.prompts_per_step",
    "trainer.rollouts_per_prompt",
    "trainer.optimizer",
    "evaluation.prompts",
    "evaluation.samples",
    "evaluation.temperature",
)
"""Keys and whole sections that a resume may not change: objective, data, seed, batch, models, evaluation."""
OF_THE_TEACHER = ("teacher.model", "teacher.dtype")
"""Those of `FIXED` that change with a teacher that is accepted."""
PLACES = ("run.name", "run.folder", "teacher.address", "queue.url", "queue.password_file", "api.address")
"""Addresses and folders."""
MACHINE = (
    *PLACES,
    "teacher.device_map",
    "teacher.processes",
    "teacher.shared_base",
    "teacher.batch_tokens",
    "rollout.workers",
    "rollout.requests_per_batch",
    "rollout.engine_options",
    "trainer.processes",
    "trainer.sharding",
    "trainer.forward_tokens",
    "trainer.chunk_tokens",
    "trainer.checkpoint_every",
    "trainer.keep_checkpoints",
    "trainer.trackers",
    "weights",
    "evaluation.every",
    "evaluation.student_va_prompts",
    "queue",
    "api",
)
"""Keys that say how a run is computed, not what: runs that differ in these alone are compared as one configuration."""

Changes = dict[str, list[Any]]
"""key -> [old, new]."""


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns "section.key" -> value of a configuration's tables."""
    return {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()}


def is_among(key: str, names: Sequence[str]) -> bool:
    """Returns whether `names` has the key, or its whole section."""
    return key in names or key.partition(".")[0] in names


def find_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Changes:
    """Returns what differs between two configurations, places aside."""
    before, after = flatten(old), flatten(new)
    return {
        key: [before.get(key), after.get(key)]
        for key in dict.fromkeys((*before, *after))
        if before.get(key) != after.get(key) and not is_among(key, PLACES)
    }


def check_resume(
    old: Mapping[str, Any], new: Mapping[str, Any], *, name: str, done: int, accept_teacher: bool = False
) -> Changes:
    """Returns the changes that a resume makes. Raises ConfigError, naming each, for those that it may not make.

    old: the run's own configuration; both as JSON-like tables. done: optimizer steps of its newest checkpoint.
    """
    changes = find_changes(old, new)
    allowed = OF_THE_TEACHER if accept_teacher else ()
    refused = {key: pair for key, pair in changes.items() if is_among(key, FIXED) and key not in allowed}
    if refused:
        lines = [f"  {key}: {_show(before)} → {_show(after)}" for key, (before, after) in refused.items()]
        teacher = all(key in OF_THE_TEACHER for key in refused)
        remedy = (
            "pass --accept-teacher REVISION if the run is to continue with another teacher"
            if teacher
            else "leave them out (`vaopd up --resume RUN` takes all settings from the run), or begin another run: "
            "--set run.name=NAME"
        )
        raise ConfigError(
            "\n".join([f"run {name!r} can't be resumed with other settings than it has:", *lines, f"  {remedy}"])
        )
    steps = new["trainer"]["steps"]
    if steps < done:
        raise ConfigError(
            f"trainer.steps = {steps}: run {name!r} has taken {done} steps; give at least as many, or leave it out"
        )
    return changes


def append(folder: Path, line: Mapping[str, Any]) -> None:
    """Appends a line to RUN/settings.jsonl; the file is replaced as a whole, so that no line is ever torn."""
    lines = [*read_history(folder), line]
    write_atomic(folder / FILE, "".join(json.dumps(each, allow_nan=False) + "\n" for each in lines))


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of RUN/settings.jsonl; none for a run that was never begun, or by an earlier vaopd.

    Raises InvalidInput for a line of another form.
    """
    path, lines = folder / FILE, []
    for where, line in read_json_lines(path) if os.path.lexists(path) else ():
        changes, teacher = line.get("changes", {}), line.get("teacher", {"revision": ""})
        pairs = list(changes.values()) if isinstance(changes, dict) else [None]
        if (
            type(line.get("step")) is not int
            or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
            or not (isinstance(teacher, dict) and "revision" in teacher)
        ):
            raise InvalidInput(f"{where} is no start of a run: step, changes and teacher have other types")
        lines.append(line)
    return lines


def _show(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)
