"""A host without IPv4, a network namespace here: what a launch starts by itself listens on ::1."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from tests.support.programs import find_program

REDIS = """
from vaopd.queue.connection import find_problem
from vaopd.queue.embedded import EmbeddedRedis
with EmbeddedRedis() as server:
    print(server.url.replace(str(server.port), "PORT"), find_problem(server.url))
"""
RANK = "import torch.distributed as dist; dist.init_process_group('gloo'); dist.barrier()"
RANKS = f"import sys, vaopd.process.ranks as r; print(r.launch([sys.executable, '-c', {RANK!r}], processes=2))"


def run_without_ipv4(program: str) -> str:
    ip = find_program("ip", package="iproute2")
    unshare = [find_program("unshare", package="util-linux"), "--user", "--map-root-user", "--net"]
    if not socket.has_ipv6 or subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this host has no IPv6, or its accounts make no namespaces")
    commands = f'{ip} link set lo up && {ip} address delete 127.0.0.1/8 dev lo && exec "$0" -c "$1"'
    made = [*unshare, "sh", "-c", commands, sys.executable, program]
    return subprocess.run(made, capture_output=True, text=True, check=True).stdout


def test_redis() -> None:
    assert run_without_ipv4(REDIS) == "redis://[::1]:PORT/0 None\n"


@pytest.mark.slow
def test_ranks_meet() -> None:
    """Whatever this host's name resolves to: here an address that the namespace hasn't got, or nothing."""
    assert run_without_ipv4(RANKS) == "0\n"
