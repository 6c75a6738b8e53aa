"""What deploy/hardening.py finds wrong with a container; the containers themselves need an engine."""

from __future__ import annotations

from typing import Any

from tests.support.documents import script

hardening = script("deploy/hardening.py")

NONE, SOME = "0000000000000000", "00000000800405fb"
BACKEND = "vaopd_backend"


def status(*, uid: int = 10001, capabilities: str = NONE, no_new_privileges: int = 1, writable: str = "no") -> str:
    return (
        f"Name:\tsh\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\nCapPrm:\t{capabilities}\nCapEff:\t{capabilities}\n"
        f"CapBnd:\t{capabilities}\nNoNewPrivs:\t{no_new_privileges}\nwritable: {writable}\n"
    )


def container(service: str, *, network: str = BACKEND, **ports: str) -> dict[str, Any]:
    """`ports`: of the host, by the address they are published on."""
    return {
        "Config": {"Labels": {"com.docker.compose.service": service}},
        "NetworkSettings": {
            "Networks": {network: {}},
            "Ports": {"1/tcp": [{"HostIp": ip, "HostPort": port} for ip, port in ports.items()], "2/tcp": None},
        },
    }


def test_a_container_as_it_should_be() -> None:
    assert hardening.check_inside(status()) == []
    assert hardening.check_outside(container("redis"), {BACKEND}) == []
    assert hardening.check_outside(container("api", network="vaopd_frontend", **{"127.0.0.1": "8080"}), {BACKEND}) == []


def test_each_fault_inside_is_named() -> None:
    assert hardening.check_inside(status(uid=0)) == ["runs as root"]
    assert hardening.check_inside(status(capabilities=SOME))[0].startswith(f"has capabilities: CapPrm {SOME}")
    assert hardening.check_inside(status(no_new_privileges=0)) == ["may gain privileges"]
    assert hardening.check_inside(status(writable="yes")) == ["its root file system can be written"]


def test_a_port_for_everybody_is_named() -> None:
    assert hardening.check_outside(container("api", **{"0.0.0.0": "8080"}), {BACKEND}) == [
        "port 8080 is published on 0.0.0.0"
    ]


def test_redis_has_no_way_in() -> None:
    assert hardening.check_outside(container("redis", network="vaopd_frontend"), {BACKEND}) == [
        "is on network vaopd_frontend, which is not internal"
    ]
    assert hardening.check_outside(container("redis", **{"127.0.0.1": "6379"}), {BACKEND}) == ["publishes port 6379"]
