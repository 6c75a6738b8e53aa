"""What clients prove themselves with: files, named by environment variables; and the certificates for development."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shutil
import ssl
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from vaopd.access.certificates import FILES, make_certificates
from vaopd.client import TeacherClient, from_environment
from vaopd.config import TeacherTlsConfig, TlsConfig, load_config, load_service_config
from vaopd.errors import ConfigError
from vaopd.http_client import ScoringClient
from vaopd_api.__main__ import read_tls_expiry
from vaopd_teacher.rpc.tls import make_server_credentials


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder, hosts=["teacher", "192.0.2.7"], days=3)
    return folder


def certificate(folder: Path, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / name).read_bytes())


def test_without_variables_there_are_no_credentials() -> None:
    assert from_environment({}) == {}


def test_the_key_is_what_its_file_holds(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("vaopd_0_1\n")
    with pytest.raises(ConfigError, match="read or written by others; chmod go-w,o-r"):
        from_environment({"VAOPD_API_KEY_FILE": str(tmp_path / "key")})
    (tmp_path / "key").chmod(0o600)
    assert from_environment({"VAOPD_API_KEY_FILE": str(tmp_path / "key")}) == {"api_key": "vaopd_0_1"}


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", b"\xff\xfe", "schlüssel".encode(), b"a\x00b"])
def test_a_file_that_holds_no_key_is_named_by_its_variable_and_not_quoted(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    (tmp_path / "key").chmod(0o600)
    with pytest.raises(ConfigError, match="VAOPD_API_KEY_FILE must hold one API key and nothing else") as caught:
        from_environment({"VAOPD_API_KEY_FILE": str(tmp_path / "key")})
    assert "words" not in str(caught.value)


@pytest.mark.parametrize("key", ["", "two words", "a\nb", "schlüssel", "\ud800"])
def test_a_key_that_no_header_can_hold_is_refused_by_both_clients(key: str) -> None:
    for make in (lambda: TeacherClient("127.0.0.1:1", api_key=key), lambda: ScoringClient(api_key=key)):
        with pytest.raises(ConfigError, match="api_key must hold one API key and nothing else"):
            make()


@pytest.mark.parametrize("name", ["VAOPD_API_KEY_FILE", "VAOPD_TLS_CA"])
@pytest.mark.parametrize(
    "damage", [lambda path: None, os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir]
)
def test_a_file_that_can_t_be_read_is_named_at_once(
    name: str, damage: Callable[[Path], object], tmp_path: Path
) -> None:
    damage(tmp_path / "x")
    with pytest.raises(ConfigError, match=f"{name} = '{tmp_path}/x' can't be read"):
        from_environment({name: str(tmp_path / "x")})


@pytest.mark.parametrize("damage", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_neither_is_a_configuration_waited_for(damage: Callable[[Path], object], tmp_path: Path) -> None:
    damage(tmp_path / "x.toml")
    for read in (load_config, load_service_config):
        with pytest.raises(ConfigError, match=r"x\.toml' can't be read \(not a regular file\)"):
            read(tmp_path / "x.toml")


def test_a_client_certificate_needs_its_key(folder: Path) -> None:
    with pytest.raises(ConfigError, match="VAOPD_TLS_CERT and VAOPD_TLS_KEY go together"):
        from_environment({"VAOPD_TLS_CERT": str(folder / "client.pem")})


def lock(folder: Path, out: Path) -> Path:
    """Writes the client's key with a pass phrase."""
    key = serialization.load_pem_private_key((folder / "client.key").read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"secret")
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    out.write_bytes(key.private_bytes(pem, pkcs8, encryption))
    out.chmod(0o600)
    return out


@pytest.mark.parametrize("content", ["", "no PEM", "server.key"])
def test_what_is_no_certificate_is_named(content: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x").write_text((folder / content).read_text() if content.endswith(".key") else content)
    with pytest.raises(ConfigError, match=r"VAOPD_TLS_CA = '.*/x' holds no certificate"):
        from_environment({"VAOPD_TLS_CA": str(tmp_path / "x")})


@pytest.mark.parametrize("key", ["server.key", "ca.pem", "locked"])
def test_a_key_that_doesn_t_fit_is_named_and_no_pass_phrase_asked_for(key: str, folder: Path, tmp_path: Path) -> None:
    path = lock(folder, tmp_path / key) if key == "locked" else shutil.copy(folder / key, tmp_path / key)
    path.chmod(0o600)
    with pytest.raises(
        ConfigError, match=r"VAOPD_TLS_CERT = '.*' and VAOPD_TLS_KEY = '.*' must be PEM .*without a pass"
    ):
        from_environment({"VAOPD_TLS_CERT": str(folder / "client.pem"), "VAOPD_TLS_KEY": str(path)})


@pytest.mark.parametrize("damage", ["open", "a pipe", "locked"])
@pytest.mark.parametrize("server", ["teacher", "api"])
def test_a_server_refuses_such_a_key_too(server: str, damage: str, folder: Path, tmp_path: Path) -> None:
    cert, key = shutil.copy(folder / "client.pem", tmp_path / "cert"), tmp_path / "key"
    if damage == "a pipe":
        os.mkfifo(key, 0o600)
    else:
        lock(folder, key) if damage == "locked" else shutil.copy(folder / "client.key", key)
        key.chmod(0o604 if damage == "open" else 0o600)
    words = {
        "open": rf"\[{server}\.tls\] key '{key}' has mode 0604 .* chmod go-w,o-r {key}",
        "a pipe": "not a regular file",
        "locked": "without a pass phrase",
    }
    start: dict[str, Callable[[], object]] = {
        "teacher": lambda: make_server_credentials(TeacherTlsConfig(cert=cert, key=key), "localhost:0"),
        "api": lambda: read_tls_expiry(TlsConfig(cert=cert, key=key)),
    }
    with pytest.raises(ConfigError, match=words[damage]):
        start[server]()


def test_an_authority_turns_tls_on(folder: Path) -> None:
    assert set(from_environment({"VAOPD_TLS_CA": str(folder / "ca.pem")})) == {"tls"}


def test_the_server_goes_by_the_names_asked_for_and_by_this_hosts_own(folder: Path) -> None:
    names = certificate(folder, "server.pem").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "teacher"]
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address(text) for text in ("127.0.0.1", "::1", "192.0.2.7")
    ]


def test_certificates_are_short_lived_and_signed_by_the_authority(folder: Path) -> None:
    authority = certificate(folder, "ca.pem")
    for name in ("server.pem", "client.pem"):
        certificate(folder, name).verify_directly_issued_by(authority)
        assert certificate(folder, name).not_valid_after_utc <= datetime.now(UTC) + timedelta(days=3)


def test_only_the_authority_may_sign_and_its_key_is_not_kept(folder: Path) -> None:
    signs = {
        name: certificate(folder, name).extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        for name in ("ca.pem", "server.pem", "client.pem")
    }
    assert signs == {"ca.pem": True, "server.pem": False, "client.pem": False}
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_a_client_can_not_pass_for_the_server(folder: Path) -> None:
    """Both may be used on either side of a call, but the client's goes by a name that no server can have."""
    names = certificate(folder, "client.pem").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in names] == ["client.invalid"]


def test_the_strictest_of_clients_accepts_them(folder: Path) -> None:
    """Python 3.13 verifies so by default: all the extensions that RFC 5280 asks for."""
    server_side, client_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server_side.load_cert_chain(folder / "server.pem", folder / "server.key")
    client_side.load_cert_chain(folder / "client.pem", folder / "client.key")
    for context in (server_side, client_side):
        context.load_verify_locations(folder / "ca.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_side.wrap_bio(to_server, to_client, server_side=True)
    client = client_side.wrap_bio(to_client, to_server, server_hostname="teacher")
    for side in (client, server, client, server):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    assert server.getpeercert()
    assert client.getpeercert()


def test_private_keys_are_for_their_owner_only(folder: Path) -> None:
    for name in ("server.key", "client.key"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600


def test_certificates_are_not_overwritten_by_accident(folder: Path) -> None:
    before = (folder / "server.pem").read_bytes()
    with pytest.raises(ConfigError, match=r"already holds ca\.pem, .*; --replace"):
        make_certificates(folder)
    assert (folder / "server.pem").read_bytes() == before


@pytest.mark.parametrize("host", ["", "host:50051", "https://host", "müller.example", "10.0.0.0/8", "me@host", "a b"])
def test_a_host_that_is_no_name_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="is no name or address"):
        make_certificates(tmp_path / "new", hosts=[host])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[teacher.tls]\ncert = "a"', "cert and key go together"),
        ('[teacher.tls]\nclient_ca = "a"', "client_ca is of no use without TLS"),
        ('[teacher.tls]\ncert = "a"\nkey = "b"\nplaintext = true', "contradicts cert"),
        ("[teacher.quotas]\ngroups_per_minute = 5", "quotas need keys.file"),
        ('[teacher.keys]\nfile = "k"\n[teacher.quotas]\ngroups_per_minute = 0', "groups_per_minute"),
        ('[teacher.keys]\nfolder = "k"', "Known here: file"),
    ],
)
def test_a_service_configuration_that_cant_be_meant_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "service.toml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        load_service_config(tmp_path / "service.toml")


def test_files_are_looked_for_beside_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "service.toml").write_text(
        '[teacher.keys]\nfile = "keys.json"\n[teacher.tls]\ncert = "/etc/s.pem"\nkey = "s.key"'
    )
    service = load_service_config(tmp_path / "service.toml").teacher
    assert service.keys.file == tmp_path / "keys.json"
    assert (service.tls.cert, service.tls.key) == (Path("/etc/s.pem"), tmp_path / "s.key")
    assert service.tls.client_ca is None
