"""Installs and calls the official evaluator: a subprocess in an environment of its own, never imported.

The contract is the tasks that vlmeval_runner.py lists; `--evaluator` may name another program with it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from vaopd.errors import ChildFailed, ConfigError
from vaopd.files.durable import write_atomic
from vaopd.launch.supervisor import Child, Supervisor
from vaopd.vlm import torchvision_compat

REQUIREMENTS = ("ms-vlmeval==0.0.20", "pandas<3")
"""VLMEvalKit; docs/decisions says why. Its WeMath calls `DataFrame._append`, which pandas 3 no longer has."""
SHARED = re.compile(r"torch|torchvision|triton|(nvidia|cuda)[-_].+")
"""Packages that the evaluator takes from this interpreter: several GB with CUDA, and a CPU build stays one."""

_RUNNER = Path(__file__).with_name("vlmeval_runner.py")
_MARK = "vaopd-installed.txt"
_LIBRARIES = "libgl1 libglib2.0-0 libcairo2"
"""Debian's names of what the evaluator's own packages load: OpenCV and Cairo."""
_NAME = "evaluator"


@dataclass(frozen=True, kw_only=True, slots=True)
class Judge:
    """An OpenAI-compatible judge, e.g. http://127.0.0.1:8000/v1; its key is in OPENAI_API_KEY."""

    url: str
    model: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluator:
    """How to start the evaluator. command: up to the file of tasks. data: the folder of its data sets."""

    command: Sequence[str]
    data: Path
    logs: Path
    say: Callable[[str], None]

    def run(self, tasks: Sequence[dict[str, Any]]) -> None:
        """Has the tasks done in one process, which loads slowly. Raises ChildFailed with the end of its log."""
        if not tasks:
            return
        for folder in (self.data, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        file = self.logs / "tasks.jsonl"
        write_atomic(file, "".join(json.dumps(task) + "\n" for task in tasks))
        # Our own packages must not be found there: it pins others.
        environment = {"PYTHONPATH": "", "LMUData": str(self.data)}
        child = Child(name=_NAME, argv=(*self.command, str(file)), environment=environment, restarts=0)
        with Supervisor(logs=self.logs, say=self.say) as supervisor:
            supervisor.start(child)
            if code := supervisor.run_until_exit(_NAME):
                raise ChildFailed(f"the evaluator ended with code {code}; {supervisor.log_tail(_NAME)}")
        if missing := [task["out"] for task in tasks if not os.path.exists(task["out"])]:
            raise ChildFailed(f"the evaluator wrote no {missing[0]}; see {self.logs / _NAME}.log")


def find_command(environment: Path) -> list[str]:
    """Returns the command of the installed evaluator; raises ConfigError where it isn't, or is another version."""
    mark = environment / _MARK
    if not mark.exists() or mark.read_text().split() != list(REQUIREMENTS):
        wanted = " ".join(REQUIREMENTS)
        raise ConfigError(f"no {wanted} in {environment}; `vaopd eval --install` installs it (docs/benchmarks.md)")
    return [str(environment / "bin" / "python"), str(_RUNNER)]


def install(environment: Path, *, say: Callable[[str], None]) -> None:
    """Replaces the evaluator's environment and tries it. Raises ConfigError, with the remedy, where that fails."""
    say(f"installing {' '.join(REQUIREMENTS)} into {environment}: 1.5 GB, and 5 GB more if it needs a torch of its own")
    python = str(environment / "bin" / "python")
    _run("on Debian or Ubuntu: apt install python3-venv", sys.executable, "-m", "venv", "--clear", str(environment))
    if shared := share_torch(environment):
        say(f"shared with {sys.prefix}: {', '.join(shared)}")
    _run("see pip's message", python, "-m", "pip", "install", *REQUIREMENTS)
    _run(f"if a library is missing, on Debian or Ubuntu: apt install {_LIBRARIES}", python, str(_RUNNER), os.devnull)
    (environment / _MARK).write_text("\n".join(REQUIREMENTS))
    say("installed")


def _run(remedy: str, *argv: str) -> None:
    if code := subprocess.run(argv, check=False).returncode:
        raise ConfigError(f"`{' '.join(argv)}` ended with code {code}; {remedy}. Then run `vaopd eval --install` again")


def share_torch(environment: Path) -> list[str]:
    """Lets the environment import this interpreter's torch; returns the names of the shared packages.

    By links in a folder at the end of its path: pip takes them for installed, and never removes what lies outside.
    """
    (site,) = environment.glob("lib/python*/site-packages")
    folder = environment / "shared"
    folder.mkdir()
    names = set()
    for package in distributions():
        if SHARED.fullmatch(name := package.name.lower()) and name not in names:
            names.add(name)
            tops = {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}
            for top in tops:
                if not (folder / top).exists():
                    (folder / top).symlink_to(Path(str(package.locate_file(top))))
    if names:
        shutil.copy(torchvision_compat.__file__, folder / "vaopd_torchvision.py")
        (site / "vaopd-shared.pth").write_text(f"{folder}\nimport vaopd_torchvision; vaopd_torchvision.install()\n")
    return sorted(names)
