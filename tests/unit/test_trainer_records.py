"""What a run leaves for people: JSON lines that survive a crash, and one line of progress per step."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from tests.support.terminal import Terminal
from vaopd.errors import InvalidInput, LimitExceeded
from vaopd_trainer.records import JsonLines, ProgressLine

METRICS = {"loss": 1.25, "mean_va": 0.5, "rollouts_per_s": 20.0}


def test_lines_come_back_as_they_were_written(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    assert lines.read() == []
    lines.write({"step": 0, "loss": 0.5})
    lines.write({"step": 1, "loss": 0.25})
    assert lines.read() == [{"step": 0, "loss": 0.5}, {"step": 1, "loss": 0.25}]


def test_a_number_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        lines.write({"step": 0, "loss": float("nan")})
    assert lines.read() == []


def test_a_full_disk_is_told_with_the_remedy(tmp_path: Path) -> None:
    """/dev/full refuses every write, as a full disk does."""
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(LimitExceeded, match=r"metrics.jsonl can't be written .*No space left.*; make room, and resume"):
        JsonLines(tmp_path / "metrics.jsonl").write({"step": 0})


def test_a_resumed_run_drops_what_it_will_do_again_and_a_torn_last_line(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(5):
        lines.write({"step": step})
    with lines.path.open("a") as file:
        file.write('{"step": 5, "lo')  # the crash
    assert [record["step"] for record in lines.read()] == [0, 1, 2, 3, 4]
    lines.drop_from(3)
    lines.write({"step": 3})
    assert [json.loads(line)["step"] for line in lines.path.read_text().splitlines()] == [0, 1, 2, 3]


@pytest.mark.parametrize("line", ["{}", '{"step": "3"}', '{"step": null}'])
def test_a_line_of_no_step_is_named_when_a_run_resumes(line: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 0}}\n{line}\n')
    with pytest.raises(InvalidInput, match=r"metrics.jsonl:2: step is .*, not a number; remove the line"):
        JsonLines(tmp_path / "metrics.jsonl").drop_from(1)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_in_a_log_every_tenth_step_is_a_line_and_so_are_the_first_and_the_last() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = ProgressLine(steps=25, stream=stream, clock=clock)
    for step in range(1, 26):
        progress.show_step(step, METRICS)
        clock.now_s += 6.0
    # The time left is measured from the first finished step on: 6 s per step, 15 steps after the tenth.
    assert stream.getvalue().splitlines() == [
        "step  1/25  loss 1.2500  mean VA 0.500  20.0 rollouts/s",
        "step 10/25  1:30 left  loss 1.2500  mean VA 0.500  20.0 rollouts/s",
        "step 20/25  0:30 left  loss 1.2500  mean VA 0.500  20.0 rollouts/s",
        "step 25/25  0:00 left  loss 1.2500  mean VA 0.500  20.0 rollouts/s",
    ]


def test_in_a_terminal_the_line_is_rewritten_and_what_is_said_stays() -> None:
    stream, clock = Terminal(), Clock()
    progress = ProgressLine(steps=1000, stream=stream, clock=clock)
    progress.show_step(1, METRICS)
    clock.now_s += 10.0
    progress.show_step(2, METRICS)
    progress.print_line("held-out accuracy at step 2: 40.0%")
    first, second, said = stream.getvalue().split("\r\x1b[K")[1:]
    assert first == "step    1/1000  loss 1.2500  mean VA 0.500  20.0 rollouts/s"
    assert second == "step    2/1000  2:46:20 left  loss 1.2500  mean VA 0.500  20.0 rollouts/s"  # 998 × 10 s
    assert said == "held-out accuracy at step 2: 40.0%\n"


def test_a_resumed_run_counts_its_own_steps_for_the_time_left() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = ProgressLine(steps=100, stream=stream, clock=clock)
    progress.show_step(89, METRICS)
    clock.now_s += 2.0
    progress.show_step(90, METRICS)
    assert stream.getvalue() == "step  90/100  0:20 left  loss 1.2500  mean VA 0.500  20.0 rollouts/s\n"


def test_an_evaluation_tells_how_far_it_is() -> None:
    """30 of 40 problems in 60 s leave 20 s; the end is told by the accuracy. Elsewhere every half minute."""
    for stream, expected in (
        (Terminal(), ["evaluating: 30/40 problems, 0:20 left", "evaluating: 35/40 problems, 0:09 left"]),
        (io.StringIO(), ["evaluating: 30/40 problems, 0:20 left"]),
    ):
        clock = Clock()
        progress = ProgressLine(steps=25, stream=stream, clock=clock)
        progress.show_evaluation(10, 40)
        clock.now_s += 60.0
        progress.show_evaluation(30, 40)
        clock.now_s += 5.0
        progress.show_evaluation(35, 40)
        progress.show_evaluation(40, 40)
        assert [line for line in stream.getvalue().replace("\r\x1b[K", "\n").splitlines() if line] == expected
