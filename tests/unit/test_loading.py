"""Garbage collection waits while a process loads its libraries and its model."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from vaopd.process import loading


@pytest.fixture(autouse=True)
def unfrozen() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_a_block_has_made_is_left_out_of_later_collections() -> None:
    with loading():
        assert not gc.isenabled()
        made = [[]]
    assert gc.isenabled()
    assert made not in gc.get_objects()
    assert gc.get_freeze_count() > 0


def test_collection_goes_on_after_a_block_that_fails() -> None:
    with pytest.raises(ImportError), loading():
        raise ImportError
    assert gc.isenabled()
