"""Weights that a worker fetches from its trainer: whole, in ranges, or as what changed; never half of them."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from starlette.requests import Request
from starlette.responses import Response

from tests.support.waiting import wait_until
from vaopd.errors import ConfigError, Mismatch, Unavailable
from vaopd.run import snapshots, tensor_files
from vaopd.run.snapshots import (
    WEIGHTS_FILE,
    list_weights,
    locate_snapshot,
    prune_snapshots,
    publish_snapshot,
    verify_snapshot,
)
from vaopd.types import PolicyVersion
from vaopd.weights import fetch as fetching
from vaopd.weights import serve as serving
from vaopd.weights.delta import BLOCK, write_delta
from vaopd.weights.fetch import PolicyFetcher
from vaopd.weights.serve import SnapshotServer

ELEMENTS = 3 * BLOCK + 5


@pytest.fixture
def server() -> Iterator[SnapshotServer]:
    running = SnapshotServer("127.0.0.1:0")
    yield running
    running.close()


@pytest.fixture
def fetcher(tmp_path: Path) -> Iterator[PolicyFetcher]:
    (tmp_path / "worker").mkdir()
    made = PolicyFetcher(tmp_path / "worker", patience_s=0.2)
    yield made
    made.close()
    assert list((tmp_path / "worker").iterdir()) == []


def publish(folder: Path, version: int, *, changed: int) -> PolicyVersion:
    """Publishes two layers of bf16 weights of which `changed` differ from those of version 0."""
    (folder / "student").mkdir(parents=True, exist_ok=True)
    (folder / "student/config.json").write_text("{}")
    weights = torch.arange(ELEMENTS, dtype=torch.float32).bfloat16()
    weights[torch.linspace(0, ELEMENTS - 1, changed).long()] *= -1 - version
    layers = dict(zip(("layer.0", "layer.1"), weights.split(2 * BLOCK), strict=True))
    return publish_snapshot(folder, version, layers, model_files_from=folder / "student")


def test_what_was_fetched_is_what_was_published(
    server: SnapshotServer, fetcher: PolicyFetcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "RANGE_BYTES", 1000)
    published = publish(tmp_path, 7, changed=0)

    found = fetcher.fetch(server.offer(published))

    verify_snapshot(found)
    assert (found.version, found.sha256) == (7, published.sha256)
    assert {p.name: p.read_bytes() for p in Path(found.path).iterdir()} == {
        p.name: p.read_bytes() for p in Path(published.path).iterdir()
    }
    assert fetcher.fetch(server.offer(published)) == found
    assert fetcher.fetched_bytes == sum(path.stat().st_size for path in Path(found.path).iterdir())


def test_four_files_travel_at_once(
    server: SnapshotServer, fetcher: PolicyFetcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "FILE_BYTES", 4 * BLOCK)
    published = publish(tmp_path, 7, changed=0)
    assert len(list(Path(published.path).iterdir())) == 4  # weights, their index, config.json
    on_their_way = threading.Barrier(4, timeout=180)
    fetch_one = fetcher._fetch_file

    def fetch_together(policy: PolicyVersion, target: Path, size: int) -> int:
        on_their_way.wait()
        return fetch_one(policy, target, size)

    monkeypatch.setattr(fetcher, "_fetch_file", fetch_together)
    verify_snapshot(fetcher.fetch(server.offer(published)))


def test_only_what_changed_travels(server: SnapshotServer, fetcher: PolicyFetcher, tmp_path: Path) -> None:
    fetcher.fetch(server.offer(publish(tmp_path, 0, changed=0)))
    whole = fetcher.fetched_bytes

    found = fetcher.fetch(server.offer(publish(tmp_path, 1, changed=100)))

    verify_snapshot(found)
    # 100 places and values of two bytes; four counts; the header of safetensors; config.json.
    assert 400 < fetcher.fetched_bytes - whole < 1000


def test_weights_in_several_files_travel_as_one_policy(
    server: SnapshotServer, fetcher: PolicyFetcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What changed of the one file, and no more than a header of the other."""
    monkeypatch.setattr(snapshots, "FILE_BYTES", 4 * BLOCK)
    fetcher.fetch(server.offer(publish(tmp_path, 0, changed=0)))
    whole = fetcher.fetched_bytes

    published = publish(tmp_path, 1, changed=1)
    found = fetcher.fetch(server.offer(published))

    verify_snapshot(found)
    assert {p.name: p.read_bytes() for p in Path(found.path).iterdir()} == {
        p.name: p.read_bytes() for p in Path(published.path).iterdir()
    }
    assert len(list_weights(Path(found.path))) == 2
    assert 400 < fetcher.fetched_bytes - whole < 1400


@pytest.mark.parametrize("case", ["its base was pruned", "most has changed", "it can't be written"])
def test_where_a_delta_is_not_to_be_had_all_travels(
    server: SnapshotServer, fetcher: PolicyFetcher, tmp_path: Path, case: str
) -> None:
    fetcher.fetch(server.offer(publish(tmp_path, 0, changed=0)))
    whole = fetcher.fetched_bytes
    if case == "most has changed":
        announced = server.offer(publish(tmp_path, 1, changed=ELEMENTS // 2))
    elif case == "it can't be written":  # as on a full disk: the worker would wait for it for ever
        announced = server.offer(publish(tmp_path, 1, changed=3))
        (tmp_path / "policy/.v000001.tmp-deltas").touch()
    else:
        newest = publish(tmp_path, 1, changed=3)
        prune_snapshots(tmp_path, keep=1)
        announced = server.offer(newest)

    verify_snapshot(fetcher.fetch(announced))
    assert fetcher.fetched_bytes == 2 * whole


def test_pruning_removes_deltas(server: SnapshotServer, fetcher: PolicyFetcher, tmp_path: Path) -> None:
    for version in range(3):
        fetcher.fetch(server.offer(publish(tmp_path, version, changed=version)))
        prune_snapshots(tmp_path, keep=2)
    assert {path.name for path in (tmp_path / "policy").iterdir()} == {".v000002.tmp-deltas", "v000001", "v000002"}


def test_a_delta_may_be_made_while_older_versions_are_pruned(
    fetcher: PolicyFetcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer prunes right behind the announcement."""

    def prune_first(*paths: Path) -> int | None:
        prune_snapshots(tmp_path, keep=2, current=1)
        return write_delta(*paths)

    monkeypatch.setattr(serving, "write_delta", prune_first)
    with closing(SnapshotServer("127.0.0.1:0")) as server:
        for version in range(2):
            verify_snapshot(fetcher.fetch(server.offer(publish(tmp_path, version, changed=version))))


def test_damaged_weights_are_named_and_not_kept(server: SnapshotServer, fetcher: PolicyFetcher, tmp_path: Path) -> None:
    published = publish(tmp_path, 0, changed=0)
    weights = Path(published.path) / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    announced = server.offer(published)
    for _ in range(2):
        with pytest.raises(Mismatch, match=r"policy version 0: the weights from .* have digest"):
            fetcher.fetch(announced)


@pytest.mark.parametrize("damage", ["it is the inverse", "it is no delta"])
def test_a_delta_that_was_damaged_is_not_used(
    server: SnapshotServer, fetcher: PolicyFetcher, tmp_path: Path, damage: str
) -> None:
    base = publish(tmp_path, 0, changed=0)
    fetcher.fetch(server.offer(base))
    published = publish(tmp_path, 1, changed=9)
    announced = server.offer(published)
    delta = tmp_path / "policy/.v000001.tmp-deltas" / base.sha256 / WEIGHTS_FILE
    delta.parent.mkdir(parents=True)
    if damage == "it is the inverse":
        write_delta(Path(published.path) / WEIGHTS_FILE, Path(base.path) / WEIGHTS_FILE, delta)
    else:
        delta.write_bytes(b"<html>")

    verify_snapshot(fetcher.fetch(announced))


@contextmanager
def answered_first(monkeypatch: pytest.MonkeyPatch, method: str, *bodies: bytes) -> Iterator[SnapshotServer]:
    """A server behind a proxy that answers the first questions of one kind by itself, with a status of 200."""
    real, rest = getattr(SnapshotServer, method), list(bodies)

    def answer(self: SnapshotServer, request: Request) -> Response:
        return Response(rest.pop(0)) if rest else real(self, request)

    monkeypatch.setattr(SnapshotServer, method, answer)
    with closing(SnapshotServer("127.0.0.1:0")) as server:
        yield server
    assert not rest


def test_an_answer_of_another_length_is_asked_for_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of config.json, which has no digest, and of the first range: nothing, half, all of the weights."""
    monkeypatch.setattr(fetching, "RANGE_BYTES", 2 * ELEMENTS)
    published = publish(tmp_path, 0, changed=0)
    config, weights = ((Path(published.path) / name).read_bytes() for name in ("config.json", WEIGHTS_FILE))
    for bodies in ([b"", b"<html>"], [config, b"", weights[:1000], weights]):
        with (
            answered_first(monkeypatch, "_send_file", *bodies) as server,
            closing(PolicyFetcher(tmp_path)) as fetcher,
        ):
            found = fetcher.fetch(server.offer(published))
            verify_snapshot(found)
            assert (Path(found.path) / "config.json").read_bytes() == config


@pytest.mark.parametrize("body", [b"", b"<html>", bytes(100)])
def test_where_what_came_is_no_delta_all_travels(
    fetcher: PolicyFetcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: bytes
) -> None:
    with answered_first(monkeypatch, "_send_delta", body) as server:
        for version in range(2):
            verify_snapshot(fetcher.fetch(server.offer(publish(tmp_path, version, changed=version))))


def test_a_list_of_files_that_is_none_is_a_trainer_that_is_away(
    fetcher: PolicyFetcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The worker's request goes back to the queue, and is tried again."""
    with answered_first(monkeypatch, "_list_files", b"<html>", b"[]", b'{"config.json": "2') as server:
        announced = server.offer(publish(tmp_path, 0, changed=0))
        for _ in range(3):
            with pytest.raises(Unavailable, match=r"version 0: http://.* lists no files"):
                fetcher.fetch(announced)
        verify_snapshot(fetcher.fetch(announced))


def test_a_policy_that_is_gone_and_a_trainer_that_is_gone(
    server: SnapshotServer, fetcher: PolicyFetcher, tmp_path: Path
) -> None:
    announced = [server.offer(publish(tmp_path, version, changed=version)) for version in range(2)]
    prune_snapshots(tmp_path, keep=1)
    with pytest.raises(Unavailable, match="version 0: its trainer serves it no more"):
        fetcher.fetch(announced[0])
    server.close()
    with pytest.raises(Unavailable, match="version 1 can't be fetched from its trainer"):
        fetcher.fetch(announced[1])


def test_without_the_secret_nothing_is_served(server: SnapshotServer, fetcher: PolicyFetcher, tmp_path: Path) -> None:
    announced = server.offer(publish(tmp_path, 0, changed=0))
    secret = announced.path.split("/")[3]
    guessed = PolicyVersion(version=0, path=announced.path.replace(secret, "guess"), sha256=announced.sha256)
    with pytest.raises(Unavailable, match="serves it no more"):
        fetcher.fetch(guessed)


@pytest.mark.parametrize(
    ("address", "words"), [("192.0.2.1:7000", "Cannot assign requested"), ("0.0.0.0:0", "stands for every host")]
)
def test_an_address_that_workers_could_not_reach_is_refused(address: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"weights\.address '{address}' can't be had here \(.*{words}.*\); name one"):
        SnapshotServer(address)


def test_a_worker_that_is_killed_leaves_its_weights_to_the_next_to_remove(tmp_path: Path) -> None:
    """Each is gigabytes, maybe of memory."""
    script = f"""
    import time
    from pathlib import Path
    from vaopd.weights.fetch import PolicyFetcher
    fetcher = PolicyFetcher(Path({str(tmp_path)!r}))
    (fetcher._folder / "aside").mkdir()
    time.sleep(600)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    wait_until("it has a folder", lambda: list(tmp_path.glob("*/aside")))
    other = PolicyFetcher(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # the first one lives
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    another = PolicyFetcher(tmp_path)
    assert not list(tmp_path.glob("*/aside"))
    assert len(list(tmp_path.iterdir())) == 2
    other.close()
    another.close()


# -- kill -9 in the midst of a transfer --------------------------------------------------------------------------------


@contextmanager
def child(act: Callable[[], object]) -> Iterator[None]:
    """Runs `act` in a process of its own, which has to die by SIGKILL before the block's end."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            act()
        finally:
            os._exit(1)
    try:
        yield
    finally:
        _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def die_at(owner: object, name: str, *, call: int) -> None:
    """Kills this process at the n-th call of a function."""
    real, calls = getattr(owner, name), itertools.count(1)

    def count(*arguments: object, **keywords: object) -> object:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **keywords)

    setattr(owner, name, count)


def test_a_trainer_that_is_killed_while_it_writes_leaves_the_version_before(tmp_path: Path) -> None:
    before = publish(tmp_path, 0, changed=0)

    def write_half() -> None:
        die_at(tensor_files.os, "pwrite", call=2)  # the header is written, the weights are not
        publish(tmp_path, 1, changed=9)

    with child(write_half):
        pass
    assert not locate_snapshot(tmp_path, 1).exists()
    verify_snapshot(before)
    verify_snapshot(publish(tmp_path, 1, changed=9))


@pytest.mark.parametrize(("method", "call"), [("_send_file", 3), ("_send_delta", 1)])
def test_a_trainer_that_is_killed_while_it_serves_leaves_no_half_policy(
    server: SnapshotServer,
    fetcher: PolicyFetcher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    call: int,
) -> None:
    monkeypatch.setattr(fetching, "RANGE_BYTES", BLOCK // 4)
    old, new = publish(tmp_path, 0, changed=0), publish(tmp_path, 1, changed=9)
    kept = [fetcher.fetch(server.offer(old))] if method == "_send_delta" else []
    told = tmp_path / "announced"

    def serve() -> None:
        die_at(SnapshotServer, method, call=call)
        path = SnapshotServer("127.0.0.1:0").offer(new).path
        told.with_suffix(".new").write_text(path)
        told.with_suffix(".new").rename(told)
        signal.pause()

    with child(serve):
        wait_until("it serves", told.exists)
        with pytest.raises(Unavailable):
            fetcher.fetch(replace(new, path=told.read_text()))
    assert not list((tmp_path / "worker").glob(f"*/{new.sha256}"))
    for policy in kept:
        verify_snapshot(policy)
    verify_snapshot(fetcher.fetch(server.offer(new)))


def test_a_worker_that_is_killed_while_it_fetches_leaves_no_half_policy(
    server: SnapshotServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "RANGE_BYTES", BLOCK // 4)
    announced = server.offer(publish(tmp_path, 0, changed=0))
    folder = tmp_path / "killed"
    folder.mkdir()

    def fetch_half() -> None:
        die_at(fetching.os, "pwrite", call=2)
        PolicyFetcher(folder).fetch(announced)

    with child(fetch_half):
        pass
    assert len(list(folder.iterdir())) == 1
    assert not list(folder.glob(f"*/{announced.sha256}"))
    again = PolicyFetcher(folder)
    verify_snapshot(again.fetch(announced))
    assert len(list(folder.iterdir())) == 1  # what the killed one left is gone
    again.close()
