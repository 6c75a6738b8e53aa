"""What changed of weights, applied to the old ones, is the new ones bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vaopd.weights.delta import BLOCK, apply_delta, write_delta


@pytest.mark.parametrize("size", [2, 2 * BLOCK, 2 * BLOCK + 2, 6 * BLOCK])
def test_a_delta_is_lossless(tmp_path: Path, size: int) -> None:
    """Random bytes and places; the first and the last word are among them."""
    draw = np.random.default_rng(size)
    old = draw.integers(0, 2**16, size // 2, dtype=np.uint16)
    new = old.copy()
    places = np.unique([0, len(new) - 1, *draw.integers(0, len(new), len(new) // 10)])
    new[places] ^= 1 + draw.integers(0, 2**16 - 1, len(places), dtype=np.uint16)
    (tmp_path / "old").write_bytes(old.tobytes())
    (tmp_path / "new").write_bytes(new.tobytes())
    if write_delta(tmp_path / "old", tmp_path / "new", tmp_path / "delta") is None:
        assert size == 2  # one word: all of it has changed
        return
    apply_delta(tmp_path / "old", tmp_path / "delta", tmp_path / "patched")
    assert (tmp_path / "patched").read_bytes() == new.tobytes()
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):  # by a memory map it would be SIGBUS
        apply_delta(tmp_path / "old", tmp_path / "delta", Path("/dev/full"))
    (tmp_path / "longer").write_bytes(bytes(size + 2 * BLOCK))
    with pytest.raises(ValueError, match="another file"):
        apply_delta(tmp_path / "longer", tmp_path / "delta", tmp_path / "patched")
