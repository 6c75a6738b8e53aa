"""Several teachers behind one client: balanced, left when they fail, drain or freeze, and refused when they differ."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.api import BODY, error_of, start_api
from tests.support.models import save_untrained, tiny_vlm
from tests.support.teacher import (
    TeacherInProcess,
    TeacherProcess,
    drawing,
    teacher_in_process,
    teacher_process,
    token_request,
)
from tests.support.waiting import wait_until
from vaopd.access.certificates import make_certificates
from vaopd.client import SyncTeacherClient, TeacherClient, from_environment
from vaopd.client.replicas import _wait_for_connection, split_addresses
from vaopd.config import TeacherServiceConfig, TeacherTlsConfig
from vaopd.errors import ConfigError, Mismatch, TeacherFault, Unavailable
from vaopd.types import GroupScore, ScoreRequest
from vaopd.vlm.model import Vlm


def group(name: str, seed: int = 1) -> ScoreRequest:
    return token_request(tiny_vlm(), name, pictures=[drawing(seed)])


async def scored(client: TeacherClient, *groups: ScoreRequest) -> list[str]:
    results = [result async for result in client.score(groups)]
    assert all(isinstance(result, GroupScore) for result in results)
    return [result.group_id for result in results]


async def connected(client: TeacherClient) -> None:
    """Waits until it is, with every replica."""
    for replica in client._replicas._all:
        await _wait_for_connection([replica])


def listed(*teachers: TeacherInProcess | TeacherProcess) -> str:
    return ",".join(teacher.target for teacher in teachers)


def served(teacher: TeacherInProcess) -> int:
    return teacher.server.scheduler.served("default").groups


@pytest.fixture
def two() -> Iterator[tuple[TeacherInProcess, TeacherInProcess]]:
    with teacher_in_process(tiny_vlm()) as one, teacher_in_process(tiny_vlm()) as other:
        yield one, other


@pytest.fixture
async def client(two: tuple[TeacherInProcess, TeacherInProcess]) -> AsyncIterator[TeacherClient]:
    async with TeacherClient(listed(*two), timeout_s=30) as client:
        yield client


def test_a_target_lists_addresses_by_name_or_number() -> None:
    assert split_addresses("one:1,[::1]:2") == ["one:1", "[::1]:2"]
    assert split_addresses("ipv4:10.0.0.1:1,10.0.0.2:2") == ["10.0.0.1:1", "10.0.0.2:2"]
    for wrong in ("", "one:1,", "one:1,one:1"):
        with pytest.raises(ConfigError, match="must list addresses host:port, each once"):
            split_addresses(wrong)
    for wrong in ("one", "one:", ":1", "one:1,two", "http://one:1", "one:65536", "one:-1", "[::1]"):  # 65536 would be 0
        with pytest.raises(ConfigError, match="is not HOST:PORT with a port from 0 to 65535"):
            split_addresses(wrong)
    assert split_addresses("dns:///one:1,unix:/run/teacher") == ["dns:///one:1", "unix:/run/teacher"]


async def test_calls_go_to_who_has_least_to_do_and_each_replica_gets_the_images_it_needs(
    client: TeacherClient, two: tuple[TeacherInProcess, TeacherInProcess]
) -> None:
    await connected(client)
    await asyncio.gather(*(scored(client, group(f"g{n}", seed=n % 3)) for n in range(12)))
    assert sum(map(served, two)) == 12
    assert all(served(teacher) >= 4 for teacher in two)


async def test_a_draining_replica_is_left_at_once(
    client: TeacherClient, two: tuple[TeacherInProcess, TeacherInProcess]
) -> None:
    await client.describe()
    one, other = two
    one.begin_stop().result()
    before = served(other)
    for n in range(4):
        assert await scored(client, group(f"g{n}")) == [f"g{n}"]
    assert served(other) - before == 4


async def test_one_of_them_may_be_down_from_the_start() -> None:
    with socket.socket() as nobody, teacher_in_process(tiny_vlm()) as teacher:
        nobody.bind(("127.0.0.1", 0))  # not listening: connections are refused
        down = f"127.0.0.1:{nobody.getsockname()[1]}"
        async with TeacherClient(f"{down},{teacher.target}", timeout_s=30) as client:
            assert (await client.describe()).revision == teacher.description.revision
            assert await scored(client, group("g")) == ["g"]


async def test_all_of_them_down_is_unavailable() -> None:
    async with TeacherClient("127.0.0.1:1,localhost:1", timeout_s=0.5) as client:
        with pytest.raises(Unavailable, match="can't be reached"):
            await client.describe()


async def test_replicas_of_different_models_are_refused_by_name(tmp_path: Path) -> None:
    stranger = Vlm.load(save_untrained(tmp_path, seed=7), dtype="float32", device_map="cpu")
    with teacher_in_process(tiny_vlm()) as one, teacher_in_process(stranger) as other:
        async with TeacherClient(listed(one, other), timeout_s=30) as client:
            with pytest.raises(TeacherFault) as caught:
                await client.describe()
    for part in (one.target, one.description.revision[:12], other.target, other.description.revision[:12]):
        assert part in str(caught.value)


async def test_a_replica_that_comes_back_as_another_model_is_refused_by_name(tmp_path: Path) -> None:
    stranger = Vlm.load(save_untrained(tmp_path, seed=7), dtype="float32", device_map="cpu")
    with ExitStack() as stack:
        one = stack.enter_context(teacher_in_process(tiny_vlm()))
        async with TeacherClient(one.target, timeout_s=30) as client:
            await scored(client, group("before"))
            one.begin_stop().result()
            other = stack.enter_context(teacher_in_process(stranger, address=one.target))
            with pytest.raises(Mismatch) as caught:
                await scored(client, group("after"))
    assert one.description.revision[:12] in str(caught.value)
    assert other.description.revision[:12] in str(caught.value)


async def test_names_and_tls_are_no_different(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    service = TeacherServiceConfig(tls=TeacherTlsConfig(cert=tmp_path / "server.pem", key=tmp_path / "server.key"))
    credentials = from_environment({"VAOPD_TLS_CA": str(tmp_path / "ca.pem")})
    with teacher_in_process(tiny_vlm(), service=service) as one, teacher_in_process(tiny_vlm(), service=service) as two:
        by_name = one.target.replace("127.0.0.1", "localhost")
        async with TeacherClient(f"{by_name},{two.target}", timeout_s=30, **credentials) as client:
            await connected(client)
            await asyncio.gather(*(scored(client, group(f"g{n}")) for n in range(6)))
        assert served(one) > 0
        assert served(two) > 0


def test_closing_the_client_ends_every_wait_for_an_absent_teacher() -> None:
    """What lets a trainer that is told to stop end while its teacher is away."""
    client = SyncTeacherClient("127.0.0.1:1", timeout_s=300)
    request = group("g")  # here, since what it imports is not to be imported by three threads at once
    ends: list[BaseException] = []

    def wait() -> None:
        try:
            list(client.score([request]))
        except Unavailable as error:
            ends.append(error)

    waiting = [threading.Thread(target=wait) for _ in range(3)]
    for thread in waiting:
        thread.start()
    # Each thread's own task, beside those that look for a connection.
    loop = client._loop._loop
    asked = lambda: [task for task in asyncio.all_tasks(loop) if "read_next" in str(task.get_coro())]  # noqa: E731
    wait_until("they wait", lambda: len(asked()) == 3)
    client.close()
    for thread in waiting:
        thread.join(10)
    assert [str(end) for end in ends] == ["this client of the teacher was closed while it waited for an answer"] * 3
    with pytest.raises(Unavailable, match="is closed"):
        client.describe()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_replica_that_dies_or_freezes_in_mid_call_costs_no_group(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: signal.Signals
) -> None:
    """A frozen one is noticed since it doesn't answer the client's pings, long before a call is given up as silent."""
    groups = [group(f"g{n}", seed=n % 5) for n in range(100)]
    with ExitStack() as stack:
        teachers = {}
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            # Small forwards: the call takes a while, so that it can be met in its middle.
            teacher = stack.enter_context(teacher_process(tmp_path / name, batch_tokens=200))
            teachers[teacher.target] = teacher
        client = stack.enter_context(SyncTeacherClient(",".join(teachers), timeout_s=120))
        client.describe()
        results = client.score(groups)
        names = [next(results).group_id]
        (working,) = (replica.target for replica in client._client._replicas._all if replica.groups)
        teachers[working].send(how)
        names += [result.group_id for result in results if isinstance(result, GroupScore)]
    assert sorted(names) == sorted(group.group_id for group in groups)
    assert f"{working} can't be reached" in caplog.text


def test_an_api_before_two_replicas_answers_while_one_is_down(tmp_path: Path) -> None:
    with teacher_in_process(tiny_vlm()) as one, teacher_in_process(tiny_vlm()) as other:
        for api in start_api(tmp_path, listed(one, other)):
            before = api.known_answer()
            one.begin_stop().result()
            assert api.known_answer() == before
            assert len(api.http.get("/v1/teachers").json()["teachers"]) == 1  # two replicas are one teacher


def test_an_api_before_replicas_that_differ_says_so_without_saying_where_they_are(tmp_path: Path) -> None:
    stranger = Vlm.load(save_untrained(tmp_path / "stranger", seed=7), dtype="float32", device_map="cpu")
    with teacher_in_process(tiny_vlm()) as one, teacher_in_process(stranger) as other:
        for api in start_api(tmp_path, listed(one, other)):
            answer = api.score(**BODY)
            assert answer.status_code == 502
            assert "doesn't answer as expected" in error_of(answer)["detail"]
            assert "127.0.0.1" not in answer.text
