"""What SECURITY.md says of third parties' programs: usage reports are off, and a Redis server of the system will do."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from vaopd import cli, process
from vaopd.errors import ConfigError
from vaopd.queue.embedded import find_server_binary
from vaopd.telemetry.usage import SWITCHES


def test_every_command_and_service_turns_usage_reports_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for main in (
        lambda: cli.main(["ledger", str(tmp_path / "missing")]),
        lambda: process.main(
            lambda arguments, config: 0, process.make_parser("api", "An API."), ["--config", str(tmp_path / "missing")]
        ),
    ):
        own = {name: value for name, value in os.environ.items() if name not in SWITCHES} | {"DO_NOT_TRACK": "0"}
        monkeypatch.setattr(os, "environ", own)
        assert main() == 2
        assert {name: own[name] for name in SWITCHES} == SWITCHES | {"DO_NOT_TRACK": "0"}  # the user's stays


def test_without_the_package_a_server_on_the_path_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="apt install valkey-server or redis-server"):
        find_server_binary()
    for name in ("redis-server", "valkey-server"):
        tmp_path.joinpath(name).touch(mode=0o755)
        assert find_server_binary() == str(tmp_path / name)
