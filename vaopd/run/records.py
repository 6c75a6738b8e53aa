"""Reads a run's configuration, metric lines, evaluations and sampled rollouts. Torch-free.

The trainer writes them into RUN: config.toml, metrics.jsonl, samples.jsonl. `vaopd report` and `vaopd watch` read them,
also while the run continues.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from vaopd.errors import InvalidInput, NotFound

RECENT_STEPS = 20  # a step's duration is the median of so many, so that an evaluation between two doesn't count


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out accuracy of one policy version; accuracy and standard_error in [0, 1].

    judge: its version; empty in a run of an earlier vaopd. not_judged: answers it could not compare within its limits.
    """

    step: int
    accuracy: float
    standard_error: float
    prompts: int
    samples: int
    not_judged: int = 0
    judge: str = ""

    @property
    def label(self) -> str:
        """The accuracy and its standard error in per cent, e.g. "61.3 % ± 2.8"; then how many were not judged."""
        label = f"{100 * self.accuracy:.1f} % ± {100 * self.standard_error:.1f}"
        return f"{label} ({self.not_judged} not judged)" if self.not_judged else label


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run's folder as it was read. `train` holds the metric lines as they are, in order."""

    folder: Path
    config_text: str
    config: dict[str, Any]
    train: tuple[dict[str, Any], ...]
    evaluations: tuple[Evaluation, ...]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

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
        """Whether the last step has been taken, and evaluated where evaluations are on."""
        if self.steps_planned is None or self.steps_done < self.steps_planned:
            return False
        evaluates = self.config.get("evaluation", {}).get("every", 50) > 0
        return not evaluates or bool(self.evaluations and self.evaluations[-1].step >= self.steps_planned)

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
    config_text = read_text(folder / "config.toml")
    try:
        config = tomllib.loads(config_text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{folder / 'config.toml'} is not valid TOML: {error}") from None
    train, evaluations = [], []
    metrics = folder / "metrics.jsonl"
    # A run that has just been started has no metrics yet.
    for where, line in read_json_lines(metrics) if metrics.exists() else ():
        if line.get("kind") == "eval":
            evaluations.append(_read_evaluation(line, where))
        elif line.get("kind") == "train":
            _read_number(line, "step", where)
            train.append(line)
    return Run(
        folder=folder, config_text=config_text, config=config, train=tuple(train), evaluations=tuple(evaluations)
    )


def read_text(path: Path) -> str:
    """Reads a file of a run's folder; raises NotFound when it can't be read."""
    try:
        return path.read_text()
    except OSError as error:
        raise NotFound(f"{path} can't be read ({error.strerror}); RUN is a run's folder, e.g. runs/demo-…") from None


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields "FILE:LINE" and the object there for every complete line; raises InvalidInput on one that is no JSON."""
    lines = read_text(path).split("\n")
    # The rest after the last newline is empty, or a line that is just being written.
    for number, line in enumerate(lines[:-1], 1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            raise InvalidInput(f"{path}:{number} is not a JSON object") from None
        yield f"{path}:{number}", value


def is_number(value: Any) -> bool:
    """Whether a value of a record is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def _read_evaluation(line: dict[str, Any], where: str) -> Evaluation:
    return Evaluation(
        step=int(_read_number(line, "step", where)),
        accuracy=_read_number(line, "accuracy", where),
        standard_error=_read_number(line, "standard_error", where),
        prompts=int(_read_number(line, "prompts", where)),
        samples=int(_read_number(line, "samples", where)),
        not_judged=int(line.get("not_judged", 0)),
        judge=str(line.get("judge", "")),
    )


def _read_number(line: dict[str, Any], key: str, where: str) -> float:
    value = line.get(key)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidInput(f"{where}: {key} is {value!r}; it must be a finite number")
    return value
