"""Safetensors files written on several threads: what the library reads from them, and their digest by hand."""

from __future__ import annotations

import hashlib
import os
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vaopd.run import tensor_files
from vaopd.run.tensor_files import TensorStream, compute_digest, write_tensors

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def plain_digest(content: bytes, piece: int) -> str:
    parts = [content[at : at + piece] for at in range(0, len(content), piece)]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


@pytest.mark.parametrize("piece", [1, 7, 64, 1000, 2**20])
def test_the_library_reads_what_was_written_and_the_digest_is_that_of_the_pieces(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "PIECE_BYTES", piece)
    generator = torch.Generator().manual_seed(0)
    written = {
        f"layer.{index}": torch.randint(0, 2, (3, index + 1), generator=generator).to(dtype)
        for index, dtype in enumerate(DTYPES)
    }
    written |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "turned": torch.arange(6.0).view(2, 3).T}
    path = tmp_path / "model.safetensors"
    digest = write_tensors(written, path)
    read = load_file(path)
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert digest == compute_digest(path) == plain_digest(path.read_bytes(), piece)


def test_a_changed_byte_anywhere_changes_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "PIECE_BYTES", 64)
    path = tmp_path / "model.safetensors"
    digest = write_tensors({"a": torch.arange(100)}, path)
    content = path.read_bytes()
    for at in (0, 63, 64, len(content) - 1):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert compute_digest(path) != digest
    path.write_bytes(content[64:128] + content[:64] + content[128:])  # two pieces in the other order
    assert compute_digest(path) != digest


def test_the_file_takes_the_place_of_a_longer_one(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors({"a": torch.zeros(1000)}, path)
    write_tensors({"a": torch.ones(2)}, path)
    assert torch.equal(load_file(path)["a"], torch.ones(2))


def test_writes_that_are_cut_short_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: real(handle, data[:7], offset))
    path = tmp_path / "model.safetensors"
    assert write_tensors({"a": torch.arange(100)}, path) == compute_digest(path)
    assert torch.equal(load_file(path)["a"], torch.arange(100))


def test_a_full_disk_is_an_error_that_names_the_file() -> None:
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        write_tensors({"a": torch.arange(100)}, Path("/dev/full"))


def test_a_stream_is_written_while_few_of_its_tensors_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 200 tensors of a piece each, those that the threads write, one that waits and one that is being made."""
    monkeypatch.setattr(tensor_files, "PIECE_BYTES", 4096)
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def read(name: str) -> torch.Tensor:
        nonlocal most
        tensor = torch.full((1024,), float(name))
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    shapes = {str(n): torch.empty(1024, device="meta") for n in range(200)}
    write_tensors(TensorStream(shapes, read), tmp_path / "model.safetensors")
    assert most <= tensor_files.THREADS + 3
    assert {name: float(tensor[5]) for name, tensor in load_file(tmp_path / "model.safetensors").items()} == {
        str(n): float(n) for n in range(200)
    }
