"""The API's section of the service file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.api import service_file
from tests.support.teacher import write_config
from vaopd.access.certificates import make_certificates
from vaopd_api.__main__ import main


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
