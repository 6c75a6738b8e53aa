"""What others named, from a run's folder or by a client, is shown in a terminal and never obeyed by it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import make_run
from tests.support.terminal import Terminal
from vaopd.cli import main
from vaopd.cli.output import emit, say

FORGED = "a\x1b[2J\x9b8m\u202e"


def test_a_result_is_escaped_in_a_terminal_and_whole_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, expected in (
        (Terminal(), "x\ta\\x1b[2J\\x9b8m\\u202e\ny\n"),
        (io.StringIO(), f"x\t{FORGED}\ny\n"),
    ):
        monkeypatch.setattr(sys, "stdout", stream)
        emit(f"x\t{FORGED}\ny")
        assert stream.getvalue() == expected


def test_what_is_said_in_several_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """The end of a process's log, of which each line is escaped already."""
    say("the trainer ended; the end of trainer.log:\n  no space")
    assert capsys.readouterr().err == "vaopd: the trainer ended; the end of trainer.log:\n  no space\n"


def test_a_job_that_names_itself_after_a_control_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """`vaopd usage` shows the names that clients gave a teacher without keys."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr("vaopd.cli.usage._read_metrics", lambda _: [(FORGED, "tokens", 3)])
    assert main(["usage", "127.0.0.1:1"]) == 0
    assert "a\\x1b[2J\\x9b8m\\u202e" in terminal.getvalue()
    assert "\x1b" not in terminal.getvalue()


def test_a_ledger_of_forged_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ledger.jsonl").write_text(
        '{"event":"delivered","group":"\\u001b[2J","policy":0,"worker":"\\u009b8m","deliveries":1}\n'
    )
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["ledger", str(tmp_path), "--groups"]) == 1
    shown = terminal.getvalue() + capsys.readouterr().err
    assert not {"\x1b", "\x9b"} & set(shown)
    assert "vaopd: \\x1b[2J was delivered and never published" in shown


def test_a_folder_whose_name_is_no_utf_8(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/r\xff"
    make_run(Path(os.fsdecode(folder)))
    command = [sys.executable, "-m", "vaopd.cli", "report", folder]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONUTF8": "1"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(folder + b"/")
