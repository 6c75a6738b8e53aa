"""Writes files and folders that appear whole or not at all, and then survive a crash."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: Path, *, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Yields a new file beside `path` that takes its place once the block ends well.

    Readers see the old file or the new one. If the block raises, or the process dies, `path` stays as it was. `mode` is
    the new file's from its first byte on, less what the umask takes away, as with `open`. Raises OSError.

    Always fsynced, file and folder: a rename may reach the disk before the content does, and after a power cut the file
    would be empty. A revoked key, the owner of a run's ledger and a metrics file that is shortened for a resume must
    survive that. An announced address and a report could do without, but are written once or twice in a process's life.
    A link stays, and its target is replaced; a device, such as a terminal or /dev/null, is written to.
    """
    path = path.resolve() if path.is_symlink() else path
    if path.is_char_device():
        with name_errors(path), path.open("wb") as file:
            yield file
        return
    aside = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    with name_errors(path, aside):
        try:
            with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        _fsync(path.parent)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file, as `atomic_file` does; a text in UTF-8."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_folder(path: Path, *, wait_for_disk: bool = True) -> Iterator[Path]:
    """Yields a new folder beside `path`; once the block ends well it is on disk and takes the place of `path`.

    If the block raises, or the process dies, `path` stays as it was. One writer per path: what an earlier one left
    behind is removed first. On Linux file systems without RENAME_EXCHANGE (NFS), a `path` that exists is missing for a
    moment while it is replaced. wait_for_disk: False for what has a digest and can be made again: it is brought to the
    disk afterwards, on a thread, and a power cut in these seconds may damage it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.name}.tmp-*"):
        shutil.rmtree(leftover)
    aside = path.parent / f".{path.name}.tmp-{uuid.uuid4().hex[:8]}"
    with name_errors(path, aside):
        aside.mkdir()
        try:
            yield aside
            if wait_for_disk:
                _fsync_all(aside)
            _take_place(aside, path)
            if wait_for_disk:
                _fsync(path.parent)
            else:
                threading.Thread(target=_fsync_later, args=(path,), name="vaopd-fsync", daemon=True).start()
        finally:
            # Removes the unfinished folder, or the one that was replaced.
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def name_errors(path: Path | str, aside: Path | None = None) -> Iterator[None]:
    """Names `path` in an OSError that names no file, as those of `write` don't, or the one beside it."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # else its text is all that it has
            named = str(error.filename or path)
            error.filename = named if aside is None else named.replace(str(aside), str(path))
        raise


def write_at(file: BinaryIO, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Writes all of `data` at that place of a file, beside other threads. Raises OSError, which names the file.

    Never through a memory map: where no room is left, it ends the process (SIGBUS).
    """
    data = memoryview(data)
    with name_errors(file.name):
        while data:
            written = os.pwrite(file.fileno(), data, offset)
            offset, data = offset + written, data[written:]


def copy_file(source: Path, target: Path) -> None:
    """Copies a file's content; the mode is the umask's. File systems that can share the blocks do so.

    Never a hard link: an editor that writes in place would change both, for example a model in the hub's cache.
    """
    with name_errors(target), source.open("rb") as read, target.open("wb") as written:
        try:
            while os.copy_file_range(read.fileno(), written.fileno(), 2**30):
                pass
        except OSError:  # another file system, or a kernel without it
            read.seek(0)
            written.seek(0)
            shutil.copyfileobj(read, written)


def _fsync_all(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            _fsync(Path(parent) / name)
        _fsync(Path(parent))


def _fsync_later(folder: Path) -> None:
    with contextlib.suppress(OSError):  # removed meanwhile; or damaged, which its digest tells
        _fsync_all(folder)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _take_place(aside: Path, path: Path) -> None:
    """Renames `aside` to `path`; a `path` that exists ends up as `aside`."""
    if not path.exists():
        aside.rename(path)
    elif not _exchange(aside, path):
        retired = aside.with_name(aside.name + "-old")
        path.rename(retired)
        aside.rename(path)
        shutil.rmtree(retired)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step (Linux's renameat2, which Python lacks); False where that can't be done."""
    at_fdcwd, rename_exchange = -100, 2
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(one))
