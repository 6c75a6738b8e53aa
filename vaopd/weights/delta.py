"""Turns a file of weights into the next version's by the 16-bit words that differ.

At learning rates of 1e-6 few bf16 weights change in a step. Files are compared word by word, in blocks of 65 536, so a
place within its block has 16 bits too: a changed weight takes 4 bytes. Nothing is rounded: the patched file is the new
one, bit for bit.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from vaopd.files.durable import write_at
from vaopd.run.tensor_files import PIECE_BYTES, map_on_threads

BLOCK = 2**16
"""Words of a block. A thread's piece, 32 MiB, holds 256 of them."""
_PIECE = PIECE_BYTES // 2


def write_delta(base: Path, new: Path, target: Path) -> int | None:
    """Writes what turns file `base` into file `new` -> its bytes; None, and no file, where it saves less than half.

    Raises OSError.
    """
    if base.stat().st_size != new.stat().st_size or new.stat().st_size % 2:
        return None
    old_words, new_words = (np.memmap(path, np.uint16, "r") for path in (base, new))

    def compare(start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        words = new_words[start : start + _PIECE]
        changed = np.flatnonzero(words != old_words[start : start + _PIECE])
        counts = np.bincount(changed // BLOCK, minlength=-(-len(words) // BLOCK))
        return counts.astype(np.int32), (changed % BLOCK).astype(np.uint16), words[changed]

    found, size = [], 0
    for part in map_on_threads(compare, range(0, len(new_words), _PIECE)):
        found.append(part)
        size += sum(array.nbytes for array in part)
        if 2 * size > new.stat().st_size:
            return None
    counts, places, values = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    save_file({"counts": counts, "places": places, "values": values}, target)
    return target.stat().st_size


def apply_delta(base: Path, delta: Path, target: Path) -> None:
    """Writes the file that `base` becomes. Raises OSError, and ValueError for the delta of another file."""
    old_words = np.memmap(base, np.uint16, "r")
    with safe_open(delta, "numpy") as file:
        counts, places, values = (file.get_tensor(name) for name in ("counts", "places", "values"))
    if len(counts) != -(-len(old_words) // BLOCK) or not counts.sum() == len(places) == len(values):
        raise ValueError(f"{delta} belongs to another file than {base}")
    ends = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))

    def patch(start: int) -> None:
        words = np.array(old_words[start : start + _PIECE])
        first = start // BLOCK
        blocks = range(first, min(first + _PIECE // BLOCK, len(counts)))
        own = slice(ends[first], ends[blocks.stop])
        offsets = np.repeat(np.arange(len(blocks)) * BLOCK, counts[first : blocks.stop])
        words[offsets + places[own]] = values[own]
        write_at(file, words.data.cast("B"), start * words.itemsize)

    with target.open("wb") as file:
        for _ in map_on_threads(patch, range(0, len(old_words), _PIECE)):
            pass
