"""The API's section of the service file, and the flags that it has replaced."""

from __future__ import annotations

import re
import ssl
from pathlib import Path

import httpx
import pytest

from tests.support.api import BODY, service_file, start_api
from tests.support.teacher import TeacherInProcess, write_config
from vaopd.access.certificates import make_certificates
from vaopd.access.keys import add_key
from vaopd_api.__main__ import main


def test_the_flags_that_the_service_file_has_replaced_still_work(teacher: TeacherInProcess, tmp_path: Path) -> None:
    """For one release, each with a line in the log that names the setting."""
    make_certificates(tmp_path)
    key = add_key(tmp_path / "keys.json", "geometry")
    values = {"--tls-cert": tmp_path / "server.pem", "--tls-key": tmp_path / "server.key"}
    values |= {"--keys": tmp_path / "keys.json", "--requests-per-minute": Path("3")}
    for api in start_api(tmp_path, teacher.target, *(str(part) for pair in values.items() for part in pair)):
        base = f"https://localhost:{api.http.base_url.port}"
        trusting = ssl.create_default_context(cafile=tmp_path / "ca.pem")
        right = {"Authorization": f"Bearer {key}"}
        assert httpx.post(f"{base}/v1/score", json=BODY, verify=trusting).status_code == 401
        scored = httpx.post(f"{base}/v1/score", json=BODY, headers=right, verify=trusting, timeout=60)
        assert (scored.status_code, scored.headers["ratelimit-limit"]) == (200, "3")
        log = (tmp_path / "api.log").read_text()
        assert [log.count(f"{flag} is now ") for flag in values] == [1, 1, 1, 1]


@pytest.mark.parametrize("broken", ["missing", "no PEM", "another key"])
def test_certificates_of_the_api_that_cant_be_used_are_named_in_one_line(
    tmp_path: Path, broken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_certificates(tmp_path)
    if broken == "missing":
        (tmp_path / "server.key").unlink()
    if broken == "no PEM":
        (tmp_path / "server.key").write_text("no PEM")
    if broken == "another key":
        (tmp_path / "client.key").replace(tmp_path / "server.key")
    service = service_file(tmp_path, '[api.tls]\ncert = "server.pem"\nkey = "server.key"\n')
    config = write_config(tmp_path, model=tmp_path)
    assert main(["--config", str(config), "--set", "api.address=127.0.0.1:0", *service]) == 2
    says = r"api: \[api\.tls\] cert = '.*server\.pem' and key = '.*server\.key' must be PEM files that belong together"
    assert re.search(says, capsys.readouterr().err)
