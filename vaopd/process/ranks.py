"""Starts a service's ranks on one host and exits as they do.

`torchrun` would turn every exit code but 0 into 1. Ranks on several hosts are started by it all the same: where RANK is
set, this module isn't used.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from vaopd.errors import ConfigError
from vaopd.net.ports import LOOPBACK, free_port
from vaopd.process.entry import UNAVAILABLE

GRACE_S = 15.0  # less than the time that `vaopd up` leaves between SIGTERM and SIGKILL
_POLL_S = 0.05
_PR_SET_PDEATHSIG = 1


def launch(argv: Sequence[str], *, processes: int) -> int:
    """Runs `argv` once per rank, forwards SIGTERM and SIGINT, and returns 0 or the first other code.

    When a rank fails, the others are ended, which would wait for it for ever. −n stands for a death by signal n.
    """
    # By gloo's default they would meet at the address that this host's name resolves to, if it does.
    shared = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    ranks: list[subprocess.Popen[bytes]] = []
    # SIGINT from a terminal reaches the ranks by itself, since they are in its process group; twice does no harm.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: _pass_on(number, ranks))
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
        ranks.append(subprocess.Popen(argv, env={"GLOO_SOCKET_IFNAME": "lo", **os.environ, **shared, **place}))
    while True:
        codes = [rank.poll() for rank in ranks]
        if failures := [(code == UNAVAILABLE, rank, code) for rank, code in enumerate(codes) if code]:
            # Of several at once, one that misses another rank is not the first.
            _, rank, failed = min(failures)
            how = f"by {signal.Signals(-failed).name}" if failed < 0 else f"with status {failed}"
            print(f"rank {rank} ended first, {how}", file=sys.stderr, flush=True)
            _end(ranks)
            return failed
        if None not in codes:
            return 0
        time.sleep(_POLL_S)


def _pass_on(number: int, ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        rank.send_signal(number)


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Lets each rank finish its checkpoint for GRACE_S, then kills it."""
    deadline = time.monotonic() + GRACE_S
    for rank in ranks:
        rank.terminate()
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


def die_as(code: int) -> int:
    """Returns an exit code; for −n it dies of signal n instead, so that the parent process sees how a rank ended."""
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def check_devices(role: str, processes: int, *, there: int) -> None:
    """Raises ConfigError unless each of this host's ranks has a GPU; there: those that this process sees, maybe none.

    Two ranks on one card would fail later, in NCCL and without a name.
    """
    here = min(processes, int(os.environ.get("LOCAL_WORLD_SIZE", processes)))
    if 0 < there < here:
        raise ConfigError(
            f"{role}.processes = {processes} needs a GPU for each rank, and this process sees {there}; give it as "
            f"many (`vaopd up --gpus`, CUDA_VISIBLE_DEVICES, VAOPD_{role.upper()}_GPUS), or --set "
            f"{role}.processes={there}"
        )


def check_copies(ranks: int, per_copy: int) -> None:
    """Raises ConfigError for ranks of a sharded student that are no whole number of copies."""
    if ranks % per_copy:
        raise ConfigError(
            f"trainer.sharding.ranks_per_copy = {per_copy}: {ranks} ranks are no whole number of copies; set "
            f"trainer.processes to a multiple of {per_copy}, or another ranks_per_copy"
        )


def end_with_the_launcher() -> None:
    """Asks the kernel, on Linux, to send this rank SIGTERM when the launcher is gone, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
