"""Writes metrics.jsonl, samples.jsonl and heldout.jsonl, and draws a line of progress for each step."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from vaopd.errors import InvalidInput, LimitExceeded
from vaopd.files.durable import write_atomic
from vaopd.run.json_lines import read_json_lines
from vaopd.telemetry.progress_line import Progress, draw, format_duration


class JsonLines:
    """A file of one JSON object per line, each with the `step` that it belongs to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record. Raises ValueError on a number that is not finite, LimitExceeded on a full disk."""
        line = json.dumps(record, allow_nan=False) + "\n"
        try:
            with self.path.open("a") as file:
                file.write(line)
        except OSError as error:
            raise LimitExceeded(f"{self.path} can't be written ({error}); make room, and resume") from None

    def read(self) -> list[dict[str, Any]]:
        """Returns all records but a last line that a crash cut short; none without a file."""
        if not self.path.exists():
            return []
        return [record for _, record in read_json_lines(self.path, limit_bytes=None)]

    def drop_from(self, step: int) -> None:
        """Removes the records of `step` and later ones: a resumed run takes those steps again."""
        kept = []
        for number, record in enumerate(self.read(), start=1):
            if type(done := record.get("step")) is not int:
                raise InvalidInput(f"{self.path}:{number}: step is {str(done)[:40]!r}, not a number; remove the line")
            if done < step:
                kept.append(record)
        write_atomic(self.path, "".join(json.dumps(record) + "\n" for record in kept))


PLAIN_EVERY, EVALUATION_EVERY_S = 10, 30.0


class ProgressLine:
    """Shows step, time left, loss, mean VA, accuracy and rollouts/s.

    One line, drawn over itself in a terminal; elsewhere a line for every `PLAIN_EVERY` steps.
    """

    def __init__(
        self, *, steps: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._steps = steps
        self._stream = stream or sys.stdout
        self._clock = clock
        self.accuracy: float | None = None
        """Of the last evaluation, in [0, 1]; None before the first."""
        self._started: float | None = None
        self._first = 0
        self._evaluation: Progress | None = None

    def show_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows a finished step; `step` counts from 1 here."""
        if self._started is None:
            self._started, self._first = self._clock(), step
        done = step - self._first
        left = (self._clock() - self._started) / done * (self._steps - step) if done else None
        # The least important part stands last: a narrow terminal cuts it off.
        parts = [
            f"step {step:>{len(str(self._steps))}}/{self._steps}",
            f"{format_duration(left)} left" if left is not None else "",
            f"loss {metrics['loss']:.4f}  mean VA {metrics['mean_va']:.3f}",
            f"accuracy {self.accuracy:.1%}" if self.accuracy is not None else "",
            f"{metrics['rollouts_per_s']:.1f} rollouts/s",
        ]
        line = "  ".join(part for part in parts if part)
        if self._stream.isatty() or step % PLAIN_EVERY == 0 or step in (1, self._steps):
            draw(self._stream, line, stays=step == self._steps)

    def show_evaluation(self, done: int, total: int) -> None:
        """Shows how many held-out problems have been answered; outside a terminal every half minute."""
        if self._evaluation is None:
            self._evaluation = Progress(
                "evaluating",
                total=total,
                unit="problems",
                stream=self._stream,
                clock=self._clock,
                every_s=EVALUATION_EVERY_S,
            )
        if done < total:  # the accuracy follows as its last line
            self._evaluation.report(done)

    def print_line(self, text: str) -> None:
        """Prints a line that stays, and ends the display of an evaluation."""
        self._evaluation = None  # even if some problems were never answered
        draw(self._stream, text, stays=True)
