"""The service file: a section for each process; and the flags beside it."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from vaopd.config import (
    ApiServiceConfig,
    RolloutServiceConfig,
    ServiceConfig,
    TransformersBackend,
    VllmBackend,
    load_config,
    load_service_config,
)
from vaopd.errors import ConfigError
from vaopd.launch.supervisor import Supervisor
from vaopd.launch.up import UpOptions, _Launch
from vaopd.process.flags import Role, add_flags, to_argv

TINY = Path(__file__).parents[2] / "configs" / "tiny.toml"
EVERY_SECTION = """
[teacher]
stuck_after_s = 120
drain_s = 20
[teacher.engine]
backend = "vllm"
options = { max_model_len = 512 }
[teacher.sharing]
weights = { main = 3.0 }
[teacher.images]
vision_bytes = 0
[teacher.tls]
cert = "server.pem"
key = "server.key"
client_ca = "ca.pem"
[teacher.keys]
file = "keys.json"
[teacher.quotas]
groups_per_minute = 60
jobs = { main = 600 }

[rollout]
stuck_after_s = 900
drain_s = 5

[api]
stuck_after_s = 30
drain_s = 5
[api.tls]
cert = "api.pem"
key = "/etc/api.key"
[api.keys]
file = "api-keys.json"
[api.quotas]
requests_per_minute = 30
"""


@pytest.fixture
def service(tmp_path: Path) -> Path:
    return tmp_path / "service.toml"


def test_one_file_has_the_settings_of_every_process(service: Path, tmp_path: Path) -> None:
    service.write_text(EVERY_SECTION)
    settings = load_service_config(service)
    teacher, api = settings.teacher, settings.api
    assert (teacher.stuck_after_s, teacher.drain_s) == (120, 20)
    assert teacher.engine == VllmBackend(options={"max_model_len": 512})
    assert teacher.sharing.weights == {"main": 3.0}
    assert (teacher.tls.client_ca, teacher.keys.file) == (tmp_path / "ca.pem", tmp_path / "keys.json")
    assert (teacher.quotas.groups_per_minute, teacher.quotas.jobs) == (60, {"main": 600})
    assert settings.rollout == RolloutServiceConfig(stuck_after_s=900, drain_s=5)
    assert (api.stuck_after_s, api.drain_s, api.quotas.requests_per_minute) == (30, 5, 30)
    assert (api.tls.cert, api.tls.key) == (tmp_path / "api.pem", Path("/etc/api.key"))
    assert api.keys.file == tmp_path / "api-keys.json"


def test_without_a_file_each_process_has_its_defaults() -> None:
    assert load_service_config(None) == ServiceConfig()
    assert ServiceConfig().teacher.engine == TransformersBackend()
    sections = (ServiceConfig().teacher, RolloutServiceConfig(), ApiServiceConfig())
    limits = [(section.stuck_after_s, section.drain_s) for section in sections]
    assert limits == [(300, 60), (1800, 10), (60, 10)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[trainer]\nstuck_after_s = 1", "trainer: no such key; known here: teacher, rollout, api"),
        ("[rollout.keys]\nfile = 'k'", r"rollout\.keys: no such key; known here: stuck_after_s, drain_s"),
        ("[rollout]\nstuck_after_s = 0", r"rollout\.stuck_after_s: .*greater than 0, got 0"),
        ("[api.tls]\ncert = 'c'", r"api\.tls: cert and key go together"),
        ("[api.tls]\nclient_ca = 'c'", r"api\.tls\.client_ca: no such key; known here: cert, key"),
        ("[api.quotas]\nrequests_per_minute = 0", r"api\.quotas\.requests_per_minute: .*greater than 0"),
        ("[teacher.engine]\nbackend = 'tgi'", r"teacher\.engine\.backend: must be one of 'transformers', 'vllm'"),
        ("[teacher.engine]\nbackend = 'vllm'\nprocesses = 2", r"teacher\.engine: .* use options\.tensor_parallel_size"),
    ],
)
def test_what_a_section_does_not_know_is_refused(service: Path, text: str, message: str) -> None:
    service.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_service_config(service)


# -- flags -------------------------------------------------------------------------------------------------------------


def parsed(role: Role, *argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_flags(parser, role)
    return parser.parse_args(argv)


@pytest.mark.parametrize(
    ("role", "argv"),
    [
        ("trainer", ["--resume", "--metrics-address", "127.0.0.1:0", "--log-format", "json"]),
        ("teacher", ["--service", "s.toml", "--announce", "a"]),
        ("rollout", ["--service", "s.toml", "--worker", "w"]),
        ("api", ["--announce", "a", "--teacher", "one:1", "--teacher", "two:2", "--student", "m", "--runs", "r"]),
        ("api", []),
    ],
)
def test_flags_are_passed_on_as_they_were_given(role: Role, argv: list[str]) -> None:
    arguments = parsed(role, *argv)
    passed = to_argv(arguments, role)
    assert sorted(passed) == sorted(argv)
    assert parsed(role, *passed) == arguments


# -- `vaopd up` --------------------------------------------------------------------------------------------------------


def test_a_launch_gives_the_file_to_each_process_that_has_a_section(service: Path, tmp_path: Path) -> None:
    """A worker that may drain for 5 s is killed after 15 s. An API with keys has its metrics on a port of their own."""
    service.write_text("[rollout]\ndrain_s = 5\n[api.keys]\nfile = 'keys.json'\n")
    config = load_config(TINY, [f"run.folder={tmp_path}"])
    options = UpOptions(config_path=TINY, service=service, metrics_port=9091)
    supervisor = Supervisor(logs=tmp_path / "logs", say=lambda line: None)  # starts nothing by itself
    launch = _Launch(config, options, supervisor, lambda line: None)
    roles = ("teacher", "rollout", "api", "trainer")
    children = {role: launch._make_service(role, role, devices=None) for role in roles}
    given = {role for role, child in children.items() if str(service) in child.argv}
    assert given == {"teacher", "rollout", "api"}
    assert {role: child.grace_s for role, child in children.items()} == {
        "teacher": None,
        "rollout": 15,
        "api": None,
        "trainer": None,
    }
    assert "--metrics-address" in children["api"].argv
