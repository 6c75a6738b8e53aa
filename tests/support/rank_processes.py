"""Runs a module's `main` as the ranks of a process group: processes forked from one that has imported the module.

`python -m tests.support.rank_processes MODULE WORLD FOLDER ARGUMENT...` is that one: most of the time goes to imports.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from vaopd.net.ports import LOOPBACK, free_port

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600


def run_ranks(module: str, *arguments: object, world: int, folder: Path) -> tuple[list[int], str]:
    """Returns the exit codes of all ranks, and the end of what each said; none is left when this returns."""
    shared = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WORLD_SIZE": str(world)}
    meeting = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port())}
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, module, str(world), str(folder), *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | shared | meeting,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        codes, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    said = "\n".join((folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(world))
    return json.loads(codes), said


def fork_rank(rank: int, run: Callable[[], int]) -> int:
    """Forks one rank, which ends with what `run` returns, or with 1 if it raises -> its process id."""
    if child := os.fork():
        return child
    code = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        code = run()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(module: str, world: str, folder: str, *arguments: str) -> None:
    loaded = importlib.import_module(module)

    def run(rank: int) -> int:
        log = os.open(Path(folder) / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        loaded.main(*arguments)
        return 0

    ranks = [fork_rank(rank, functools.partial(run, rank)) for rank in range(int(world))]
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]))


if __name__ == "__main__":
    main(*sys.argv[1:])
