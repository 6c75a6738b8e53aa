"""Writes safetensors files, and digests them, on several threads at once.

A policy of 4 GB is on the critical path of every step, so its bytes are written and digested in one pass, piece by
piece. The digest is the SHA-256 of the pieces' SHA-256, since a plain one can use only one core.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import torch

from vaopd.files.durable import write_at
from vaopd.files.plain import open_plain

T = TypeVar("T")
R = TypeVar("R")

PIECE_BYTES = 32 * 2**20
THREADS = min(16, os.cpu_count() or 1)
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorStream:
    """Tensors of which one exists at a time: their shapes are known beforehand, each is made when it is read."""

    def __init__(self, shapes: Mapping[str, torch.Tensor], read: Callable[[str], torch.Tensor] | None = None) -> None:
        """shapes: a tensor of each one's dtype and shape, on any device, "meta" too. read: None if these are they."""
        # Wide numbers first, as the safetensors library writes them, so that every tensor is aligned.
        self.shapes = {name: shapes[name] for name in sorted(shapes, key=lambda n: (-shapes[n].element_size(), n))}
        self._read = read or shapes.__getitem__

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Makes the tensors, always in the same order: ranks that gather each of them together go in step."""
        return ((name, self._read(name)) for name in self.shapes)


def write_tensors(
    tensors: Mapping[str, torch.Tensor] | TensorStream, path: Path, *, metadata: Mapping[str, str] | None = None
) -> str:
    """Writes contiguous tensors on any device as a safetensors file, with the umask's mode -> `compute_digest` of it.

    Of a stream, only the tensors whose pieces are being written exist. The library's own function goes over the bytes
    three times, on one thread. Raises OSError, and KeyError for a dtype that the format doesn't have.
    """
    stream = tensors if isinstance(tensors, TensorStream) else TensorStream(tensors)
    shapes = stream.shapes
    ends = list(accumulate(tensor.nbytes for tensor in shapes.values()))
    entries = {
        name: {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end - tensor.nbytes, end]}
        for (name, tensor), end in zip(shapes.items(), ends, strict=True)
    }
    about = {"__metadata__": {"format": "pt", **(metadata or {})}}
    header = json.dumps(about | entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    start = struct.pack("<Q", len(header)) + header

    def list_parts() -> Iterator[memoryview]:
        yield memoryview(start)
        for _, tensor in stream:
            if tensor.nbytes:
                yield from _read_bytes(tensor)

    with path.open("wb") as file:

        def write(piece: list[tuple[int, memoryview]]) -> bytes:
            digest = hashlib.sha256()
            for offset, data in piece:
                digest.update(data)
                write_at(file, data, offset)
            return digest.digest()

        return join_digests(map_on_threads(write, _cut(list_parts())))


def compute_digest(path: Path) -> str:
    """Returns the SHA-256, in hex, of the SHA-256 of each 32 MiB of a file. Raises OSError as `open_plain`."""
    with open_plain(path, limit_bytes=None) as file:
        size = os.fstat(file.fileno()).st_size

        def read(start: int) -> bytes:
            digest = hashlib.sha256()
            at, end = start, min(start + PIECE_BYTES, size)
            while at < end and (data := os.pread(file.fileno(), min(2**20, end - at), at)):
                digest.update(data)
                at += len(data)
            return digest.digest()

        return join_digests(map_on_threads(read, range(0, size, PIECE_BYTES)))


def _read_bytes(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Yields a tensor's bytes, those of a GPU in pieces: pinned memory of one size, which torch keeps and gives again.

    New memory for each tensor would cost a page fault every 4 KiB, and a copy into it goes through another buffer.
    """
    data = tensor.detach().reshape(-1).view(torch.uint8)
    if not data.is_cuda:
        yield data.numpy().data
        return
    for piece in data.split(PIECE_BYTES):
        yield torch.empty(piece.shape, dtype=piece.dtype, pin_memory=True).copy_(piece).numpy().data


def _cut(parts: Iterable[memoryview]) -> Iterator[list[tuple[int, memoryview]]]:
    """Yields the pieces of a file that holds these parts one after the other: each as offsets with their bytes."""
    piece: list[tuple[int, memoryview]] = []
    at = 0
    for part in parts:
        while part:
            room = PIECE_BYTES - at % PIECE_BYTES
            piece.append((at, part[:room]))
            at += len(part[:room])
            part = part[room:]
            if at % PIECE_BYTES == 0:
                yield piece
                piece = []
    if piece:
        yield piece


def map_on_threads(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yields the results in order. As many items are taken as the threads can work on; `Executor.map` takes all."""
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(THREADS) as threads:
        for item in items:
            pending.append(threads.submit(function, item))
            if len(pending) > THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def join_digests(digests: Iterator[bytes]) -> str:
    """Returns the digest of a file from those of its pieces, in their order."""
    return hashlib.sha256(b"".join(digests)).hexdigest()
