"""The commands of the documentation, run as they stand there, in a folder like a clone's root.

What is changed in a command are sizes and addresses (`as_run`); what can't be run here is listed with the reason
(`NOT_RUN`), and nothing is left out silently. They share one teacher and one API.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.documents import PAGES, ROOT, Block, blocks, shell_commands
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

NOT_RUN = {
    r"^make (demo|test)\b": "`vaopd demo` is run below, and these are the tests",
    r"^make (chaos|fuzz|soak)|tests\.faults\.": "minutes of faults; tests/faults has a short one of each",
    r"gpu-check|benchmarks\.gpu": "needs a card; tests/services/test_gpu_check.py runs its phases on a CPU",
    r"eval --(install|benchmark)": "gigabytes; tests/services/test_benchmarks_eval.py has small ones",
    r"^make claims": "an hour and more; tests/unit/test_claims_lab.py and test_claims_system.py have small ones",
    r"docker compose|deploy/hardening": "there is no engine here; tests/services/test_compose.py reads the files",
    r"localhost:8080": "of the containers",
    r"configs/geometry3k|--gpus|VISIBLE_DEVICES": "wants GPUs and the hub's models; test_docs.py takes a dry run",
    r"teacher-host|teacher-0|teacher\.example:|10\.0\.0\.5:": "wants another host",
    r"0\.0\.0\.0": "would listen on every interface",
    r"^(pip install|source) ": "changes the environment that the tests run in",
    r"^prometheus |runs/first/logs": "tests/integration/test_monitoring.py has a Prometheus and JSON logs",
    r"http://collector": "tests/unit/test_tracing.py has a collector",
    r"^sudo ": "changes an account's files",
    r"own_run\.sh|own\.toml|data convert own": "the data are the reader's; tests/integration/test_own_run.py has some",
    r"^vllm serve|^hf auth|^vaopd push (?!.*--dry-run)": "a server for good, and the hub",
    r"^vaopd usage": "tests/services/test_cli_manners.py has two replicas' metrics",
    r"^(export|umask) ": "of one shell, for the commands that follow",
    r"^vaopd models make": "judges 600 questions at its end, for minutes; tests/unit/test_tiny.py makes small ones",
}
SMALL = """
[run]
name = "tiny"
[data]
source = "data/handwritten-geometry"
[student]
model = "models/tiny-student"
dtype = "float32"
[teacher]
model = "models/tiny-teacher"
dtype = "float32"
device_map = "cpu"
address = "127.0.0.1:0"
[api]
address = "127.0.0.1:0"
[rollout]
engine = "transformers"
max_new_tokens = 12
[trainer]
steps = 2
prompts_per_step = 2
rollouts_per_prompt = 2
trackers = []
[evaluation]
every = 2
prompts = 4
[queue]
url = "embedded"
"""
EXAMPLES = Path("services/vaopd_api/page/examples")
COMMANDS = [(block, command) for block in blocks("bash") for command in shell_commands(block)]
# The others are parts of a program; test_docs.py sees that what they import is there.
SCRIPTS = [block for block in blocks("python") if re.search(r"^with .*127\.0\.0\.1:", block.text, re.M)]


@dataclass(frozen=True)
class World:
    """A folder like a clone's root, small models and data in it; where teacher and API answer."""

    folder: Path
    teacher: str
    api: str
    done: dict[str, subprocess.CompletedProcess[str]] = field(default_factory=dict)

    def run_once(self, command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command unless it has run before: a run of the whole system takes half a minute."""
        if command not in self.done:
            self.done[command] = self.run(command)
        return self.done[command]

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-euc", command], cwd=self.folder, env=environment(), capture_output=True, text=True, timeout=300
        )


def environment() -> dict[str, str]:
    """`vaopd` and `python` are those that run the tests; the modules are found from another folder, too."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {
        "PATH": path,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'services'}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


@contextmanager
def serving(folder: Path, command: str) -> Iterator[str]:
    """One of the services, by its own command, from when it serves until the block ends; yields its address."""
    name = command.split()[1]
    announce = folder / f"{name}.address"
    with (folder / f"{name}.log").open("w") as log:
        words = [*command.split(), "--announce", str(announce)]
        process = subprocess.Popen(words, cwd=folder, env=environment(), stdout=log, stderr=log)
    try:
        wait_until(f"{name} serves", lambda: announce.exists() or process.poll() is not None, timeout_s=600)
        yield announce.read_text()
    finally:
        process.terminate()
        assert process.wait(60) in (0, -signal.SIGTERM)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "models", folder / "models")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "configs").mkdir()
    (folder / "configs" / "tiny.toml").write_text(SMALL)
    shutil.copytree(ROOT / EXAMPLES, folder / EXAMPLES)
    shutil.copy(ROOT / EXAMPLES / "triangle.png", folder)
    made = World(folder, "", "").run(as_run("vaopd data handwritten-geometry data/handwritten-geometry", "", ""))
    assert made.returncode == 0, made.stderr
    api_command = "vaopd api configs/tiny.toml --student models/tiny-student --runs runs"
    with (
        serving(folder, "vaopd teacher configs/tiny.toml") as teacher,
        serving(folder, f"{api_command} --set teacher.address={teacher}") as api,
    ):
        yield World(folder, teacher, api)


def as_run(command: str, teacher: str, api: str) -> str:
    """Sizes made small, addresses as they came out; the last of an option that is given twice holds."""
    changes = {
        r"^(vaopd .*?|python .*?) +#.*$": r"\1",  # without its comment it may be one that was run already
        r"http://127\.0\.0\.1:8080": f"http://{api}",
        r"^curl -s ": "curl -sS --fail-with-body ",
        r"CONFIG(\.toml)?\b": "configs/tiny.toml",
        r"for seed in 0 1 2;": "for seed in 0;",
        r"^(vaopd score )": rf"\1--teacher {teacher} ",
        r"(python examples/.*)$": rf"\1 --teacher {teacher} --steps 1",
        r"(vaopd data handwritten-(?:geometry|cards) .*)$": r"\1 --train 16 --validation 4 --test 2",
        r"^(vaopd certs \S+)": r"\1 --replace",
        r"(--set trainer\.steps=)\d+": r"\g<1>2",
        # Each run of the whole system takes half a minute. Those that differ from `first` in a setting or the name are
        # tested elsewhere; `first` itself serves metrics, too, and of the demo's variants runs the one that it isn't.
        r"^(vaopd up .*run\.name=(baseline|second|top-k|masked-top)\b.*)": r"\1 --dry-run",
        r"^(vaopd up .*--metrics-port) \d+": r"\1 0 --dry-run",
        r"^(vaopd up .*run\.name=first\b(?!.*--dry-run).*)": r"\1 --metrics-port 0",
        r"--resume runs/[\w-]+": "--resume runs/first",  # a copy of it under another name is refused
        r"^ *vaopd demo --variant va_opd .*\n": "",
    }
    for pattern, replacement in changes.items():
        command = re.sub(pattern, replacement, command, flags=re.M)
    return command


def prepare_runs(world: World, command: str) -> None:
    """Removes the run that a command makes; makes those that it reads, each a copy of the quick start's first run."""
    for name in re.findall(r"(?:run\.name=|--name )([\w-]+)", command.replace("$seed", "0")):
        shutil.rmtree(world.folder / "runs" / name, ignore_errors=True)
    kept = world.folder / "first_run"  # a later command may remove the run itself
    for name in re.findall(r"runs/([\w*-]+)", command):
        named = world.folder / "runs" / name.replace("*", "0")
        if ("vaopd up" in command and "--resume runs/" not in command) or named.exists():
            continue
        done = world.run_once(as_run(FIRST_RUN, world.teacher, world.api))
        assert done.returncode == 0, done.stderr
        if not kept.exists():
            shutil.copytree(world.folder / "runs" / "first", kept)
        shutil.copytree(kept, named, dirs_exist_ok=True)


def reason(command: str) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, command)), None)


RUNNABLE = [(block, command) for block, command in COMMANDS if reason(command) is None]
[FIRST_RUN] = [each for _, each in RUNNABLE if re.search(r"^vaopd up .*run\.name=first\b(?!.*--dry-run)", each)]


@pytest.mark.parametrize(
    ("block", "command"), RUNNABLE, ids=[f"{block.name} {command[:60]}" for block, command in RUNNABLE]
)
def test_a_command_does_what_it_says(world: World, block: Block, command: str) -> None:
    if re.match(r"vaopd (teacher|api) configs/tiny.toml\b", command):
        return  # the world's own teacher and API were started by these
    small = as_run(command, world.teacher, world.api)
    if small not in world.done:
        prepare_runs(world, command)
    done = world.run_once(small)
    assert done.returncode == 0, f"{block.name}: {command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("block", SCRIPTS, ids=lambda block: block.name)
def test_a_script_that_asks_a_server_runs(world: World, block: Block) -> None:
    text = block.text.replace("127.0.0.1:8080", world.api).replace("127.0.0.1:50051", world.teacher)
    (world.folder / "script.py").write_text(text)
    done = world.run("python script.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_reason_has_a_command() -> None:
    unused = [pattern for pattern in NOT_RUN if not any(re.search(pattern, command) for _, command in COMMANDS)]
    assert unused == []
    assert len(PAGES) > 15  # the pages were found at all
