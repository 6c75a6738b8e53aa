"""Fetches the snapshots that a trainer serves into a folder of this host."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx

from vaopd.errors import Mismatch, NotFound, Unavailable
from vaopd.files.durable import name_errors, write_at
from vaopd.net.backoff import Backoff
from vaopd.run.tensor_files import compute_digest
from vaopd.types import PolicyVersion
from vaopd.weights.delta import apply_delta, find_weights

STREAMS = 4
"""Ranges of the weights that are fetched beside each other."""
RANGE_BYTES = 64 * 2**20
PATIENCE_S = 30.0
"""A trainer that doesn't answer for so long is away; the request goes back to the queue."""
_PREFIX = "vaopd-weights-"
_TIMEOUT = httpx.Timeout(10.0, read=60.0)  # a delta of 4 GB is made in seconds, before its first byte


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
        """All bytes of weights so far."""

    def fetch(self, policy: PolicyVersion) -> PolicyVersion:
        """Returns the policy with a path on this host; what was fetched has the digest that was announced.

        Raises NotFound for one that was withdrawn, Unavailable when the trainer doesn't answer, else Mismatch.
        """
        if not policy.path.startswith("http://"):
            return policy
        for kept in self._kept:
            if kept.sha256 == policy.sha256:
                return replace(kept, version=policy.version)
        aside = self._folder / "aside"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for name, size in self._ask(policy, policy.path).json().items():
            target = aside / Path(name).name
            if target.suffix != ".safetensors":
                _write(target, self._ask(policy, f"{policy.path}/files/{name}").content)
            elif not self._fetch_delta(policy, target):
                self._fetch_ranges(policy, target, size)
                if (digest := compute_digest(target)) != policy.sha256:
                    raise Mismatch(
                        f"policy version {policy.version}: the weights from {policy.path} have digest "
                        f"{digest[:12]}…, not {policy.sha256[:12]}…"
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

    def _fetch_delta(self, policy: PolicyVersion, target: Path) -> bool:
        """Writes the weights from the newest kept ones and what changed; False where that is not to be had."""
        if not self._kept:
            return False
        base = self._kept[-1]
        delta = target.with_suffix(".delta")
        try:
            answer = self._ask(policy, f"{policy.path}/delta/{base.sha256}")
        except NotFound:
            return False
        _write(delta, answer.content)
        self.fetched_bytes += len(answer.content)
        try:
            return apply_delta(find_weights(Path(base.path)), delta, target) == policy.sha256
        except ValueError:
            return False
        finally:
            delta.unlink()

    def _fetch_ranges(self, policy: PolicyVersion, target: Path, size: int) -> None:
        with target.open("wb") as file, ThreadPoolExecutor(STREAMS) as threads:

            def fetch(start: int) -> None:
                end = min(start + RANGE_BYTES, size)
                headers = {"Range": f"bytes={start}-{end - 1}"}
                answer = self._ask(policy, f"{policy.path}/files/{target.name}", headers)
                write_at(file, answer.content, start)

            list(threads.map(fetch, range(0, size, RANGE_BYTES)))
        self.fetched_bytes += size

    def _ask(self, policy: PolicyVersion, url: str, headers: Mapping[str, str] | None = None) -> httpx.Response:
        """Asks until there is an answer. Raises NotFound and Unavailable."""
        backoff = Backoff(self._patience_s)
        while True:
            try:
                answer = self._client.get(url, headers=headers)
                if answer.status_code == 404:
                    raise NotFound(f"policy version {policy.version}: its trainer serves it no more; take the latest")
                answer.raise_for_status()
                return answer
            except httpx.HTTPError as error:
                problem = f"policy version {policy.version} can't be fetched from its trainer: {error!r}"
                time.sleep(backoff.delay_s(Unavailable(problem)))


def _write(path: Path, content: bytes) -> None:
    with name_errors(path):
        path.write_bytes(content)


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
