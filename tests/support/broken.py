"""What may lie in the place of a run's file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

FILES = ("config.toml", "metrics.jsonl", "samples.jsonl", "settings.jsonl", "status.json")
WRONG = {
    "config.toml": 'run = "first"\n',
    "metrics.jsonl": json.dumps({"kind": "train", "step": [3]}) + "\n",
    "samples.jsonl": json.dumps({"step": 0, "group_id": ["g"], "question": 1}) + "\n",
    "settings.jsonl": json.dumps({"step": 0, "changes": {"a": 1}, "teacher": "none"}) + "\n",
    "status.json": json.dumps({"state": ["running"], "step": 10**400}),
}


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**30)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe\n"),
    "wrong types": lambda path: path.write_text(WRONG.get(path.name, "")),
    "a number too large": lambda path: path.write_text(f'{{"step": {"9" * 5000}}}\n'),
    "nested too deep": lambda path: path.write_text("[" * 100_000 + "\n"),
    "a pipe": os.mkfifo,
    "a loop of links": _loop,
    "a folder": Path.mkdir,
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a sparse gigabyte": _sparse,
}
