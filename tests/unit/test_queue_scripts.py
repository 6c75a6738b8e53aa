"""The Lua scripts and their Python signatures agree: names, keys and the number of arguments."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vaopd.queue import scripts

ROOT = Path(__file__).parents[2]
INCLUDED = {path.stem for path in scripts.FOLDER.glob("*.lua") if not path.read_text().startswith("#!lua")}
SCRIPTS = sorted({path.stem for path in scripts.FOLDER.glob("*.lua")} - INCLUDED)
SAMPLES: dict[str, Any] = {
    "str": "text",
    "bytes": b"bytes",
    "int": 1,
    "str | int": 1,
    "Fence": scripts.Fence("epoch", "owner"),
    "Claim": scripts.Claim("worker", "1-0", 1),
}
"""An argument of each type that a signature names; a Fence is two arguments of its script, a Claim is three."""


class Sent(Exception):
    """Ends a call when the script would run, before its reply is read."""


def sent_by(name: str, *, extra: int = 0) -> tuple[str, tuple[str | int | bytes, ...]]:
    """The script and arguments that a signature sends, with `extra` arguments where it takes any number of them."""

    def run(script: str, *args: str | int | bytes) -> Any:
        raise Sent(script, args)

    _, *parameters = inspect.signature(getattr(scripts, name)).parameters.values()
    values = [
        SAMPLES[parameter.annotation]
        for parameter in parameters
        for _ in range(extra if parameter.kind is parameter.VAR_POSITIONAL else 1)
    ]
    with pytest.raises(Sent) as sent:
        getattr(scripts, name)(run, *values)
    return sent.value.args[0], sent.value.args[1]


def signatures() -> Iterator[str]:
    for name, function in inspect.getmembers(scripts, inspect.isfunction):
        if next(iter(inspect.signature(function).parameters), "") == "run" and not name.startswith("_"):
            yield name


def test_each_script_has_one_signature_and_each_signature_one_script() -> None:
    assert sorted(signatures()) == SCRIPTS
    assert len(SCRIPTS) == 20
    assert {"fence_lease", "fence_trainer", "fields", "keys"} == INCLUDED


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_signature_sends_the_arguments_that_its_script_reads(name: str) -> None:
    text = scripts.read_script(name)
    numbered = {int(index) for index in re.findall(r"ARGV\[(\d+)\]", text)}
    script, arguments = sent_by(name)
    assert script == name
    if loop := re.search(r"for i = (\d+), #ARGV(?:, (\d+))? do", text):  # it takes any number from there on
        first, step = int(loop[1]), int(loop[2] or 1)
        assert len(arguments) == first - 1
        assert len(sent_by(name, extra=2 * step)[1]) == first - 1 + 2 * step
        assert numbered == set(range(1, first))
    else:
        assert numbered == set(range(1, len(arguments) + 1))


def test_the_keys_are_those_that_keys_lua_names_in_its_order() -> None:
    named = re.findall(r"(\w+) = KEYS\[(\d+)\]", scripts.read_script("keys"))
    expected = [(name.replace(":", "_"), str(index)) for index, name in enumerate(scripts.KEY_NAMES, start=1)]
    assert named == expected


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_includes_the_keys_and_uses_no_other(name: str) -> None:
    text = scripts.read_script(name)
    assert "local K = {" in text
    used = set(re.findall(r"\bK\.(\w+)", text))
    assert used <= {key.replace(":", "_") for key in scripts.KEY_NAMES}


def source_files() -> Iterator[tuple[str, ast.Module]]:
    for folder in ("vaopd", "services"):
        for path in (ROOT / folder).rglob("*.py"):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def imports_redis(tree: ast.Module) -> bool:
    nodes = list(ast.walk(tree))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return any(name.split(".")[0] == "redis" for name in names)


def pings(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.Constant) and "PING" in str(node.value) for node in ast.walk(tree))


def runs_scripts(tree: ast.Module) -> bool:
    """Whether a `run` is called with a script's name, in place of the script's signature."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return any(
        ast.unparse(call.func).split(".")[-1] in ("run", "_run", "_run_fenced")
        and any(isinstance(argument, ast.Constant) and argument.value in SCRIPTS for argument in call.args)
        for call in calls
    )


def test_only_the_queue_speaks_to_redis() -> None:
    """So time limits, retries and idempotence hold for every command, and every script has typed arguments."""
    trees = dict(source_files())
    assert {path for path, tree in trees.items() if imports_redis(tree)} == {"vaopd/queue/connection.py"}
    assert {path for path, tree in trees.items() if pings(tree)} == {"vaopd/queue/embedded.py"}  # of its own child
    assert {path for path, tree in trees.items() if runs_scripts(tree)} == {"vaopd/queue/scripts.py"}
