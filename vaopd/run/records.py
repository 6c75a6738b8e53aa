"""Reads a run's configuration, metric lines, evaluations and sampled rollouts. Torch-free.

The trainer writes them into RUN: config.toml, metrics.jsonl, samples.jsonl, heldout.jsonl. `vaopd report` and
`vaopd watch` read them, also while the run continues.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from vaopd.errors import InvalidInput
from vaopd.net.passwords import remove_passwords
from vaopd.run.json_lines import read_json_lines, read_text
from vaopd.run.settings import read_history
from vaopd.run.status import RunStatus, read_status

RECENT_STEPS = 20  # a step's duration is the median of so many, so that an evaluation between two doesn't count


@dataclass(frozen=True, kw_only=True)
class StudentVa:
    """The student's own VA on held-out answers, in nats: its mean over tokens, and the standard error over problems.

    first_answers: the mean on the answers of the run's first evaluation; None where they aren't known.
    """

    mean: float
    error: float
    problems: int
    first_answers: float | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out accuracy of one policy version; accuracy and standard_error in [0, 1].

    judge: its version; empty in a run of an earlier vaopd. not_judged: answers it could not compare within its limits.
    prompts: the problems that were asked; not_asked: the others, by reason.
    """

    step: int
    accuracy: float
    standard_error: float
    prompts: int
    samples: int
    not_judged: int = 0
    not_asked: Mapping[str, int] = field(default_factory=dict)
    judge: str = ""
    student_va: StudentVa | None = None
    """None where it was not measured."""

    @property
    def label(self) -> str:
        """The accuracy and its standard error in per cent, e.g. "61.3 % ± 2.8"; then what is missing in it."""
        label = f"{100 * self.accuracy:.1f} % ± {100 * self.standard_error:.1f}"
        return f"{label} ({', '.join(self.gaps)})" if self.gaps else label

    @property
    def gaps(self) -> list[str]:
        """How many questions were not asked, and how many answers not judged; nothing where all were."""
        unasked = sum(self.not_asked.values())
        gaps = [f"{unasked} of {self.prompts + unasked} not asked"] if unasked else []
        return [*gaps, f"{self.not_judged} not judged"] if self.not_judged else gaps


@dataclass(frozen=True, kw_only=True)
class NoAccuracy:
    """An evaluation in which no question could be asked; not_asked: how many, by reason."""

    step: int
    not_asked: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run's folder as it was read. `train` holds the metric lines as they are, in order."""

    folder: Path
    config_text: str
    config: dict[str, Any]
    train: tuple[dict[str, Any], ...]
    evaluations: tuple[Evaluation, ...]
    without_accuracy: tuple[NoAccuracy, ...] = ()
    status: RunStatus | None = None
    """As it was read; None for a run of an earlier vaopd."""
    history: tuple[dict[str, Any], ...] = ()
    """The lines of settings.jsonl, one for each start."""

    @property
    def name(self) -> str:
        """The folder's name; bytes that are no UTF-8 as U+FFFD, since reports are."""
        return os.fsencode(self.folder.resolve().name).decode(errors="replace")

    @property
    def variant(self) -> str:
        """`objective.variant` of the configuration, "by" `objective.token_score` where that isn't the paper's."""
        settings = self.config.get("objective", {})
        variant, score = str(settings.get("variant", "va_opd")), settings.get("token_score", "va")
        return variant if score == "va" else f"{variant} by {score}"

    @property
    def seed(self) -> int:
        """`run.seed` of the configuration."""
        return int(self.config.get("run", {}).get("seed", 0))

    @property
    def steps_done(self) -> int:
        """How many optimizer steps have been finished; the lines count from 0."""
        return int(self.train[-1]["step"]) + 1 if self.train else 0

    @property
    def steps_planned(self) -> int | None:
        """How many optimizer steps the run has in all; None where the configuration doesn't say."""
        steps = self.config.get("trainer", {}).get("steps")
        return int(steps) if steps is not None else None

    @property
    def finished(self) -> bool:
        """Whether the run says so; without a status, whether the last step is taken and, if due, evaluated."""
        if self.status is not None:
            return self.status.state == "finished"
        if self.steps_planned is None or self.steps_done < self.steps_planned:
            return False
        evaluates = self.config.get("evaluation", {}).get("every", 50) > 0
        steps = [evaluation.step for evaluation in self.evaluations]
        steps += [evaluation.step for evaluation in self.without_accuracy]
        return not evaluates or max(steps, default=-1) >= self.steps_planned

    @property
    def state(self) -> str:
        """Its state: starting, running, stopped, failed or finished; without a status, finished or not finished."""
        return self.status.state if self.status is not None else "finished" if self.finished else "not finished"

    @property
    def state_label(self) -> str:
        """The state, with the step and the reason of a run that ended early."""
        return self.status.label if self.status is not None else self.state

    @property
    def may_continue(self) -> bool:
        """Whether a page or a terminal should look again by itself."""
        return not self.finished if self.status is None else self.status.alive

    def list_changes(self) -> list[tuple[int, str, Any, Any]]:
        """Returns the settings that were changed on the way: from which step, key, old and new value."""
        return [
            (int(line["step"]), key, old, new)
            for line in self.history
            for key, (old, new) in line.get("changes", {}).items()
        ]

    def list_teachers(self) -> list[tuple[int, str]]:
        """Returns the revisions of the run's teachers, in turn, each with the step from which it taught."""
        found: list[tuple[int, str]] = []
        for line in self.history:
            revision = str(line["teacher"]["revision"])
            if not found or found[-1][1] != revision:
                found.append((int(line["step"]), revision))
        return found

    def list_series(self, key: str) -> tuple[list[int], list[float]]:
        """Returns the steps that recorded a finite `key`, and its values there."""
        points = [(line["step"], line[key]) for line in self.train if is_number(line.get(key))]
        return [step for step, _ in points], [value for _, value in points]

    def compute_mean(self, key: str) -> float | None:
        """Returns the mean of `key` over all steps that recorded it; None if none did."""
        _, values = self.list_series(key)
        return sum(values) / len(values) if values else None

    @property
    def time_left(self) -> timedelta | None:
        """How long the remaining steps take at the median duration of recent ones, without evaluations."""
        times = [line["time_s"] for line in self.train[-RECENT_STEPS - 1 :] if is_number(line.get("time_s"))]
        if len(times) < 2 or self.steps_planned is None:
            return None
        step_s = statistics.median(later - earlier for earlier, later in itertools.pairwise(times))
        return timedelta(seconds=step_s * max(0, self.steps_planned - self.steps_done))


def read_run(folder: Path) -> Run:
    """Reads a run's folder; raises NotFound, or InvalidInput that names the file and line."""
    config_text = remove_passwords(read_text(folder / "config.toml"))  # an earlier vaopd wrote them down
    try:
        config = tomllib.loads(config_text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{folder / 'config.toml'} is not valid TOML: {error}") from None
    _check_config(config, folder / "config.toml")
    train, evaluations, without_accuracy = [], [], []
    metrics = folder / "metrics.jsonl"
    # A run that has just been started has no metrics yet.
    for where, line in read_json_lines(metrics) if os.path.lexists(metrics) else ():
        if line.get("kind") == "eval" and "accuracy" in line and line["accuracy"] is None:
            step = int(_read_number(line, "step", where))
            without_accuracy.append(NoAccuracy(step=step, not_asked=_read_counts(line, where)))
        elif line.get("kind") == "eval":
            evaluations.append(_read_evaluation(line, where))
        elif line.get("kind") == "train":
            _read_number(line, "step", where)
            train.append(line)
    return Run(
        folder=folder,
        config_text=config_text,
        config=config,
        train=tuple(train),
        evaluations=tuple(evaluations),
        without_accuracy=tuple(without_accuracy),
        status=read_status(folder),
        history=tuple(read_history(folder)),
    )


def is_number(value: Any) -> bool:
    """Whether a value of a record is a finite number that a float can hold."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    """Raises InvalidInput unless all are tables, and what a `Run` reads of them has its type."""
    for section, values in config.items():
        if not isinstance(values, dict):
            raise InvalidInput(f"{path}: {section} is {_shorten(values)}; it must be a table")
    for section, key, kind, least in _READ:
        value = config.get(section, {}).get(key)
        if value is not None and (type(value) is not kind or (isinstance(value, int) and not least <= value < 2**53)):
            bound = f" from {least} on" if kind is int else ""
            raise InvalidInput(f"{path}: {section}.{key} is {_shorten(value)}; it must be {kind.__name__}{bound}")


_READ: tuple[tuple[str, str, type, int], ...] = (
    ("run", "seed", int, 0),
    ("objective", "variant", str, 0),
    ("objective", "token_score", str, 0),
    ("trainer", "steps", int, 1),
    ("evaluation", "every", int, 0),
)


def _shorten(value: Any) -> str:
    try:
        return repr(value)[:100]
    except (ValueError, RecursionError):  # a number of thousands of digits
        return f"a large {type(value).__name__}"


def _read_evaluation(line: dict[str, Any], where: str) -> Evaluation:
    return Evaluation(
        step=int(_read_number(line, "step", where)),
        accuracy=_read_number(line, "accuracy", where),
        standard_error=_read_number(line, "standard_error", where),
        prompts=int(_read_number(line, "prompts", where)),
        samples=int(_read_number(line, "samples", where)),
        not_judged=int(_read_number({"not_judged": 0} | line, "not_judged", where)),
        not_asked=_read_counts(line, where),
        judge=str(line.get("judge", "")),
        student_va=_read_student_va(line, where) if "student_va" in line else None,
    )


def _read_student_va(line: dict[str, Any], where: str) -> StudentVa:
    first = "student_va_first_answers"
    return StudentVa(
        mean=_read_number(line, "student_va", where),
        error=_read_number(line, "student_va_error", where),
        problems=int(_read_number(line, "student_va_prompts", where)),
        first_answers=_read_number(line, first, where) if first in line else None,
    )


def _read_counts(line: dict[str, Any], where: str) -> dict[str, int]:
    counts = line.get("not_asked")  # missing in a run of an earlier vaopd
    if not isinstance(counts, dict):
        return {}
    return {str(reason): int(_read_number(counts, reason, where)) for reason in counts}


def _read_number(line: dict[str, Any], key: str, where: str) -> float:
    value = line.get(key)
    if isinstance(value, int | float) and is_number(value):
        return value
    raise InvalidInput(f"{where}: {key} is {_shorten(value)}; it must be a finite number")
