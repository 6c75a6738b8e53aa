"""Imports run down the floors that CONTRIBUTING.md lists, and the torch-free part works without torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| (\d) \| (.+?) \|", re.M)
NAMES = re.compile(r"`([\w/]+?)/?`")
SERVICES = ("vaopd_api", "vaopd_rollout", "vaopd_teacher", "vaopd_trainer")


def floors() -> dict[str, int]:
    """Room -> floor, from the table in CONTRIBUTING.md; a room is a service, or a child of `vaopd/`."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return {room: int(floor) for floor, rooms in ROW.findall(text) for room in NAMES.findall(rooms)}


FLOORS = floors()


def modules() -> Iterator[tuple[str, Path]]:
    for base in (ROOT, ROOT / "services"):
        for path in sorted(base.glob("vaopd*/**/*.py")):
            yield ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__"), path


MODULES = dict(modules())


def room(module: str) -> str | None:
    """The room of a module; None for `vaopd` itself, which imports nothing and which anybody may import."""
    parts = module.split(".")
    if parts[0] != "vaopd":
        return parts[0]
    return parts[1] if len(parts) > 1 else None


def imported(path: Path) -> Iterator[str]:
    """Modules of this project that a file imports, lazily or for its types too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in found:
            if name.split(".")[0] == "vaopd" or name.split(".")[0] in SERVICES:
                yield name if name in MODULES else name.rpartition(".")[0]


def problem(importer: str, module: str) -> str | None:
    here, there = room(importer), room(module)
    if here is None or there is None or here == there:
        return None
    if here not in FLOORS or there not in FLOORS:
        return f"{here if here not in FLOORS else there} stands on no floor of CONTRIBUTING.md"
    if here == "cli" and there in SERVICES:
        return f"{importer} imports {module}: the command line starts services as processes"
    if here in SERVICES and (there in SERVICES or there in ("cli", "launch", "tiny")):
        return f"{importer} imports {module}: a service imports no other process"
    # `files/` and `types` stand on the lowest floor with `errors`, which all of it may use.
    if FLOORS[there] >= FLOORS[here] and there != "errors":
        return f"{importer} (floor {FLOORS[here]}) imports {module} (floor {FLOORS[there]})"
    return None


def test_every_room_stands_on_a_floor() -> None:
    rooms = {room(module) for module in MODULES} - {None}
    assert rooms == set(FLOORS)


def test_imports_run_down_only() -> None:
    problems = {problem(name, module) for name, path in MODULES.items() for module in imported(path)}
    assert not problems - {None}


def test_an_import_that_runs_up_is_found() -> None:
    assert problem("vaopd.objective", "vaopd.cli.run")
    assert problem("vaopd_api.app", "vaopd_trainer.loop")
    assert problem("vaopd.cli.score", "vaopd_api.student")
    assert problem("vaopd_api.app", "vaopd.launch.up")
    assert problem("vaopd.launch.up", "vaopd.errors") is None


def test_there_is_no_circle() -> None:
    """Not between the modules of one room either."""
    edges = {name: {m for m in imported(path) if m != name and m in MODULES} for name, path in MODULES.items()}
    while leaves := {name for name, targets in edges.items() if not targets & edges.keys()}:
        edges = {name: targets for name, targets in edges.items() if name not in leaves}
    assert not edges


TORCH_FREE = (
    *("types", "errors", "config", "telemetry", "wire", "client", "http_types", "http_client", "scoring", "images"),
    *("degradation", "access", "files", "net", "queue", "launch", "process", "cli", "run"),
    *("columns", "grading"),
)
WITH_TORCH = ("vaopd.run.snapshots", "vaopd.run.tensor_files")


def test_torch_is_not_needed() -> None:
    found = [module for module in MODULES if room(module) in TORCH_FREE and module not in WITH_TORCH]
    assert {room(module) for module in found} == set(TORCH_FREE)
    found = [module for module in found if not module.endswith("__main__")]
    code = f"import sys; sys.modules['torch'] = None\nimport {', '.join(found)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_readme_names_every_room_and_folder() -> None:
    """All folders of the top level, of `vaopd/`, `services/` and `tests/`, and every file at the root of `vaopd/`."""
    tree = (ROOT / "README.md").read_text().partition("## The tree")[2].partition("```\n\n")[0]
    named = set(re.findall(r"[\w.]+(?:\.py|/)", tree))
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    paths = [Path(name).parts for name in tracked]
    folders = {f"{parts[0]}/" for parts in paths if len(parts) > 1 and not parts[0].startswith(".")}
    inside = {f"{parts[1]}/" for parts in paths if len(parts) > 2 and parts[0] in ("vaopd", "services", "tests")}
    root = {parts[1] for parts in paths if len(parts) == 2 and parts[0] == "vaopd" and parts[1].endswith(".py")}
    needed = folders | inside | root - {"__init__.py"}
    anywhere = {part for parts in paths for part in (f"{parts[-1]}", *(f"{folder}/" for folder in parts[:-1]))}
    assert needed <= named
    assert named - anywhere == {"runs/"}  # made by the demo
