"""Writes safetensors files, and digests them, on several threads at once.

A policy of 4 GB is on the critical path of every step, so its bytes are written and digested in one pass, piece by
piece. The digest is the SHA-256 of the pieces' SHA-256, since a plain one can use only one core.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import torch

PIECE_BYTES = 32 * 2**20
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


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> str:
    """Writes contiguous tensors on any device as a safetensors file, with the umask's mode -> `compute_digest` of it.

    The library's own function goes over the bytes three times, on one thread. Raises OSError, and KeyError for a dtype
    that the format doesn't have.
    """
    # Wide numbers first, as the library does, so that every tensor is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    ends = list(accumulate(tensors[name].nbytes for name in names))
    entries = {
        name: {
            "dtype": _NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [end - tensors[name].nbytes, end],
        }
        for name, end in zip(names, ends, strict=True)
    }
    header = json.dumps({"__metadata__": {"format": "pt"}} | entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    parts = [memoryview(struct.pack("<Q", len(header)) + header)]
    parts += [_read_bytes(tensors[name]) for name in names if tensors[name].nbytes]
    with path.open("wb") as file:
        size = sum(len(part) for part in parts)
        file.truncate(size)

        def write(piece: list[tuple[int, memoryview]]) -> bytes:
            digest = hashlib.sha256()
            for offset, data in piece:
                digest.update(data)
                while data:
                    written = os.pwrite(file.fileno(), data, offset)
                    offset, data = offset + written, data[written:]
            return digest.digest()

        with ThreadPoolExecutor(count_threads()) as threads:
            return join_digests(threads.map(write, _cut(parts)))


def compute_digest(path: Path) -> str:
    """Returns the SHA-256, in hex, of the SHA-256 of each 32 MiB of a file. Raises OSError."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size

        def read(start: int) -> bytes:
            digest = hashlib.sha256()
            at, end = start, min(start + PIECE_BYTES, size)
            while at < end and (data := os.pread(file.fileno(), min(2**20, end - at), at)):
                digest.update(data)
                at += len(data)
            return digest.digest()

        with ThreadPoolExecutor(count_threads()) as threads:
            return join_digests(threads.map(read, range(0, size, PIECE_BYTES)))


def _read_bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data


def _cut(parts: list[memoryview]) -> Iterator[list[tuple[int, memoryview]]]:
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


def join_digests(digests: Iterator[bytes]) -> str:
    """Returns the digest of a file from those of its pieces, in their order."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def count_threads() -> int:
    """Returns how many threads read or write a file's pieces."""
    return min(16, os.cpu_count() or 1)
