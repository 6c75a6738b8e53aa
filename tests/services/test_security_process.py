"""A teacher as an operator runs it: its own process, a service file with TLS, client certificates and keys."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models import tiny_vlm
from tests.support.teacher import teacher_process, token_request, write_config
from vaopd.cli import main
from vaopd.client import SyncTeacherClient, from_environment
from vaopd.types import GroupScore
from vaopd_teacher.__main__ import main as teacher_main

ROOT = Path(__file__).parents[2]
SERVICE = """
[teacher.tls]
cert = "server.pem"
key = "server.key"
client_ca = "ca.pem"
[teacher.keys]
file = "keys.json"
"""


@pytest.mark.slow
def test_a_secured_teacher_serves_its_jobs_and_the_health_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["certs", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["keys", "add", "geometry", "--file", str(tmp_path / "keys.json")]) == 0
    (tmp_path / "api.key").write_text(capsys.readouterr().out)
    (tmp_path / "api.key").chmod(0o600)
    (tmp_path / "service.toml").write_text(SERVICE)
    variables = {
        "VAOPD_API_KEY_FILE": str(tmp_path / "api.key"),
        "VAOPD_TLS_CA": str(tmp_path / "ca.pem"),
        "VAOPD_TLS_CERT": str(tmp_path / "client.pem"),
        "VAOPD_TLS_KEY": str(tmp_path / "client.key"),
    }
    launch = ("-m", "vaopd_teacher", "--service", str(tmp_path / "service.toml"))
    with teacher_process(tmp_path, launch=launch) as teacher:
        with SyncTeacherClient(teacher.target, job="geometry", **from_environment(variables)) as client:
            (result,) = client.score([token_request(tiny_vlm(), "g")])
        check = [sys.executable, str(ROOT / "deploy" / "health.py"), "grpc", teacher.target]
        healthy = subprocess.run(check, env=os.environ | variables, check=False).returncode == 0
        without = subprocess.run(check, env=os.environ.copy(), check=False).returncode == 0
    assert isinstance(result, GroupScore)
    assert (healthy, without) == (True, False)
    log = (tmp_path / "teacher.log").read_text()
    assert (tmp_path / "api.key").read_text().strip().split("_", 2)[2] not in log


def test_what_is_wrong_with_its_security_is_told_before_the_model_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model's folder isn't even there."""
    (tmp_path / "service.toml").write_text('[teacher.keys]\nfile = "keys.json"')
    config = str(write_config(tmp_path, model=tmp_path / "nowhere"))
    assert teacher_main(["--config", config, "--set", "teacher.address=0.0.0.0:0"]) == 2
    assert "'0.0.0.0:0' can be reached from other hosts: give [teacher.tls] cert and key" in capsys.readouterr().err
    assert teacher_main(["--config", config, "--service", str(tmp_path / "service.toml")]) == 2
    assert "keys.json' can't be read" in capsys.readouterr().err
