"""API keys: what is kept of them, who gets in, and how a running service hears of changes."""

from __future__ import annotations

import json
import os
import re
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from vaopd.access.keys import KeyStore, add_key, read_bearer, read_keys, revoke_key
from vaopd.cli import main
from vaopd.errors import ConfigError, NotFound, Unauthenticated, Unavailable


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def key_id(key: str) -> str:
    return key.split("_")[1]


def test_a_key_names_its_job(file: Path) -> None:
    geometry, other = add_key(file, "geometry"), add_key(file, "other")
    store = KeyStore(file)
    assert store.find_job(geometry) == "geometry"
    assert store.find_job(other) == "other"


def test_the_file_holds_a_digest_and_is_for_its_owner_only(file: Path) -> None:
    secret = add_key(file, "geometry").split("_", 2)[2]
    assert secret not in file.read_text()
    assert re.fullmatch("[0-9a-f]{64}", json.loads(file.read_text())["keys"][0]["sha256"])
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(file.parent.iterdir()) == [file]  # nothing half-written stays behind


def test_a_secret_has_256_bits(file: Path) -> None:
    secret = add_key(file, "geometry").split("_", 2)[2]
    assert len(secret) * 6 >= 256  # URL-safe base64 holds six bits in a character


@pytest.mark.parametrize(
    "change",
    [
        lambda key: "",
        lambda key: "geometry",
        lambda key: key[:-1],
        lambda key: key + "A",
        lambda key: key[:-1] + ("A" if key[-1] != "A" else "B"),
        lambda key: key.replace(key_id(key), "0" * 12),
        lambda key: key.upper(),
        lambda key: key + "\n",
        lambda key: key.replace("vaopd", "vаopd"),  # a Cyrillic letter
    ],
    ids=["empty", "a word", "cut", "longer", "another secret", "another id", "capitals", "line end", "look-alike"],
)
def test_anything_else_is_refused_without_being_quoted(file: Path, change) -> None:
    key = add_key(file, "geometry")
    with pytest.raises(Unauthenticated) as caught:
        KeyStore(file).find_job(change(key))
    assert key.split("_", 2)[2][:8] not in str(caught.value)


def test_a_secret_of_one_key_is_no_use_with_another_id(file: Path) -> None:
    one, two = add_key(file, "one"), add_key(file, "two")
    with pytest.raises(Unauthenticated, match="not known here"):
        KeyStore(file).find_job(one.replace(key_id(one), key_id(two)))


def test_an_expired_key_is_refused(file: Path) -> None:
    key = add_key(file, "geometry", expires_days=1)
    content = json.loads(file.read_text())
    content["keys"][0]["expires"] = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    file.write_text(json.dumps(content))
    with pytest.raises(Unauthenticated, match=f"{key_id(key)} is expired; ask"):
        KeyStore(file).find_job(key)


def test_a_running_service_notices_new_and_revoked_keys(file: Path) -> None:
    first = add_key(file, "first")
    store = KeyStore(file)
    second = add_key(file, "second")
    assert store.find_job(second) == "second"
    revoke_key(file, key_id(first))
    with pytest.raises(Unauthenticated, match="is revoked"):
        store.find_job(first)
    assert store.find_job(second) == "second"


@pytest.mark.parametrize(
    "content",
    [
        *(None, "{", "[]", '{"version": 1}', '{"version": 2, "keys": []}', '{"version": 1, "keys": [{}]}'),
        *("[" * 100_000, "a pipe", "open to others"),
    ],
    ids=lambda content: str(content)[:20],
)
def test_while_the_file_is_unreadable_nobody_gets_in(file: Path, content: str | None) -> None:
    """Not even who was let in before: the change may have been a revocation."""
    key = add_key(file, "geometry")
    store = KeyStore(file)
    good = file.read_text()
    if content is None:
        file.unlink()
    elif content == "a pipe":
        file.unlink()
        os.mkfifo(file, 0o600)
    elif content == "open to others":
        file.chmod(0o644)
    else:
        file.write_text(content)
    for _ in range(2):
        with pytest.raises(Unavailable, match="fix the key file"):
            store.find_job(key)
    file.unlink(missing_ok=True)
    file.write_text(good)
    file.chmod(0o600)
    assert store.find_job(key) == "geometry"


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o604])
def test_a_file_that_others_may_read_or_write_is_refused(file: Path, mode: int) -> None:
    add_key(file, "geometry")
    file.chmod(0o640)  # a container's group reads its secrets
    KeyStore(file)
    file.chmod(mode)
    with pytest.raises(ConfigError, match="written by others; chmod go-w"):
        KeyStore(file)


def test_keys_made_at_the_same_time_are_all_kept(file: Path) -> None:
    threads = [threading.Thread(target=add_key, args=(file, f"job{n}")) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(entry.job for entry in read_keys(file)) == [f"job{n}" for n in range(8)]


@pytest.mark.parametrize("job", ["", "a b", "../x", "a" * 65, "-x", "é"])
def test_a_jobs_name_is_a_runs_name(file: Path, job: str) -> None:
    with pytest.raises(ConfigError, match="is no name"):
        add_key(file, job)
    assert not file.exists()


def test_an_unknown_id_cant_be_revoked(file: Path) -> None:
    add_key(file, "geometry")
    with pytest.raises(NotFound, match="'123'"):
        revoke_key(file, "123")


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic abc", "vaopd_key"])
def test_a_header_without_a_bearer_key_is_refused(header: str | None) -> None:
    with pytest.raises(Unauthenticated, match="send `authorization: Bearer KEY`"):
        read_bearer(header)


def test_the_command_prints_a_key_once_and_lists_none(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "add", "geometry", "--expires", "never", "--file", str(file)]) == 0
    key = capsys.readouterr().out.strip()
    assert KeyStore(file).find_job(key) == "geometry"
    assert main(["keys", "revoke", key_id(key), "--file", str(file)]) == 0
    capsys.readouterr()
    assert main(["keys", "list", "--file", str(file)]) == 0
    listed = capsys.readouterr().out
    assert re.search(rf"^{key_id(key)} +geometry +revoked +\S+ +never$", listed, re.MULTILINE)
    assert key.split("_", 2)[2] not in listed
