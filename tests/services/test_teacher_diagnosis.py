"""What is said of a teacher that can't be used: at once, by its name, with what to set."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
import uvicorn

from tests.support.data_sets import write_both_splits
from tests.support.models import model_folder, tiny_vlm
from tests.support.teacher import teacher_in_process
from tests.support.waiting import wait_until
from vaopd.access.certificates import make_certificates
from vaopd.access.keys import add_key
from vaopd.access.tls import ExpiryWatch, read_expiry
from vaopd.cli import main
from vaopd.client import SyncTeacherClient, from_environment
from vaopd.client.diagnosis import examine_teacher, wait_for_teacher
from vaopd.config import (
    ApiConfig,
    ApiServiceConfig,
    Config,
    DataConfig,
    KeysConfig,
    TeacherServiceConfig,
    TeacherTlsConfig,
    TlsConfig,
)
from vaopd.config.method import HiddenTeacher
from vaopd.errors import (
    ConfigError,
    Mismatch,
    PermissionDenied,
    TlsRefused,
    Unauthenticated,
    Unavailable,
    VaopdError,
)
from vaopd.launch.teacher import find_credentials_problem
from vaopd_api import __main__ as api_main
from vaopd_api.metrics import Metrics
from vaopd_teacher.rpc.tls import make_server_credentials


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    make_certificates(folder)
    return folder


def serve(folder: Path, *, mutual: bool) -> TeacherServiceConfig:
    authority = folder / "ca.pem" if mutual else None
    tls = TeacherTlsConfig(cert=folder / "server.pem", key=folder / "server.key", client_ca=authority)
    return TeacherServiceConfig(tls=tls)


@pytest.fixture(scope="module")
def with_tls(certificates: Path) -> Iterator[str]:
    with teacher_in_process(tiny_vlm(), service=serve(certificates, mutual=False)) as teacher:
        yield teacher.target


@pytest.fixture(scope="module")
def with_mtls(certificates: Path) -> Iterator[str]:
    with teacher_in_process(tiny_vlm(), service=serve(certificates, mutual=True)) as teacher:
        yield teacher.target


@pytest.fixture(scope="module")
def plain() -> Iterator[str]:
    with teacher_in_process(tiny_vlm()) as teacher:
        yield teacher.target


@pytest.fixture
def nobody() -> Iterator[str]:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


def trust(folder: Path, *, client: Path | None = None) -> dict[str, str]:
    own = {"VAOPD_TLS_CERT": str(client / "client.pem"), "VAOPD_TLS_KEY": str(client / "client.key")} if client else {}
    return {"VAOPD_TLS_CA": str(folder / "ca.pem"), **own}


def refusal(target: str, error: type[VaopdError], environment: dict[str, str], job: str = "geometry") -> str:
    with pytest.raises(error) as refused:
        examine_teacher(target, job=job, environment=environment)
    return str(refused.value)


def test_a_teacher_that_fits_describes_itself(plain: str, with_tls: str, with_mtls: str, certificates: Path) -> None:
    for target, environment in (
        (plain, {}),
        (with_tls, trust(certificates)),
        (with_mtls, trust(certificates, client=certificates)),
    ):
        found = examine_teacher(target, job="geometry", environment=environment)
        assert found.description.model == "tiny-teacher"
        assert found.absent == {}


def test_no_teacher_there(nobody: str) -> None:
    told = refusal(nobody, Unavailable, {})
    assert told.startswith(f"no teacher listens at {nobody} (Connection refused); start it there")


def test_one_of_two_replicas_is_enough_and_the_other_is_named(plain: str, nobody: str) -> None:
    found = examine_teacher(f"{nobody},{plain}", job="geometry", environment={})
    assert list(found.absent) == [nobody]
    assert "no teacher listens" in found.absent[nobody]


def test_tls_on_one_side_only(plain: str, with_tls: str, certificates: Path) -> None:
    assert "speaks TLS, and this process plain text; set VAOPD_TLS_CA" in refusal(with_tls, ConfigError, {})
    told = refusal(plain, ConfigError, trust(certificates))
    assert "speaks plain text, and VAOPD_TLS_CA turns TLS on here; unset it" in told


def test_another_authority(with_tls: str, with_mtls: str, certificates: Path, tmp_path: Path) -> None:
    make_certificates(tmp_path)
    assert "is refused: " in refusal(with_tls, ConfigError, trust(tmp_path))
    assert "VAOPD_TLS_CA must name the authority" in refusal(with_tls, ConfigError, trust(tmp_path))
    assert "wants a client's certificate" in refusal(with_mtls, ConfigError, trust(certificates))
    told = refusal(with_mtls, ConfigError, trust(certificates, client=tmp_path))
    assert "refuses the certificate of VAOPD_TLS_CERT" in told


def test_a_client_with_all_its_patience_hears_of_tls_at_once(
    plain: str, with_tls: str, with_mtls: str, certificates: Path, tmp_path: Path
) -> None:
    make_certificates(tmp_path)
    ours, foreign = from_environment(trust(certificates)), from_environment(trust(tmp_path))
    for target, credentials, words in (
        (with_tls, {}, "it speaks TLS, and this client plain text; set VAOPD_TLS_CA"),
        (plain, ours, "it speaks plain text"),
        (with_tls, foreign, "unable to get local issuer certificate"),
        (with_mtls, ours, "wants one; set VAOPD_TLS_CERT and VAOPD_TLS_KEY"),
    ):
        with (
            SyncTeacherClient(target, job="geometry", patience_s=3600.0, **credentials) as client,
            pytest.raises(TlsRefused, match=f"TLS with the teacher at {target} failed: .*{words}"),
        ):
            client.describe()


def make_expired(folder: Path) -> None:
    now = datetime.now(UTC)
    old = trustme.CA().issue_cert("localhost", not_before=now - timedelta(days=9), not_after=now - timedelta(days=1))
    old.cert_chain_pems[0].write_to_path(folder / "server.pem")
    old.private_key_pem.write_to_path(folder / "server.key")


def test_a_server_says_that_its_certificate_has_expired(
    tmp_path: Path, certificates: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_expired(tmp_path)
    with pytest.raises(ConfigError, match=r"\[teacher\.tls\] cert = .*server\.pem'.*expired; renew it"):
        make_server_credentials(serve(tmp_path, mutual=False).tls, "localhost:0")
    # Thirty days are left, and later one, and later none.
    expires = read_expiry(certificates / "server.pem", certificates / "server.key", section="teacher")
    assert expires == pytest.approx(time.time() + 30 * 86_400, abs=600)  # since the module's first test
    for left_s in (8 * 86_400, 86_400, -1):
        ExpiryWatch(time.time() + left_s, section="teacher").look()
    soon, over = caplog.messages
    assert "[teacher.tls] expires in 1.0 days" in soon
    assert "[teacher.tls] has expired: clients refuse it; renew it" in over


def test_the_api_says_it_of_its_own_certificate_too(
    tmp_path: Path, certificates: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It doesn't start with an expired one; that one has expired at work is said at once, though it was said before."""

    def serve_with(folder: Path) -> None:
        config = Config.model_construct(
            api=ApiConfig(address="127.0.0.1:0"),
            teacher=HiddenTeacher.model_construct(address="127.0.0.1:1"),
            data=DataConfig.model_construct(min_pixels=None, max_pixels=None),
        )
        service = ApiServiceConfig(tls=TlsConfig(cert=folder / "server.pem", key=folder / "server.key"))
        api_main.serve(config, service=service, announce=None, metrics=Metrics(), metrics_route=False)

    def tick(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        for now in (expires - 86_400, expires + 1):
            monkeypatch.setattr("vaopd.access.tls.time.time", lambda: now)  # noqa: B023
            asyncio.run(server.on_tick(1))
        sockets[0].close()

    make_expired(tmp_path)
    with pytest.raises(ConfigError, match=r"\[api\.tls\] cert = .*server\.pem'.*expired; renew it"):
        serve_with(tmp_path)
    expires = read_expiry(certificates / "server.pem", certificates / "server.key", section="api")
    monkeypatch.setattr(uvicorn.Server, "run", tick)
    serve_with(certificates)
    soon, over = (line for line in caplog.messages if "certificate" in line)
    assert "[api.tls] expires in 1.0 days" in soon
    assert "[api.tls] has expired: clients refuse it; renew it" in over


def test_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vaopd.audit")
    store = tmp_path / "keys.json"
    files = {job: tmp_path / job for job in ("geometry", "other", "unknown")}
    for job in ("geometry", "other"):
        files[job].write_text(add_key(store, job))
    files["unknown"].write_text(add_key(tmp_path / "elsewhere.json", "geometry"))
    for file in files.values():
        file.chmod(0o600)
    with teacher_in_process(tiny_vlm(), service=TeacherServiceConfig(keys=KeysConfig(file=store))) as teacher:
        told = refusal(teacher.target, Unauthenticated, {})
        assert "set VAOPD_API_KEY_FILE to a file with the key of job 'geometry'" in told
        told = refusal(teacher.target, Unauthenticated, {"VAOPD_API_KEY_FILE": str(files["unknown"])})
        assert "the file of VAOPD_API_KEY_FILE needs to hold the key of job 'geometry'" in told
        told = refusal(teacher.target, PermissionDenied, {"VAOPD_API_KEY_FILE": str(files["other"])})
        assert "the key in the file of VAOPD_API_KEY_FILE is another job's than 'geometry'" in told
        # A client that fits leaves no refused call behind, which its team's usage would count.
        caplog.clear()
        examine_teacher(teacher.target, job="geometry", environment={"VAOPD_API_KEY_FILE": str(files["geometry"])})
        assert caplog.messages == []


def test_a_payload_that_it_does_not_offer(plain: str) -> None:
    with pytest.raises(Mismatch, match=r"teacher\.payload = nothing: the teacher at .* offers none, hidden, "):
        examine_teacher(plain, job="geometry", payload="nothing", environment={})  # type: ignore[arg-type]


def test_a_wait_ends_when_the_teacher_comes_and_at_once_when_it_can_not_be_used(
    nobody: str, with_tls: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vaopd.client.diagnosis.AGAIN_S", 0.05)
    for name in ("VAOPD_TLS_CA", "VAOPD_TLS_CERT", "VAOPD_API_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="speaks TLS"):
        wait_for_teacher(with_tls, job="geometry")
    with pytest.raises(Unavailable, match="no teacher listens"):
        wait_for_teacher(nobody, job="geometry", patience_s=0.0)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
    looked = threading.Event()
    found: list[str] = []

    def wait() -> None:
        found.append(wait_for_teacher(address, job="geometry", check=looked.set).description.model)

    waiting = threading.Thread(target=wait)
    waiting.start()
    wait_until("it has looked once", looked.is_set)
    with teacher_in_process(tiny_vlm(), address=address):
        waiting.join(60)
    assert found == ["tiny-teacher"]


def test_what_up_s_own_trainer_lacks(certificates: Path, tmp_path: Path) -> None:
    from vaopd.config import ServiceConfig

    def problem(service: TeacherServiceConfig, environment: dict[str, str]) -> str:
        return find_credentials_problem(ServiceConfig(teacher=service), environment) or ""

    assert problem(TeacherServiceConfig(), {}) == ""
    assert "set VAOPD_TLS_CA" in problem(serve(certificates, mutual=False), {})
    assert problem(serve(certificates, mutual=False), trust(certificates)) == ""
    assert "VAOPD_TLS_CA turns TLS on in the trainer" in problem(TeacherServiceConfig(), trust(certificates))
    assert "set VAOPD_TLS_CERT" in problem(serve(certificates, mutual=True), trust(certificates))
    add_key(tmp_path / "keys.json", "geometry")
    keys = TeacherServiceConfig(keys=KeysConfig(file=tmp_path / "keys.json"))
    assert "set VAOPD_API_KEY_FILE" in problem(keys, {})


@pytest.fixture
def config(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    write_both_splits(data)
    path = tmp_path / "run.toml"
    path.write_text(
        f'[run]\nname = "first"\nfolder = "{tmp_path / "runs"}"\n[data]\nsource = "{data}"\n'
        f'[student]\nmodel = "{model_folder("student")}"\n[teacher]\nmodel = "{model_folder("teacher")}"\n'
        '[trainer]\nsteps = 1\n[queue]\nurl = "embedded"\n[api]\naddress = "127.0.0.1:0"\n'
        '[rollout]\nengine = "transformers"\n'
    )
    return path


REDIS = ("--set", "queue.url=redis://127.0.0.1:6379/0")
"""A trainer alone needs one; it isn't asked before the teacher."""


def test_up_and_train_start_nothing_for_a_teacher_that_can_not_be_used(
    config: Path, tmp_path: Path, with_tls: str, nobody: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["up", str(config), "--teacher", with_tls]) == 2
    assert "set VAOPD_TLS_CA" in capsys.readouterr().err
    assert main(["up", str(config), "--teacher", nobody]) == 2
    assert f"no teacher listens at {nobody}" in capsys.readouterr().err
    assert main(["train", str(config), *REDIS, "--set", f"teacher.address={with_tls}"]) == 2
    assert "set VAOPD_TLS_CA" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_asks_the_teacher_unless_it_is_offline(
    config: Path, plain: str, with_tls: str, nobody: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["up", str(config), "--teacher", plain, "--dry-run"]) == 0
    for target, told in ((with_tls, "set VAOPD_TLS_CA"), (nobody, "no teacher listens")):
        assert main(["up", str(config), "--teacher", target, "--dry-run"]) == 1
        assert told in capsys.readouterr().err
        assert main(["up", str(config), "--teacher", target, "--dry-run", "--offline"]) == 0
    # A trainer alone waits for its teacher.
    assert main(["train", str(config), *REDIS, "--set", f"teacher.address={nobody}", "--dry-run"]) == 0
    assert main(["train", str(config), *REDIS, "--set", f"teacher.address={with_tls}", "--dry-run"]) == 1
