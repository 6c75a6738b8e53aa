"""docker-compose.yml keeps to the security baseline and to what the processes need of each other; read, not run."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from vaopd.client import credentials
from vaopd.config import load_config, load_service_config

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SECURED: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "secured.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
GPU_ROLES = ("gpu-teacher", "gpu-rollout", "gpu-trainer", "gpu-second-rollout", "gpu-second-trainer")


def in_profile(profile: str) -> set[str]:
    return {name for name, service in SERVICES.items() if profile in service["profiles"]}


def commands() -> Iterator[tuple[str, list[str]]]:
    """Each service that runs `vaopd ROLE CONFIG --set …`, with its words."""
    for name, service in SERVICES.items():
        if name not in ("redis", "data", *in_profile("monitoring")):
            yield name, shlex.split(service["command"])


def sources(service: dict[str, Any]) -> dict[str, str]:
    """Mounted volume or folder -> place in the container."""
    return {mount.split(":")[0]: mount.split(":")[1] for mount in service.get("volumes", [])}


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_without_rights(name: str) -> None:
    service = SERVICES[name]
    assert service["user"] == "10001:10001"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "pid", "ipc", "network_mode", "devices"} & set(service)


def test_redis_is_on_an_internal_network_only_and_publishes_nothing() -> None:
    assert SERVICES["redis"]["networks"] == ["backend"]
    assert COMPOSE["networks"]["backend"] == {"internal": True}
    assert "ports" not in SERVICES["redis"]


def test_redis_keeps_everything() -> None:
    words = shlex.split(SERVICES["redis"]["command"])
    assert words[words.index("--maxmemory-policy") + 1] == "noeviction"
    assert words[words.index("--appendonly") + 1] == "yes"
    assert sources(SERVICES["redis"])["queue"] == words[words.index("--dir") + 1]


def test_only_the_api_and_the_dashboard_are_published_and_only_to_this_host() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"api", "gpu-api", "grafana"}
    for ports in published.values():
        assert [port.split(":")[0] for port in ports] == ["127.0.0.1"]


def test_images_and_code_cant_be_written_and_secrets_are_nowhere_in_the_environment() -> None:
    places = {
        "/queue",
        "/runs",
        "/datasets",
        "/cache",
        "/app/configs",
        "/app/service.toml",
        "/data",
        "/var/lib/grafana",
    }
    for service in SERVICES.values():
        for volume, place in sources(service).items():
            assert place in places or volume.startswith("./deploy/monitoring/")
        assert all(mount.endswith(":ro") for mount in service.get("volumes", ()) if mount.startswith("./"))
        assert not [name for name in service.get("environment", ()) if re.search("KEY|SECRET|PASS|TOKEN", name)]


def test_metrics_are_on_an_internal_network_where_prometheus_asks_for_them() -> None:
    assert COMPOSE["networks"]["metrics"] == {"internal": True}
    assert SERVICES["prometheus"]["networks"] == ["metrics"]
    config = yaml.safe_load((ROOT / "deploy" / "monitoring" / "prometheus.yml").read_text())
    asked = [found for job in config["scrape_configs"] for found in job["dns_sd_configs"]]
    served = {name for name, _ in commands()}
    assert {name for found in asked for name in found["names"]} == served
    for name in served:
        assert "metrics" in SERVICES[name]["networks"]
        _, port = SERVICES[name]["environment"]["VAOPD_METRICS_ADDRESS"].split(":")
        assert {found["port"] for found in asked} == {int(port)}


def test_the_second_job_is_watched_too() -> None:
    """Its environment replaces the first one's, so that the address must be there again."""
    for name in ("second-trainer", "gpu-second-rollout"):
        assert {"VAOPD_METRICS_ADDRESS", "VAOPD_LOG_FORMAT"} <= set(SERVICES[name]["environment"])


def service_file(words: list[str]) -> str:
    return words[words.index("--service") + 1]


@pytest.mark.parametrize("name", [name for name in SERVICES if name.endswith(("teacher", "rollout", "api"))])
def test_every_process_with_settings_reads_the_one_service_file(name: str) -> None:
    assert service_file(shlex.split(SERVICES[name]["command"])) == "service.toml"
    assert sources(SERVICES[name])["./deploy/service.toml"] == "/app/service.toml"


@pytest.mark.parametrize("name", ["teacher", "gpu-teacher"])
def test_a_teacher_without_tls_is_one_whose_port_is_not_published(name: str) -> None:
    assert load_service_config(ROOT / "deploy" / "service.toml").teacher.tls.plaintext
    assert "ports" not in SERVICES[name]


@pytest.mark.parametrize("name", ["teacher", "gpu-teacher"])
def test_the_secured_teacher_differs_in_its_service_file_only(name: str) -> None:
    plain, secured = (shlex.split(services[name]["command"]) for services in (SERVICES, SECURED["services"]))
    assert [word.replace("service.secured.toml", "service.toml") for word in secured] == plain
    assert sources(SECURED["services"][name]) == {
        "./deploy/service.secured.toml": "/app/service.secured.toml",
        "./secrets/teacher": "/secrets",
    }
    service = load_service_config(ROOT / "deploy" / "service.secured.toml").teacher
    files = (service.tls.cert, service.tls.key, service.tls.client_ca, service.keys.file)
    assert all(file is not None and file.parent == Path("/secrets") for file in files)


def test_every_client_of_the_secured_teacher_has_its_secrets_as_files() -> None:
    clients = {name for name in SERVICES if name.endswith(("trainer", "api"))}
    assert clients == {name for name in SECURED["services"] if not name.endswith("teacher")}
    names = {credentials.API_KEY_FILE, credentials.CA, credentials.CERT, credentials.KEY}
    for name in clients:
        client = SECURED["services"][name]
        given = {secret if isinstance(secret, str) else secret["target"] for secret in client["secrets"]}
        assert {variable: Path(file).parent for variable, file in client["environment"].items()} == dict.fromkeys(
            names, Path("/run/secrets")
        )
        assert {Path(file).name for file in client["environment"].values()} == given
        used = {secret if isinstance(secret, str) else secret["source"] for secret in client["secrets"]}
        assert used <= set(SECURED["secrets"])


def test_securing_takes_nothing_of_the_hardening_away() -> None:
    for service in SECURED["services"].values():
        assert set(service) <= {"command", "volumes", "environment", "secrets"}


def test_profiles_hold_the_whole_system() -> None:
    assert in_profile("cpu") == {"redis", "data", "teacher", "rollout", "trainer", "api"}
    assert in_profile("gpu") == {"redis", "gpu-teacher", "gpu-rollout", "gpu-trainer", "gpu-api"}
    # A further job shares Redis and the teacher; Compose starts what is not there yet.
    assert in_profile("second-job") == {"redis", "data", "teacher", "second-rollout", "second-trainer"}
    assert in_profile("monitoring") == {"prometheus", "grafana"}
    assert in_profile("gpu-second-job") == {"redis", "gpu-teacher", "gpu-second-rollout", "gpu-second-trainer"}


def test_whatever_a_service_depends_on_is_in_its_profiles() -> None:
    for service in SERVICES.values():
        for needed in service.get("depends_on", ()):
            assert set(service["profiles"]) <= set(SERVICES[needed]["profiles"])


def test_each_gpu_role_reserves_devices_of_its_own() -> None:
    reserved = []
    for name in GPU_ROLES:
        (device,) = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia"
        assert device["capabilities"] == ["gpu"]
        reserved += device["device_ids"]
    assert reserved == [
        "${VAOPD_TEACHER_GPUS:-0}",
        "${VAOPD_ROLLOUT_GPUS:-1}",
        "${VAOPD_TRAINER_GPUS:-2}",
        "${VAOPD_SECOND_ROLLOUT_GPUS:-3}",
        "${VAOPD_SECOND_TRAINER_GPUS:-4}",
    ]


@pytest.mark.parametrize("kind", ["", "second-", "gpu-", "gpu-second-"])
def test_worker_and_trainer_of_a_job_share_its_snapshots_and_its_name(kind: str) -> None:
    settings = []
    for role in ("rollout", "trainer"):
        assert sources(SERVICES[kind + role])["runs"] == "/runs"
        words = shlex.split(SERVICES[kind + role]["command"])
        settings.append({word for word in words if word.startswith(("run.", "queue."))})
    assert settings[0] == settings[1]
    assert any(setting.startswith("run.name=") for setting in settings[0])


def test_every_command_gives_settings_that_the_configuration_knows() -> None:
    for name, words in commands():
        config = "geometry3k-4b.toml" if name.startswith("gpu-") else "tiny.toml"
        assert words[1] == f"${{VAOPD_CONFIG:-configs/{config}}}"
        overrides = [word for before, word in itertools.pairwise(words) if before == "--set"]
        # A variable's default stands for its value: ${VAOPD_RUN:-tiny} -> tiny
        plain = [word.split("${")[0] + word.split(":-")[1].rstrip("}") if "${" in word else word for word in overrides]
        load_config(ROOT / "configs" / config, plain)


@pytest.mark.parametrize(
    "dockerfile", ["cpu.Dockerfile", "gpu.Dockerfile", "redis.Dockerfile", "monitoring/prometheus.Dockerfile"]
)
def test_every_image_runs_without_root_by_itself(dockerfile: str) -> None:
    lines = (ROOT / "deploy" / dockerfile).read_text().splitlines()
    assert [line for line in lines if line.startswith("USER")][-1] == "USER 10001:10001"


@pytest.fixture
def vaopd_that_echoes(tmp_path: Path) -> Path:
    """A folder for PATH whose `vaopd` prints its arguments."""
    program = tmp_path / "bin" / "vaopd"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    return program.parent


@pytest.mark.parametrize(
    ("begun", "started"),
    [(False, "train tiny.toml --set trainer.steps=6"), (True, "train tiny.toml --resume --set trainer.steps=6")],
)
def test_a_restarted_trainer_goes_on_with_its_run(
    tmp_path: Path, vaopd_that_echoes: Path, begun: bool, started: str
) -> None:
    if begun:
        (tmp_path / "metrics.jsonl").touch()
    environment = {
        "PATH": f"{vaopd_that_echoes}:/usr/bin:/bin",
        "VAOPD_RUN_FOLDER": str(tmp_path),
        "VAOPD_OPTIONS": "--set trainer.steps=6",
    }
    done = subprocess.run(
        ["sh", str(ROOT / "deploy" / "entrypoint.sh"), "train", "tiny.toml"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == started
