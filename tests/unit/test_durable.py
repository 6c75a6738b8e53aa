"""A file that is replaced whole or not at all, with the mode that was asked for."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.support.disks import full_disk
from vaopd.files import durable
from vaopd.files.durable import atomic_file, atomic_folder, write_atomic


def test_readers_see_the_old_file_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(b"old")
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_raises_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(b"old")

    def fail_half_way() -> None:
        with atomic_file(path) as file:
            file.write(b"new")
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        fail_half_way()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["file", "folder"])
def test_an_error_names_what_was_to_be_written(name: str, tmp_path: Path) -> None:
    """`write` names no file, and the one beside it is gone when the message is read."""

    def write() -> None:
        if name == "file":
            write_atomic(tmp_path / name, b"x" * 200)
        else:
            with atomic_folder(tmp_path / name) as aside:
                (aside / "file").write_bytes(b"x" * 200)

    with full_disk(), pytest.raises(OSError, match=f"File too large: '{tmp_path / name}'"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_link_stays_and_a_device_is_written_to(tmp_path: Path) -> None:
    """As root, /dev/null would be replaced for all processes."""
    (tmp_path / "target").write_text("old")
    for name, target in (("link", tmp_path / "target"), ("device", Path("/dev/null"))):
        (tmp_path / name).symlink_to(target)
        write_atomic(tmp_path / name, "new")
        assert (tmp_path / name).readlink() == target
    assert (tmp_path / "target").read_text() == "new"
    assert Path("/dev/null").is_char_device()


def test_content_and_folder_are_on_disk_in_the_right_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.json"
    seen = []

    def fsync(handle: int) -> None:
        status = os.fstat(handle)
        seen.append(("folder" if stat.S_ISDIR(status.st_mode) else f"{status.st_size} bytes", path.exists()))

    monkeypatch.setattr(durable.os, "fsync", fsync)
    with atomic_file(path) as file:
        file.write(b"new")
    assert seen == [("3 bytes", False), ("folder", True)]


@pytest.mark.parametrize(
    ("umask", "asked", "mode"),
    [(0o077, 0o666, 0o600), (0o022, 0o666, 0o644), (0o000, 0o600, 0o600), (0o002, 0o644, 0o644)],
)
def test_the_mode_holds_from_the_first_byte_on(tmp_path: Path, umask: int, asked: int, mode: int) -> None:
    """The umask takes away, and adds nothing; a key file is private under any."""
    path = tmp_path / "keys.json"
    path.write_bytes(b"old")
    path.chmod(0o666)
    before = os.umask(umask)
    try:
        with atomic_file(path, mode=asked) as file:
            assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == mode
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode
