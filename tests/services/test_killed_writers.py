"""Files and folders that are written whole, when their writer is killed half-way."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from vaopd.files.durable import atomic_file, atomic_folder

FILE = """
import os, signal, sys
from vaopd.files import durable

durable.Path.replace = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)
with durable.atomic_file(durable.Path(sys.argv[1])) as file:
    file.write(b"new")
"""
FOLDER = """
import os, signal, sys
from vaopd.files import durable

with durable.atomic_folder(durable.Path(sys.argv[1])) as folder:
    (folder / "half").write_text("…")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def write_and_die(code: str, path: Path) -> None:
    died = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr


def test_a_writer_that_dies_before_the_rename_leaves_the_old_file(tmp_path: Path) -> None:
    """All of the new content is on disk, under another name."""
    path = tmp_path / "keys.json"
    path.write_bytes(b"old")
    write_and_die(FILE, path)
    assert path.read_bytes() == b"old"
    assert b"new" in {other.read_bytes() for other in tmp_path.iterdir()}
    with atomic_file(path) as file:  # the dead one's file does not matter
        file.write(b"newer")
    assert path.read_bytes() == b"newer"


def test_the_folder_of_a_killed_writer_is_removed_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    write_and_die(FOLDER, target)
    assert len(list(tmp_path.iterdir())) == 1
    assert not target.exists()
    with atomic_folder(target) as folder:
        (folder / "whole").write_text("")
    assert list(tmp_path.iterdir()) == [target]
