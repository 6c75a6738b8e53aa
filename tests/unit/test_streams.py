"""A log takes every text: a run whose path the locale can't spell doesn't fail for saying so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vaopd.telemetry.streams import drop_when_full


def test_characters_that_the_encoding_has_not_got(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "log").open("w", encoding="latin-1") as log:
        monkeypatch.setattr(sys, "stdout", log)
        drop_when_full("stdout")
        print("é 中", flush=True)
    assert (tmp_path / "log").read_bytes() == b"\xe9 \\u4e2d\n"
