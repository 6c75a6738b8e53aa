"""API keys, one per job and holder, in a JSON file that holds their digests, never the keys. Loads nothing heavy.

    key = add_key(Path("keys.json"), "geometry", expires_days=90)          # shown once, stored nowhere
    KeyStore(Path("keys.json")).find_job(key)                                # "geometry"

A key is `vaopd_ID_SECRET`. ID names its entry, in logs too; SECRET is 256 random bits. Plain SHA-256 is enough for
such secrets: salts and slow hashes protect passwords that can be guessed, and 2^256 values can't be tried.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from vaopd.errors import ConfigError, NotFound, Unauthenticated, Unavailable
from vaopd.files.durable import atomic_file
from vaopd.files.secret import read_secret

log = logging.getLogger(__name__)

DEFAULT_DAYS = 90
JOB = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""A job's name: the name of its run."""
_KEY = re.compile(r"vaopd_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_VERSION = 1
_NO_SECRET = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyEntry:
    """One key as it is in the file; times are ISO 8601 in UTC.

    >>> KeyEntry(id="0a1b2c3d4e5f", job="geometry", sha256="9f…", created="2026-11-24T10:00:00+00:00").state()
    'valid'
    """

    id: str
    job: str
    sha256: str
    """SHA-256 of the secret's ASCII characters, in hex."""
    created: str
    expires: str | None = None
    revoked: str | None = None

    def state(self, now: datetime | None = None) -> str:
        """Returns "valid", "expired" or "revoked", as of `now`."""
        if self.revoked is not None:
            return "revoked"
        if self.expires is not None and datetime.fromisoformat(self.expires) <= (now or datetime.now(UTC)):
            return "expired"
        return "valid"


def read_bearer(header: str | None) -> str:
    """Returns the key of an `Authorization` header or metadata entry. Raises Unauthenticated when there is none."""
    scheme, _, key = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Unauthenticated("an API key is needed here: send `authorization: Bearer KEY`")
    return key.strip()


class KeyStore:
    """Checks keys against a file, which is read again whenever it changes. Thread-safe."""

    def __init__(self, path: Path) -> None:
        """Reads the file. Raises ConfigError where it is missing, malformed, or open to others."""
        self._path = path
        self._lock = threading.Lock()
        self._seen = _read_signature(path)
        self._entries: dict[str, KeyEntry] | None = _index_by_id(read_keys(path))

    def find_job(self, key: str) -> str:
        """Returns the job that a key belongs to.

        Raises Unauthenticated for a key that isn't valid now, Unavailable while the file can't be read.
        """
        entries = self._read_entries()
        match = _KEY.fullmatch(key)
        if match is None:
            raise Unauthenticated("the API key is malformed: it has the form vaopd_ID_SECRET; copy all of it")
        key_id, secret = match.groups()
        entry = entries.get(key_id)
        digest = hashlib.sha256(secret.encode()).hexdigest()
        # An unknown id is compared too, so that it takes as long as a wrong secret.
        same = hmac.compare_digest(digest, entry.sha256 if entry else _NO_SECRET)
        if entry is None or not same:
            raise Unauthenticated("the API key is not known here; ask the service's operator for one")
        if (state := entry.state()) != "valid":
            raise Unauthenticated(f"API key {entry.id} is {state}; ask the service's operator for a new one")
        return entry.job

    def _read_entries(self) -> dict[str, KeyEntry]:
        with self._lock:
            signature = _read_signature(self._path)
            if signature != self._seen:
                self._seen = signature
                try:
                    self._entries = _index_by_id(read_keys(self._path))
                except ConfigError as error:
                    # The old keys are not kept: one of them may just have been revoked.
                    self._entries = None
                    log.error("no key is accepted until the key file is fixed: %s", error)
            if self._entries is None:
                raise Unavailable("the service can't read its API keys now; its operator has to fix the key file")
            return self._entries


def _read_signature(path: Path) -> tuple[int, int, int] | None:
    """Returns a value that changes when the file is replaced, written or opened to others; None without a file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_ctime_ns, status.st_size


def _index_by_id(entries: Sequence[KeyEntry]) -> dict[str, KeyEntry]:
    return {entry.id: entry for entry in entries}


# ------------------------------------------------------------------------------------------- the file


def read_keys(path: Path) -> list[KeyEntry]:
    """Reads the entries of a key file. Raises ConfigError where it is missing, malformed, or open to others."""
    try:
        text = read_secret(path, what="key file")
    except OSError as error:
        raise ConfigError(
            f"key file {str(path)!r} can't be read ({error.strerror}); `vaopd keys add JOB --file FILE` makes one"
        ) from None
    try:
        content = json.loads(text)
        if content["version"] != _VERSION:
            raise ConfigError(f"key file {str(path)!r} has version {content['version']!r}, this vaopd reads {_VERSION}")
        entries = [KeyEntry(**item) for item in content["keys"]]
        for entry in entries:
            _check(entry)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(f"key file {str(path)!r} is malformed; restore it, or make one by `vaopd keys add`") from None
    return entries


def _check(entry: KeyEntry) -> None:
    """Raises ValueError or TypeError for an entry that `add_key` can't have written."""
    if not re.fullmatch("[0-9a-f]{12}", entry.id) or not re.fullmatch("[0-9a-f]{64}", entry.sha256):
        raise ValueError("id or sha256")
    check_job(entry.job)
    for moment in (entry.created, entry.expires, entry.revoked):
        if moment is not None and datetime.fromisoformat(moment).tzinfo is None:
            raise ValueError("a time without a zone")


def check_job(job: str) -> str:
    """Returns the job's name. Raises ConfigError unless it has the form of JOB."""
    if not JOB.fullmatch(job):
        raise ConfigError(f"job {job[:80]!r} is no name: use up to 64 letters, digits, '.', '_' and '-'")
    return job


def add_key(path: Path, job: str, *, expires_days: float | None = DEFAULT_DAYS) -> str:
    """Makes a key for `job`, adds its digest to the file (created if missing) and returns the key.

    Raises ConfigError for a job's name, lifetime or file that can't be used.
    """
    check_job(job)
    if expires_days is not None and not 0 < expires_days <= 36_500:
        raise ConfigError(f"a key can't expire in {expires_days} days; use a number above 0 and up to 36500")
    key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    now = datetime.now(UTC).replace(microsecond=0)
    entry = KeyEntry(
        id=key_id,
        job=job,
        sha256=hashlib.sha256(secret.encode()).hexdigest(),
        created=now.isoformat(),
        expires=None if expires_days is None else (now + timedelta(days=expires_days)).isoformat(),
    )
    with _lock(path):
        _write(path, [*(read_keys(path) if path.exists() else []), entry])
    return f"vaopd_{key_id}_{secret}"


def revoke_key(path: Path, key_id: str) -> KeyEntry:
    """Marks a key as no longer valid and returns its entry. Raises NotFound for an id that isn't in the file."""
    with _lock(path):
        entries = read_keys(path)
        entry = next((entry for entry in entries if entry.id == key_id), None)
        if entry is None:
            raise NotFound(f"there is no key {key_id[:80]!r} in {path}; `vaopd keys list` lists the keys")
        if entry.revoked is None:
            revoked = replace(entry, revoked=datetime.now(UTC).replace(microsecond=0).isoformat())
            _write(path, [revoked if other is entry else other for other in entries])
            entry = revoked
    return entry


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds a lock for one writer at a time; on the folder, since the file itself is replaced."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ConfigError(f"folder {str(path.parent)!r} can't be used ({error.strerror}); name another file") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _write(path: Path, entries: Sequence[KeyEntry]) -> None:
    """Replaces the file atomically, with mode 0600. Run as root, it keeps the file's owner."""
    content = {"version": _VERSION, "keys": [asdict(entry) for entry in entries]}
    with atomic_file(path, mode=0o600) as file:
        if os.geteuid() == 0 and path.exists():
            os.fchown(file.fileno(), path.stat().st_uid, path.stat().st_gid)
        file.write(json.dumps(content, indent=2).encode() + b"\n")
