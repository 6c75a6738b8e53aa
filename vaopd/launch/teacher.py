"""Describes the teacher to a launch: TLS, keys, its ranks, another teacher are named before anything waits for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vaopd.config import Config, ServiceConfig, TeacherServiceConfig, load_service_config
from vaopd.errors import ConfigError
from vaopd.launch.cards import check_gpus
from vaopd.launch.resume import check_same_teacher
from vaopd.process.ranks import check_copies, check_devices
from vaopd.vlm import memory


def describe_teacher(
    config: Config, address: str, *, resume: bool, accept_teacher: str | None, say: Callable[[str], None]
) -> None:
    """Says what the teacher at `address` serves. Raises an error that names what to set when it can't be used."""
    from vaopd.client.diagnosis import examine_teacher

    found = examine_teacher(address, job=config.run.name, payload=config.teacher.payload)
    for reason in found.absent.values():
        say(f"a replica is away, and is used once it is there: {reason}")
    if resume:
        check_same_teacher(config, found.description, address=address, accept_teacher=accept_teacher)
    say(f"teacher at {address}: {found.description.model}, revision {found.description.revision[:16]}")


def count_ranks(config: Config, service: TeacherServiceConfig, devices: str | None) -> int:
    """Returns how many ranks share a teacher with these CUDA_VISIBLE_DEVICES (None: not chosen)."""
    asked = config.teacher.processes
    if asked is None and devices and "device_map" not in config.teacher.model_fields_set:
        asked = devices.count(",") + 1
    return service.count_ranks(asked)


def check_ranks(config: Config, service: Path | None, gpus: Mapping[str, Sequence[str]], *, with_teacher: bool) -> None:
    """Raises ConfigError unless trainer and teachers have a device for each rank; a teacher heads for all of them, too.

    gpus: devices by role, where they are chosen. with_teacher: whether teachers are started.
    """
    for devices in gpus.get("trainer", ()):
        check_devices("trainer", config.trainer.processes, there=devices.count(",") + 1)
    per_copy = getattr(config.trainer.sharding, "ranks_per_copy", None)
    if per_copy is not None and config.trainer.processes > 1:  # one rank holds the student whole
        check_copies(config.trainer.processes, per_copy)
    if with_teacher:
        _check_teacher_ranks(config, service, gpus)
    check_gpus(config, gpus, with_teacher=with_teacher)


def _check_teacher_ranks(config: Config, service: Path | None, gpus: Mapping[str, Sequence[str]]) -> None:
    teacher = load_service_config(service).teacher
    for visible in gpus.get("teacher", ()) or (None,):
        ranks = count_ranks(config, teacher, visible)
        if visible and ranks not in (1, given := visible.count(",") + 1):
            raise ConfigError(
                f"--gpus teacher={visible}: teacher.processes = {ranks} needs a device for each rank, and {given} "
                f"{'is' if given == 1 else 'are'} given; give {ranks}, or --set teacher.processes={given}"
            )
        try:
            possible = memory.find_model(config.teacher.model).ranks
        except ConfigError:
            continue  # its sizes aren't known here; the teacher checks its heads before it loads
        if ranks not in (1, *possible):
            raise ConfigError(
                f"teacher.processes = {ranks} doesn't divide the {max(possible)} key and value heads of "
                f"{config.teacher.model}; --set teacher.processes={max(n for n in possible if n < ranks)}, or give the "
                f"teacher {', '.join(map(str, possible))} devices"
            )


def check_credentials(service: Path | None) -> None:
    """Raises ConfigError when a launch's trainer couldn't call the teacher that the launch starts."""
    if problem := find_credentials_problem(load_service_config(service)):
        raise ConfigError(problem)


def find_credentials_problem(services: ServiceConfig, environment: Mapping[str, str] = os.environ) -> str | None:
    """Returns what a launch's own trainer lacks to call the teacher that the launch starts, or None."""
    from vaopd.client.credentials import API_KEY_FILE, CA, CERT

    teacher = services.teacher
    if teacher.tls.cert is not None and not environment.get(CA):
        return (
            f"the service file gives the teacher a certificate, which the trainer can't check; set {CA} to the file of "
            "the authority that signed it"
        )
    if teacher.tls.cert is None and (environment.get(CA) or environment.get(CERT)):
        name = CA if environment.get(CA) else CERT
        return (
            f"{name} turns TLS on in the trainer, and the teacher that `up` starts has no certificate; unset it, or "
            "set cert and key in [teacher.tls] of the service file"
        )
    if teacher.tls.client_ca is not None and not environment.get(CERT):
        return (
            f"the service file lets the teacher ask for client certificates (client_ca); set {CERT} and its key's "
            "variable for the trainer"
        )
    if teacher.keys.file is not None and not environment.get(API_KEY_FILE):
        return (
            f"the service file gives the teacher API keys; set {API_KEY_FILE} to a file with this run's key (`vaopd "
            "keys add JOB` makes one)"
        )
    return None
