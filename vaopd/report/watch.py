"""`vaopd watch`: shows the progress of a run as a few lines that a terminal keeps up to date.

In: RUN/metrics.jsonl and RUN/config.toml, through `vaopd.run.records`, read every two seconds. Out: a block of lines
that is drawn over itself in a terminal; elsewhere one line after each step. Ends when the run is finished.
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from vaopd.errors import NotFound
from vaopd.files.plain import read_end
from vaopd.report.advice import describe_regime
from vaopd.run.records import Evaluation, Run, read_run
from vaopd.telemetry.progress_line import format_duration
from vaopd.telemetry.visible import escape

BARS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 40
OF_A_RUN = ("config.toml", "launch.json", "metrics.jsonl", "logs")
"""Each start writes one of them first."""
LAST_BYTES = 64 * 2**10  # of a log, for its last line
QUIET_S = 120.0  # a step that takes longer than this, and three times as long as usual, is mentioned
CURVES = (
    ("loss", "loss"),
    ("kl_high", "KL, high group"),
    ("kl_low", "KL, others"),
    ("mean_va", "mean VA"),
    ("rollouts_per_s", "rollouts/s"),
)


def watch(
    folder: Path,
    *,
    stream: TextIO,
    every_s: float = 2.0,
    once: bool = False,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.time,
) -> str:
    """Shows the run in `folder` until it has ended; with `once`, shows it once. Returns its state. Raises NotFound.

    A run of an earlier vaopd, which says nothing of its state, may be interrupted and resumed meanwhile. Ctrl-C ends
    the watching, never the run.
    """
    if not folder.is_dir():
        raise NotFound(f"{folder} is no folder; RUN is a run's folder, e.g. runs/demo-…")
    if any(folder.iterdir()) and not any(os.path.lexists(folder / name) for name in OF_A_RUN):
        raise NotFound(f"{folder} has no {' and no '.join(OF_A_RUN)}; RUN is a run's folder, e.g. runs/demo-…")
    terminal = stream.isatty() and not once
    drawn, last_line = 0, ""
    while True:
        run = _read_begun(folder)
        if terminal or once:
            width = shutil.get_terminal_size().columns if terminal else 100
            lines = [line[: width - 1] for line in (block(run, now_s=clock()) if run else describe_start(folder))]
            # Moves to the block's first line, overwrites each line, and clears lines left of a longer block.
            stream.write((f"\x1b[{drawn}F" if drawn else "") if terminal else "")
            stream.write("".join(f"{escape(line)}\x1b[K\n" if terminal else f"{escape(line)}\n" for line in lines))
            stream.write("\x1b[J" if terminal else "")
            drawn = len(lines)
        else:
            line = format_line(run) if run else describe_start(folder)[0]
            if line != last_line:
                stream.write(escape(line) + "\n")
                last_line = line
        stream.flush()
        if once or (run is not None and not run.may_continue):
            return run.state if run is not None else "starting"
        sleep(every_s)


def _read_begun(folder: Path) -> Run | None:
    """Returns the run, once it has taken a step or has ended; None before."""
    if os.path.lexists(folder / "metrics.jsonl"):
        return read_run(folder)
    run = read_run(folder) if os.path.lexists(folder / "config.toml") else None
    return run if run is not None and run.status is not None and not run.may_continue else None


def describe_start(folder: Path) -> list[str]:
    """Returns the lines before the first step: the last line that each process logged."""
    lines = [f"{folder.resolve().name}: no step yet; its processes' logs are in {folder / 'logs'}"]
    for log in sorted((folder / "logs").glob("*.log")):
        try:
            text = read_end(log, most_bytes=LAST_BYTES).rstrip().splitlines()
        except OSError as error:
            text = [f"can't be read ({error.strerror})"]
        if text:
            lines.append(f"  {log.stem:<10} {text[-1].strip()}")
    return lines


def block(run: Run, *, now_s: float) -> list[str]:
    """Returns the run as a few lines; `now_s` is the time in seconds since the epoch, as in metrics.jsonl."""
    lines = [f"{run.name}   {run.variant}, seed {run.seed}", _format_progress(run)]
    if run.status is not None and not run.finished:
        lines += run.state_label.splitlines()
    lines += [f"from step {step} on: {key} {old} → {new}" for step, key, old, new in run.list_changes()]
    for key, name in CURVES:
        _, values = run.list_series(key)
        if values:
            lines.append(f"{name:<16}{values[-1]:>9.4g}  {draw_sparkline(values)}")
    if run.evaluations:
        last = run.evaluations[-1]
        curve = draw_sparkline([evaluation.accuracy for evaluation in run.evaluations])
        error = f"± {last.standard_error:.1%}, step {last.step}{_describe_judge(last)}"
        lines.append(f"{'accuracy':<16}{last.accuracy:>9.1%}  {curve}  {error}")
    measured = [evaluation.student_va for evaluation in run.evaluations if evaluation.student_va is not None]
    if measured:
        curve = draw_sparkline([va.mean for va in measured])
        lines.append(f"{'student VA':<16}{measured[-1].mean:>9.4g}  {curve}  ± {measured[-1].error:.2g}, its own views")
    lines += [line for sentence in describe_regime(run) for line in textwrap.wrap(sentence, 78)]
    if quiet := _describe_silence(run, now_s):
        lines.append(quiet)
    return lines


def _describe_judge(evaluation: Evaluation) -> str:
    """Returns what is missing in the accuracy, if anything, and the judge's version, if the run recorded it."""
    gaps = "".join(f", {gap}" for gap in evaluation.gaps)
    return f"{gaps}, judge {evaluation.judge}" if evaluation.judge else gaps


def format_line(run: Run) -> str:
    """Returns the run in one line, for logs and pipes."""
    parts = [f"step {run.steps_done}/{run.steps_planned or '?'}"]
    for key, name, form in (("loss", "loss", ".4f"), ("mean_va", "mean VA", ".3f"), ("rollouts_per_s", "", ".1f")):
        _, values = run.list_series(key)
        if values:
            parts.append(f"{name} {values[-1]:{form}}" if name else f"{values[-1]:{form}} rollouts/s")
    if run.evaluations:
        last = run.evaluations[-1]
        parts.append(f"accuracy {last.accuracy:.1%} at step {last.step}{_describe_judge(last)}")
        parts.append(f"student VA {last.student_va.mean:.3f}" if last.student_va else "")
    ended = run.status is not None and run.state in ("failed", "stopped")
    parts.append(" ".join(run.state_label.split()) if ended else _format_time_left(run))
    return "  ".join(part for part in parts if part)


def draw_sparkline(values: Sequence[float], *, width: int = CURVE_WIDTH) -> str:
    """Draws values between their lowest and highest; more than `width` of them are averaged in equal stretches.

    >>> draw_sparkline([0, 1, 2, 3, 4, 5, 6, 7])
    '▁▂▃▄▅▆▇█'
    >>> draw_sparkline([0, 0, 7, 7], width=2)
    '▁█'
    """
    count = min(width, len(values))
    edges = [index * len(values) // count for index in range(count + 1)]
    means = [statistics.fmean(values[start:end]) for start, end in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    if high == low:
        return BARS[0] * count
    return "".join(BARS[round((mean - low) / (high - low) * (len(BARS) - 1))] for mean in means)


def _format_progress(run: Run) -> str:
    if run.steps_planned is None:
        return f"step {run.steps_done}"
    share = run.steps_done / run.steps_planned
    filled = round(share * CURVE_WIDTH)
    bar = "█" * filled + "░" * (CURVE_WIDTH - filled)
    # The bar comes last, since a narrow terminal cuts the line.
    return f"step {run.steps_done}/{run.steps_planned}  {share:>4.0%}  {_format_time_left(run):<12}  {bar}"


def _format_time_left(run: Run) -> str:
    if not run.may_continue:
        return run.state
    return f"{format_duration(run.time_left.total_seconds())} left" if run.time_left else ""


def _describe_silence(run: Run, now_s: float) -> str:
    _, times = run.list_series("time_s")
    if not run.may_continue or len(times) < 2:
        return ""
    since, usual = now_s - times[-1], (times[-1] - times[0]) / (len(times) - 1)
    if since < max(QUIET_S, 3 * usual):
        return ""
    return (
        f"no step for {format_duration(since)}: it is evaluating, waiting or has ended; see {run.folder / 'logs'} and "
        "`vaopd doctor`"
    )
