"""A full disk or a folder that can't be written costs one line, in every process and command."""

from __future__ import annotations

import argparse
import errno
from pathlib import Path
from typing import NoReturn

import pytest
from safetensors import SafetensorError

from tests.support.disks import full_disk
from tests.support.models import model_folder
from tests.support.runs import MINIMAL, make_run
from vaopd import process
from vaopd.cli import main
from vaopd.config import Config
from vaopd.data import handwritten_cards
from vaopd.files.hub import model_folder as find_model_folder
from vaopd.files.plain import UnfitFile
from vaopd.process.entry import announce
from vaopd.process.failures import explain_disk
from vaopd_trainer.compose import _try_trackers

FAILURES = {
    "full": (
        OSError(errno.ENOSPC, "", "/runs/r/model.safetensors"),
        "model.safetensors: No space left on device; free",
    ),
    "read-only": (OSError(errno.EROFS, "", "/runs/r"), "/runs/r: Read-only file system; choose a folder that can be"),
    "another's": (
        PermissionError(errno.EACCES, "", "/runs/r"),
        "/runs/r: Permission denied; choose a folder that this",
    ),
    "a pipe": (UnfitFile(errno.EINVAL, "not a regular file", "/runs/r/x"), "/runs/r/x: not a regular file; move it"),
    "a folder": (
        IsADirectoryError(errno.EISDIR, "", "/runs/r/x"),
        "/runs/r/x: Is a directory; name a file in it, or move that folder away",
    ),
    "too large": (OSError(errno.EFBIG, "", "/runs/r/x"), "/runs/r/x: File too large; raise the limit on a file's size"),
    "removed": (
        FileNotFoundError(errno.ENOENT, "", "/no/folder/x"),
        "/no/folder/x: its folder doesn't exist, or was removed meanwhile; make it, or name another one",
    ),
    "a library's": (
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        "No space left on device; free some space there, then continue with --resume",
    ),
}


@pytest.mark.parametrize(("error", "words"), FAILURES.values(), ids=FAILURES)
def test_a_process_says_it_in_one_line(
    error: Exception, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(MINIMAL)

    def run(arguments: argparse.Namespace, config: Config) -> int:
        raise error

    assert process.main(run, process.make_parser("trainer", "Trains."), ["--config", str(config)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("trainer: ")
    assert words in line


@pytest.mark.parametrize(("error", "words"), FAILURES.values(), ids=FAILURES)
def test_a_command_says_it_in_one_line(
    error: Exception, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("vaopd.report.write_report", refuse)
    assert main(["report", str(tmp_path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("vaopd: ")
    assert words in line


def test_a_folder_where_a_file_belongs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run")
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err == f"vaopd: {tmp_path}: Is a directory; name a file in it, or move that folder away\n"
    )


def test_no_half_file_bears_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run")
    handwritten_cards.write(tmp_path / "cards", seed=0, train=1, validation=1, test=0)
    model = str(model_folder("student"))
    options = ["--student", model, "--teacher", model, "--data", str(tmp_path / "cards")]
    commands = {
        "vaopd.schema.json": ["init", str(tmp_path / "x.toml"), "--cards", "1", *options],
        "report.html": ["report", str(tmp_path / "run"), "--output", str(tmp_path / "report.html")],
        "plot.png": ["report", str(tmp_path / "run"), "--plot", str(tmp_path / "plot.png")],
        "cards/train.parquet": ["data", "handwritten-cards", str(tmp_path / "cards"), "--train", "2"],
    }
    before = sorted(tmp_path.rglob("*"))
    for name, command in commands.items():
        with full_disk():
            assert main(command) == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith(f"vaopd: {tmp_path / name}: File too large; raise the limit"), line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_hub_s_cache_without_room_is_no_missing_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device", f"/cache/{name}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(OSError, match="No space left on device: '/cache/org/model'"):
        find_model_folder("org/model", role="student")


def test_a_restart_finds_its_address_announced_already(tmp_path: Path) -> None:
    with full_disk(5), pytest.raises(OSError, match=r"teacher\.address"):
        announce("127.0.0.1:50051", tmp_path / "teacher.address")
    announce("127.0.0.1:50051", tmp_path / "teacher.address")
    with full_disk(5):
        announce("127.0.0.1:50051", tmp_path / "teacher.address")
    assert (tmp_path / "teacher.address").read_text() == "127.0.0.1:50051"


def test_trackers_without_room_cost_their_curves_and_hide_no_error(caplog: pytest.LogCaptureFixture) -> None:
    def refuse() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    _try_trackers(refuse)
    assert "the trackers take nothing ([Errno 28] No space left on device)" in caplog.text


def test_other_errors_keep_their_traceback() -> None:
    assert explain_disk(FileNotFoundError(errno.ENOENT, "", "x")) is None
    assert explain_disk(ConnectionRefusedError(errno.ECONNREFUSED, "")) is None
    assert explain_disk(ValueError("x")) is None
