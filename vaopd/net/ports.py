"""Finds a free port, says why a port is not free, and makes room for connections."""

from __future__ import annotations

import ipaddress
import os
import resource
import socket

OWN_FILES = 512
"""Descriptors that a server needs beside its connections, at most."""


def free_port(host: str | None = None) -> int:
    """Returns a port of LOOPBACK, or of `host`, that was free a moment ago; another process may take it meanwhile."""
    with _bind(host or LOOPBACK, 0) as probe:
        return int(probe.getsockname()[1])


def join_address(host: str, port: int) -> str:
    """Returns HOST:PORT.

    >>> join_address("::1", 50051)
    '[::1]:50051'
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def find_port_problem(address: str) -> str | None:
    """Returns why this process can't listen on HOST:PORT, or None. Port 0 is always fine."""
    if "," in address:
        return "a teacher listens on one address; clients of running ones may be given several (--teacher)"
    host, _, port = address.rpartition(":")
    try:
        _bind(host.strip("[]"), int(port)).close()
    except OSError as error:
        return error.strerror or str(error)
    except OverflowError:
        return "a port is a number from 0 to 65535"
    return None


def _bind(host: str, port: int) -> socket.socket:
    probe = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
    except BaseException:
        probe.close()
        raise
    return probe


LOOPBACK = "::1" if find_port_problem("127.0.0.1:0") and not find_port_problem("[::1]:0") else "127.0.0.1"
"""This host's own address; ::1 where it has no IPv4."""


def find_free_address(address: str) -> str:
    """Returns HOST:0 for HOST:PORT, or for a host whose address this one hasn't got, LOOPBACK's."""
    same = f"{address.rpartition(':')[0]}:0"
    return join_address(LOOPBACK, 0) if find_port_problem(same) else same


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
