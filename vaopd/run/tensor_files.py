"""Writes safetensors files, and digests them, on several threads at once.

A policy of 4 GB is on the critical path of every step, so its bytes are written and digested in one pass, piece by
piece, and it becomes several files, since a file takes one writer at a time (of memory, 3 GB/s). The digest is the
SHA-256 of the pieces' SHA-256, since a plain one can use only one core.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import BinaryIO, TypeVar

import torch

from vaopd.files.durable import write_at
from vaopd.files.plain import open_plain

T = TypeVar("T")
R = TypeVar("R")
_Piece = list[tuple[int, memoryview]]
"""Bytes of a file with their offsets."""

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
    tensors: Mapping[str, torch.Tensor] | TensorStream,
    path: Path,
    *,
    metadata: Mapping[str, str] | None = None,
    file_bytes: float = math.inf,
) -> str:
    """Writes contiguous tensors on any device as safetensors, with the umask's mode -> `compute_digest` of the files.

    What is larger than `file_bytes` becomes several files with an index, under the names of `save_pretrained`. Of a
    stream, only the tensors whose pieces are being written exist. The library's own function goes over the bytes
    three times, on one thread. Raises OSError, and KeyError for a dtype that the format doesn't have.
    """
    stream = tensors if isinstance(tensors, TensorStream) else TensorStream(tensors)
    shares = _share_out(stream.shapes, file_bytes)
    paths = [path]
    if len(shares) > 1:
        paths = [path.with_stem(f"{path.stem}-{n:05d}-of-{len(shares):05d}") for n in range(1, len(shares) + 1)]
        _write_index(path, dict(zip(paths, shares, strict=True)))

    def list_pieces() -> Iterator[tuple[BinaryIO, _Piece]]:
        made = iter(stream)
        for file, share in zip(files, shares, strict=True):
            parts = (part for _, tensor in islice(made, len(share)) if tensor.nbytes for part in _read_bytes(tensor))
            for piece in _cut(chain([_make_header(share, metadata or {})], parts)):
                yield file, piece

    def write(item: tuple[BinaryIO, _Piece]) -> bytes:
        file, piece = item
        digest = hashlib.sha256()
        for offset, data in piece:
            digest.update(data)
            write_at(file, data, offset)
        return digest.digest()

    with ExitStack() as opened:
        files = [opened.enter_context(path.open("wb")) for path in paths]
        return _join_digests(map_on_threads(write, list_pieces()))


def compute_digest(*paths: Path) -> str:
    """Returns the SHA-256, in hex, of the SHA-256 of each 32 MiB of each file. Raises OSError as `open_plain`."""

    def read(piece: tuple[BinaryIO, int, int]) -> bytes:
        file, at, end = piece
        digest = hashlib.sha256()
        while at < end and (data := os.pread(file.fileno(), min(2**20, end - at), at)):
            digest.update(data)
            at += len(data)
        return digest.digest()

    with ExitStack() as opened:
        files = [opened.enter_context(open_plain(path, limit_bytes=None)) for path in paths]
        sizes = [os.fstat(file.fileno()).st_size for file in files]
        pieces = (
            (file, start, min(start + PIECE_BYTES, size))
            for file, size in zip(files, sizes, strict=True)
            for start in range(0, size, PIECE_BYTES)
        )
        return _join_digests(map_on_threads(read, pieces))


def _share_out(shapes: Mapping[str, torch.Tensor], most: float) -> list[dict[str, torch.Tensor]]:
    """Deals tensors out, in order, to files of at most `most` bytes; only a single tensor may exceed that."""
    shares: list[dict[str, torch.Tensor]] = [{}]
    room = most
    for name, tensor in shapes.items():
        if tensor.nbytes > room and shares[-1]:
            shares.append({})
            room = most
        shares[-1][name] = tensor
        room -= tensor.nbytes
    return shares


def _write_index(path: Path, files: Mapping[Path, Mapping[str, torch.Tensor]]) -> None:
    """Writes PATH.index.json, by which transformers and vLLM find each tensor's file."""
    size = sum(tensor.nbytes for share in files.values() for tensor in share.values())
    places = {name: file.name for file, share in files.items() for name in share}
    index = {"metadata": {"total_size": size}, "weight_map": places}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _make_header(share: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> memoryview:
    ends = accumulate(tensor.nbytes for tensor in share.values())
    entries = {
        name: {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end - tensor.nbytes, end]}
        for (name, tensor), end in zip(share.items(), ends, strict=True)
    }
    about = {"__metadata__": {"format": "pt", **metadata}}
    header = json.dumps(about | entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return memoryview(struct.pack("<Q", len(header)) + header)


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


def _cut(parts: Iterable[memoryview]) -> Iterator[_Piece]:
    """Yields the pieces of a file that holds these parts one after the other."""
    piece: _Piece = []
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


def _join_digests(digests: Iterator[bytes]) -> str:
    """Returns the digest of files from those of their pieces, in order."""
    return hashlib.sha256(b"".join(digests)).hexdigest()
