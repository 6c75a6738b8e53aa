"""`vaopd watch`: what it says of a run before, during and after, in a terminal and elsewhere."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from tests.support.terminal import Terminal
from vaopd.cli import main
from vaopd.report.watch import draw_sparkline, watch
from vaopd.run import settings
from vaopd.run.status import StatusWriter


def make_run(folder: Path, *, steps: int, evaluated: tuple[int, ...] = (0,)) -> Path:
    """A run of 4 steps, 10 s each from 1000 s on, of which `steps` are done; accuracy rises by 10 points each time."""
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text("[run]\nseed = 3\n[trainer]\nsteps = 4\n[evaluation]\nevery = 2\n")
    lines = [
        {"kind": "train", "step": step, "time_s": 1000 + 10 * step, "loss": 4 - step, "mean_va": 0.125}
        | {"rollouts_per_s": 8.0, "kl_high": 1.0, "kl_low": 0.5}
        for step in range(steps)
    ]
    accuracies = ((step, 0.3 + 0.1 * index) for index, step in enumerate(evaluated))
    lines += [
        {"kind": "eval", "step": step, "accuracy": accuracy, "standard_error": 0.03, "prompts": 9, "samples": 1}
        for step, accuracy in accuracies
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "first", steps=3, evaluated=(0, 2))
    assert main(["watch", str(run), "--once"]) == 0
    head, progress, loss, *_, accuracy, quiet = capsys.readouterr().out.splitlines()
    assert head == "first   va_opd, seed 3"
    assert progress == f"step 3/4   75%  0:10 left     {'█' * 30}{'░' * 10}"
    assert loss == "loss                    2  █▅▁"
    assert accuracy == "accuracy            40.0%  ▁█  ± 3.0%, step 2"
    assert quiet.startswith("no step for ")  # its last step was in 1970


def test_a_terminal_is_drawn_over_until_the_run_has_ended(tmp_path: Path) -> None:
    run, stream = make_run(tmp_path / "first", steps=3), Terminal()
    watch(run, stream=stream, clock=lambda: 1020.0, sleep=lambda _: make_run(run, steps=4, evaluated=(0, 4)) and None)
    first, second = stream.getvalue().split("\x1b[8F")  # up by the eight lines of the first block
    assert first.count("\n") == 8
    assert "step 3/4" in first
    assert "step 4/4" in second
    assert "finished" in second


def test_elsewhere_there_is_a_line_for_every_change(tmp_path: Path) -> None:
    run, stream = make_run(tmp_path / "first", steps=3), io.StringIO()
    looks = iter([3, 4])

    def goes_on(_: float) -> None:
        steps = next(looks)
        make_run(run, steps=steps, evaluated=(0, 4) if steps == 4 else (0,))

    watch(run, stream=stream, sleep=goes_on)
    assert stream.getvalue().splitlines() == [
        "step 3/4  loss 2.0000  mean VA 0.125  8.0 rollouts/s  accuracy 30.0% at step 0  0:10 left",
        "step 4/4  loss 1.0000  mean VA 0.125  8.0 rollouts/s  accuracy 40.0% at step 4  finished",
    ]


def test_before_the_first_step_it_shows_what_the_processes_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "teacher.log").write_text("loading\nserving on 127.0.0.1:50051\n")
    assert main(["watch", str(tmp_path), "--once"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "no step yet" in first
    assert second == "  teacher    serving on 127.0.0.1:50051"


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path / "none")]) == 2
    assert "none is no folder; RUN is a run's folder" in capsys.readouterr().err
    (tmp_path / "notes.txt").touch()
    assert main(["watch", str(tmp_path), "--once"]) == 2
    assert "has no config.toml and no launch.json and no metrics.jsonl and no logs; RUN is" in capsys.readouterr().err


def test_the_student_s_own_va_has_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "first", steps=3, evaluated=(0, 2))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line, va in zip(lines[3:], (0.125, 0.25), strict=True):
        line |= {"student_va": va, "student_va_error": 0.01, "student_va_prompts": 9}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["watch", str(run), "--once"]) == 0
    assert "student VA           0.25  ▁█  ± 0.01, its own views" in capsys.readouterr().out.splitlines()


def test_a_curve_of_one_value_is_flat() -> None:
    assert draw_sparkline([3.0]) == "▁"
    assert draw_sparkline([3.0, 3.0]) == "▁▁"


def test_it_ends_with_a_run_that_failed_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "first", steps=3)
    with StatusWriter(run, role="trainer") as status:
        status.write("failed", step=3, reason="the teacher is not the one\n  revision: a → b")
    assert main(["watch", str(run)]) == 1
    assert capsys.readouterr().out.rstrip().endswith("failed at step 3: the teacher is not the one revision: a → b")
    assert main(["watch", str(run), "--once"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert " 75%  failed " in lines[1]
    assert lines[2:4] == ["failed at step 3: the teacher is not the one", "  revision: a → b"]
    assert not any("no step for" in line for line in lines)


def test_it_ends_with_a_run_that_was_stopped_and_with_one_that_never_took_a_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "first", steps=3)
    with StatusWriter(run, role="trainer") as status:
        status.write("stopped", step=3)
    assert main(["watch", str(run)]) == 0
    assert capsys.readouterr().out.rstrip().endswith("stopped at step 3")
    unborn = make_run(tmp_path / "unborn", steps=0)
    (unborn / "metrics.jsonl").unlink()
    with StatusWriter(unborn, role="vaopd up") as status:
        status.write("failed", reason="the teacher ended with code 2 before it was ready")
    assert main(["watch", str(unborn)]) == 1
    assert "failed at step 0: the teacher ended with code 2" in capsys.readouterr().out


def test_a_changed_setting_stands_below_the_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "first", steps=3)
    teacher = {"revision": "a"}
    settings.append(run, {"step": 2, "changes": {"trainer.steps": [2, 4]}, "teacher": teacher})
    assert main(["watch", str(run), "--once"]) == 0
    assert "from step 2 on: trainer.steps 2 → 4" in capsys.readouterr().out.splitlines()
