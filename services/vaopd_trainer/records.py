"""What a run leaves for people: metrics.jsonl, samples.jsonl, the trackers, and a line of progress per step."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from vaopd.errors import LimitExceeded
from vaopd.files.durable import atomic_file
from vaopd.telemetry.progress_line import Progress, draw, format_duration


class JsonLines:
    """Appends one JSON object per line. `drop_from(step)` forgets what a resumed run is about to do again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record, allow_nan=False) + "\n"
        try:
            with self.path.open("a") as file:
                file.write(line)
        except OSError as error:
            raise LimitExceeded(f"{self.path} can't be written ({error}); make room, and resume") from None

    def read(self) -> list[dict[str, Any]]:
        """All records; a last line that a crash cut short is left out."""
        text = self.path.read_text() if self.path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def drop_from(self, step: int) -> None:
        kept = [record for record in self.read() if record["step"] < step]
        with atomic_file(self.path) as file:
            file.write("".join(json.dumps(record) + "\n" for record in kept).encode())


EVALUATION_EVERY_S = 30.0


class ProgressLine:
    """Step, loss, mean VA, rollouts/s, accuracy, time left: rewritten in a terminal, a plain line elsewhere."""

    def __init__(
        self, *, steps: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic, every: int = 10
    ) -> None:
        self._steps = steps
        self._stream = stream or sys.stdout
        self._clock = clock
        self._every = every
        self.accuracy: float | None = None
        """The last held-out accuracy, once there is one."""
        self._started: float | None = None
        self._first = 0
        self._evaluation: Progress | None = None

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step` counts from 1 here: it has just been finished."""
        if self._started is None:
            self._started, self._first = self._clock(), step
        done = step - self._first
        left = (self._clock() - self._started) / done * (self._steps - step) if done else None
        # What matters least stands last: a narrow terminal cuts it off.
        parts = [
            f"step {step:>{len(str(self._steps))}}/{self._steps}",
            f"{format_duration(left)} left" if left is not None else "",
            f"loss {metrics['loss']:.4f}  mean VA {metrics['mean_va']:.3f}",
            f"accuracy {self.accuracy:.1%}" if self.accuracy is not None else "",
            f"{metrics['rollouts_per_s']:.1f} rollouts/s",
        ]
        line = "  ".join(part for part in parts if part)
        if self._stream.isatty() or step % self._every == 0 or step in (1, self._steps):
            draw(self._stream, line, stays=step == self._steps)

    def evaluating(self, done: int, total: int) -> None:
        """So many held-out problems have been answered; elsewhere than in a terminal, told every half minute."""
        if self._evaluation is None:
            self._evaluation = Progress(
                "evaluating",
                total=total,
                unit="problems",
                stream=self._stream,
                clock=self._clock,
                every_s=EVALUATION_EVERY_S,
            )
        if done < total:  # its end is told by the accuracy
            self._evaluation.report(done)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._evaluation = None  # it is over, whether or not all problems were answered
        draw(self._stream, text, stays=True)
