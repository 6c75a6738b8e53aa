"""Fetches the snapshots that a trainer serves into a folder of this host."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
from safetensors import SafetensorError

from vaopd.errors import Mismatch, Unavailable
from vaopd.files.durable import write_at
from vaopd.net.backoff import Backoff
from vaopd.run.snapshots import list_weights
from vaopd.run.tensor_files import compute_digest
from vaopd.types import PolicyVersion
from vaopd.weights.delta import apply_delta

STREAMS = 4
"""Files that are fetched beside each other."""
RANGE_BYTES = 64 * 2**20
"""Of a file, at a time."""
LIST_BYTES = 2**20
"""The longest list of a snapshot's files."""
PATIENCE_S = 30.0
"""A trainer that doesn't answer for so long is away; the request goes back to the queue."""
_PREFIX = "vaopd-weights-"
_TIMEOUT = httpx.Timeout(10.0, read=60.0)  # a delta of 4 GB is made in seconds, before its first byte


class _NotServed(Unavailable):
    """The trainer has withdrawn it; or another trainer is there, with another secret, and announces its own soon."""


class PolicyFetcher:
    """Takes snapshots from where they lie, and fetches those with an http:// path.

    Two are kept, so that a policy that is announced again needs no transfer; the newer is the base of the next delta.
    """

    def __init__(self, folder: Path | None = None, *, patience_s: float = PATIENCE_S) -> None:
        """folder: where they are fetched to, e.g. in /dev/shm; None: in the system's folder for such files."""
        self._folder, self._lock = _make_folder(folder or Path(tempfile.gettempdir()))
        # No proxy of the environment: the trainer is a neighbour.
        self._client = httpx.Client(timeout=_TIMEOUT, trust_env=False)
        self._kept: list[PolicyVersion] = []
        self._patience_s = patience_s
        self.fetched_bytes = 0
        """All bytes so far."""

    def fetch(self, policy: PolicyVersion) -> PolicyVersion:
        """Returns the policy with a path on this host; what was fetched has the digest that was announced.

        Raises Unavailable when the trainer doesn't answer or serves it no more, else Mismatch.
        """
        if not policy.path.startswith("http://"):
            return policy
        for kept in self._kept:
            if kept.sha256 == policy.sha256:
                return replace(kept, version=policy.version)
        aside = self._folder / "aside"
        base = Path(self._kept[-1].path) if self._kept else None
        digest = self._fetch_files(policy, aside, base)
        if base is not None and digest != policy.sha256:  # a damaged delta
            digest = self._fetch_files(policy, aside, None)
        if digest != policy.sha256:
            raise Mismatch(
                f"policy version {policy.version}: the weights from {policy.path} have digest {digest[:12]}…, not "
                f"{policy.sha256[:12]}…"
            )
        found = replace(policy, path=str(aside.rename(self._folder / policy.sha256)))
        self._kept.append(found)
        for old in self._kept[:-2]:
            shutil.rmtree(old.path)
        self._kept = self._kept[-2:]
        return found

    def close(self) -> None:
        """Removes what was fetched."""
        self._client.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._lock)

    def _fetch_files(self, policy: PolicyVersion, folder: Path, base: Path | None) -> str:
        """Writes all files into a new `folder` -> the digest of its weights. base: the weights that may be patched."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

        def fetch(name: str, size: int) -> int:
            target = folder / Path(name).name
            is_weights = target.suffix == ".safetensors"
            patched = self._fetch_delta(policy, base, target, size) if base and is_weights else 0
            return patched or self._fetch_file(policy, target, size)

        sizes = self._list_files(policy)
        threads, wait = ThreadPoolExecutor(STREAMS), True
        try:
            self.fetched_bytes += sum(threads.map(fetch, sizes, sizes.values()))
        except BaseException as error:
            # Else the worker is stopped: it hands its requests back, however silent the trainer is.
            wait = isinstance(error, Exception)
            raise
        finally:
            threads.shutdown(wait, cancel_futures=True)
        return compute_digest(*list_weights(folder))

    def _list_files(self, policy: PolicyVersion) -> dict[str, int]:
        try:
            return {str(name): int(size) for name, size in json.loads(self._ask(policy, policy.path)).items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise Unavailable(f"policy version {policy.version}: {policy.path} lists no files ({error})") from None

    def _fetch_delta(self, policy: PolicyVersion, base: Path, target: Path, size: int) -> int:
        """Patches the base's file -> the bytes that this took; 0, and no file, where what changed is not to be had."""
        try:
            data = self._ask(policy, f"{policy.path}/delta/{base.name}/{target.name}", most=size)
        except _NotServed:
            return 0
        delta = target.with_suffix(".delta")
        try:
            with delta.open("wb") as file:
                write_at(file, data, 0)
            apply_delta(base / target.name, delta, target)
        except (ValueError, IndexError, SafetensorError):  # cut short or damaged on its way
            return 0
        finally:
            delta.unlink(missing_ok=True)
        return len(data)

    def _fetch_file(self, policy: PolicyVersion, target: Path, size: int) -> int:
        url = f"{policy.path}/files/{target.name}"
        with target.open("wb") as file:
            for start in range(0, size, RANGE_BYTES):
                length = min(RANGE_BYTES, size - start)
                headers = {"Range": f"bytes={start}-{start + length - 1}"}
                write_at(file, self._ask(policy, url, headers, least=length, most=length), start)
        return size

    def _ask(
        self,
        policy: PolicyVersion,
        url: str,
        headers: Mapping[str, str] | None = None,
        *,
        least: int = 0,
        most: int = LIST_BYTES,
    ) -> bytearray:
        """Asks until there is an answer of `least` to `most` bytes. Raises Unavailable."""
        backoff = Backoff(self._patience_s)
        while True:
            try:
                with self._client.stream("GET", url, headers=headers) as answer:
                    if answer.status_code == 404:
                        raise _NotServed(
                            f"policy version {policy.version}: its trainer serves it no more; take the latest"
                        )
                    answer.raise_for_status()
                    data = bytearray()
                    for part in answer.iter_bytes():
                        data += part
                        if len(data) > most:  # of a proxy that knows no ranges: all of the weights, into memory
                            break
                if least <= len(data) <= most:
                    return data
                problem = f"{url} sent {len(data)} bytes, where {least} to {most} belong"
            except httpx.HTTPError as error:
                problem = repr(error)
            away = f"policy version {policy.version} can't be fetched from its trainer: {problem}"
            time.sleep(backoff.delay_s(Unavailable(away)))


def _make_folder(parent: Path) -> tuple[Path, int]:
    """Returns a new folder and its lock, which ends with this process; removes those that killed processes left."""
    for leftover in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            handle = os.open(leftover, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover)
            finally:
                os.close(handle)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if folder.is_dir():  # else another process took it for a leftover before it was locked
            return folder, handle
        os.close(handle)
