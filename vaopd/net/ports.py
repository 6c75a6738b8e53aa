"""Finds a free port, says why a port is not free, and makes room for connections."""

from __future__ import annotations

import ipaddress
import os
import resource
import socket

LOOPBACK = "127.0.0.1"
OWN_FILES = 512
"""Descriptors that a server needs beside its connections, at most."""


def free_port(host: str = LOOPBACK) -> int:
    """Returns a port that was free a moment ago; another process may take it before the caller does."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def find_port_problem(address: str) -> str | None:
    """Returns why this process can't listen on HOST:PORT, or None. Port 0 is always fine."""
    if "," in address:
        return "a teacher listens on one address; clients of running ones may be given several (--teacher)"
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            return error.strerror or str(error)
        except OverflowError:
            return "a port is a number from 0 to 65535"
    return None


def allow_connections(count: int) -> None:
    """Raises this process's limit of open files to what `count` connections need, as far as the account may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + OWN_FILES
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def count_open_files() -> int:
    """Returns the number of this process's open descriptors."""
    return len(os.listdir("/proc/self/fd"))


def is_loopback(address: str) -> bool:
    """Returns whether host:port is reachable from this host only.

    >>> is_loopback("[::1]:50051"), is_loopback("0.0.0.0:50051")
    (True, False)
    """
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
