"""Who may call the teacher: a key per job, TLS, quotas; what a refused caller learns, and what the audit log keeps."""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pool
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.support.models import tiny_vlm
from tests.support.teacher import TeacherInProcess, drawing, encoded, teacher_in_process, token_request
from vaopd.access.certificates import make_certificates
from vaopd.access.keys import add_key, revoke_key
from vaopd.client import SyncTeacherClient, from_environment
from vaopd.config import KeysConfig, QuotasConfig, TeacherServiceConfig, TeacherTlsConfig
from vaopd.errors import Busy, ConfigError, LimitExceeded, PermissionDenied, Unauthenticated, Unavailable
from vaopd.pb import teacher_pb2 as pb
from vaopd.pb import teacher_pb2_grpc
from vaopd.types import EncodedImage, GroupScore, ScoreRequest
from vaopd.wire.common import image_to_pb
from vaopd.wire.teacher import score_request_to_pb
from vaopd_teacher.server import SERVICE

UNAUTHENTICATED, DENIED = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED


@dataclass(frozen=True)
class Guarded:
    teacher: TeacherInProcess
    file: Path
    geometry: str
    """The key of job "geometry"."""
    other: str


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    keys = add_key(file, "geometry"), add_key(file, "other")
    service = TeacherServiceConfig(keys=KeysConfig(file=file))
    with teacher_in_process(tiny_vlm(), service=service) as teacher:
        yield Guarded(teacher, file, *keys)


@pytest.fixture
def channel(guarded: Guarded) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(guarded.teacher.target) as channel:
        yield channel


def group(name: str = "g") -> ScoreRequest:
    return token_request(tiny_vlm(), name, pictures=[drawing(1)])


def score_request(job: str) -> pb.ScoreGroupsRequest:
    return score_request_to_pb([token_request(tiny_vlm(), "g")], job=job, payload="none")


def with_key(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


def status(call) -> tuple[grpc.StatusCode, str]:
    """Of a call that is refused."""
    with pytest.raises(grpc.RpcError) as caught:
        list(call())  # a call with a single answer raises before there is anything to list
    return caught.value.code(), caught.value.details()  # type: ignore[attr-defined]


def methods() -> Iterator[tuple[str, bool, bool, bytes]]:
    """Every method that the server's own description lists: path, streams in, streams out, an empty request."""
    pool = descriptor_pool.Default()
    for service in (SERVICE, "grpc.reflection.v1alpha.ServerReflection"):
        for method in pool.FindServiceByName(service).methods:
            request = GetMessageClass(method.input_type)().SerializeToString()
            yield f"/{service}/{method.name}", method.client_streaming, method.server_streaming, request


METHODS = list(methods())


def test_the_walk_below_meets_every_method_of_the_teacher() -> None:
    assert {path.rpartition("/")[2] for path, *_ in METHODS} >= {
        "Describe",
        "PutImages",
        "MissingImages",
        "ScoreGroups",
        "GetHead",
    }


@pytest.mark.parametrize("key", [None, "vaopd_nonsense"], ids=["no key", "malformed key"])
@pytest.mark.parametrize(("path", "streams_in", "streams_out", "request_"), METHODS, ids=[path for path, *_ in METHODS])
def test_no_method_answers_without_a_key(
    channel: grpc.Channel, path: str, streams_in: bool, streams_out: bool, request_: bytes, key: str | None
) -> None:
    kind = f"{'stream' if streams_in else 'unary'}_{'stream' if streams_out else 'unary'}"
    call = getattr(channel, kind)(path)
    metadata = () if key is None else with_key(key)
    code, _ = status(lambda: call(iter([request_]) if streams_in else request_, metadata=metadata, timeout=10))
    assert code is UNAUTHENTICATED


def test_health_is_told_without_a_key(channel: grpc.Channel) -> None:
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_answers_with_a_key(guarded: Guarded, channel: grpc.Channel) -> None:
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
        iter([ask]), metadata=with_key(guarded.other)
    )
    assert SERVICE in {service.name for service in next(call).list_services_response.service}


def test_nothing_is_read_of_a_request_without_a_key(channel: grpc.Channel) -> None:
    """Bytes that are no message at all get the same answer: they are not even parsed."""
    assert (
        status(lambda: channel.unary_stream(f"/{SERVICE}/ScoreGroups")(b"\xff\xff", timeout=10))[0] is UNAUTHENTICATED
    )


def test_a_job_scores_with_its_key(guarded: Guarded) -> None:
    with SyncTeacherClient(guarded.teacher.target, job="geometry", api_key=guarded.geometry) as client:
        (result,) = client.score([group()])
        assert client.head().shape[0] == tiny_vlm().vocab_size
    assert isinstance(result, GroupScore)


def test_who_names_no_job_works_for_the_keys_own(guarded: Guarded) -> None:
    with SyncTeacherClient(guarded.teacher.target, api_key=guarded.other) as client:
        (result,) = client.score([token_request(tiny_vlm(), "g")])
    assert isinstance(result, GroupScore)
    assert guarded.teacher.server.scheduler.served("other").groups >= 1


def test_another_job_and_one_that_isnt_there_are_refused_alike(guarded: Guarded, channel: grpc.Channel) -> None:
    stub = teacher_pb2_grpc.TeacherStub(channel)
    answers = {
        job: status(lambda job=job: stub.ScoreGroups(score_request(job), metadata=with_key(guarded.geometry)))
        for job in ("other", "nobody")
    }
    assert answers["other"][0] is DENIED
    assert answers["nobody"] == (DENIED, answers["other"][1].replace("other", "nobody"))


def test_the_client_raises_what_it_is_refused_for_and_doesnt_try_again(guarded: Guarded) -> None:
    target = guarded.teacher.target
    with SyncTeacherClient(target) as client, pytest.raises(Unauthenticated, match="an API key is needed here"):
        client.describe()
    with (
        SyncTeacherClient(target, job="other", api_key=guarded.geometry) as client,
        pytest.raises(PermissionDenied, match="not for job 'other'"),
    ):
        list(client.score([token_request(tiny_vlm(), "g")]))


def test_a_revoked_key_is_refused_from_then_on(guarded: Guarded) -> None:
    key = add_key(guarded.file, "brief")
    with SyncTeacherClient(guarded.teacher.target, api_key=key) as client:
        client.describe()
        revoke_key(guarded.file, key.split("_")[1])
        with pytest.raises(Unauthenticated, match="is revoked"):
            client.describe()


def test_a_refused_call_is_a_line_of_the_audit_log_without_the_key(
    guarded: Guarded, channel: grpc.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    stub = teacher_pb2_grpc.TeacherStub(channel)
    forged = guarded.geometry[:-3] + "xyz"
    with caplog.at_level(logging.INFO):
        status(lambda: stub.Describe(pb.DescribeRequest(), metadata=with_key(forged)))
        status(lambda: stub.ScoreGroups(score_request("other"), metadata=with_key(guarded.geometry)))
        status(lambda: stub.GetHead(pb.GetHeadRequest(revision="e" * 64), metadata=with_key(guarded.geometry)))
    lines = [record.getMessage() for record in caplog.records if record.name == "vaopd.audit"]
    peer = "ipv4:127.0.0.1:"
    assert [line.partition(peer)[0] for line in lines] == [
        "refused: job -, /vaopd.v1.Teacher/Describe, UNAUTHENTICATED, ",
        "refused: job 'geometry', /vaopd.v1.Teacher/ScoreGroups, PERMISSION_DENIED, ",
        "refused: job 'geometry', /vaopd.v1.Teacher/GetHead, FAILED_PRECONDITION, ",
    ]
    assert all(peer in line for line in lines)
    for secret in (forged, guarded.geometry):
        assert secret.split("_", 2)[2][:8] not in caplog.text


def test_a_used_up_quota_says_when_to_ask_again(tmp_path: Path) -> None:
    keys = {job: add_key(tmp_path / "keys.json", job) for job in ("small", "large")}
    service = TeacherServiceConfig(
        keys=KeysConfig(file=tmp_path / "keys.json"), quotas=QuotasConfig(groups_per_minute=100, jobs={"small": 2})
    )
    groups = [token_request(tiny_vlm(), f"g{n}", responses=["12"]) for n in range(3)]
    with teacher_in_process(tiny_vlm(), service=service) as teacher:
        with SyncTeacherClient(teacher.target, api_key=keys["small"], patience_s=0.0) as client:
            assert len(list(client.score(groups[:2]))) == 2
            with pytest.raises(Busy, match=r"quota of 2 in a minute; try again in \d+ s") as caught:
                list(client.score(groups[:1]))
            # One group every 30 s; less is left when the two took a while.
            assert 0 < caught.value.retry_after_s <= 30
            with pytest.raises(LimitExceeded, match="3 groups in one call, the job's quota is 2"):
                list(client.score(groups))
        with SyncTeacherClient(teacher.target, api_key=keys["large"]) as client:
            assert len(list(client.score(groups))) == 3


def test_a_used_up_quota_of_image_bytes_says_when_to_upload_again(tmp_path: Path) -> None:
    """An image that is stored already costs nothing, and another job's quota is its own."""
    images = [encoded(drawing(n)) for n in range(3)]
    size = max(len(image.data) for image in images)
    keys = {job: add_key(tmp_path / "keys.json", job) for job in ("small", "other")}
    service = TeacherServiceConfig(
        keys=KeysConfig(file=tmp_path / "keys.json"), quotas=QuotasConfig(image_bytes_per_minute=2 * size)
    )
    large = encoded(drawing(9, (300, 300)))
    with teacher_in_process(tiny_vlm(), service=service) as teacher, grpc.insecure_channel(teacher.target) as channel:
        stub = teacher_pb2_grpc.TeacherStub(channel)

        def put(image: EncodedImage, job: str) -> list[str]:
            return list(stub.PutImages(iter([image_to_pb(image)]), metadata=with_key(keys[job])).sha256)

        for image in (*images[:2], *images[:2]):
            assert put(image, "small") == [image.sha256]
        with pytest.raises(grpc.RpcError, match=f"of {2 * size} in a minute; try again in [0-9.]+ s") as refused:
            put(images[2], "small")
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
        packed = dict(refused.value.trailing_metadata())["grpc-status-details-bin"]  # type: ignore[attr-defined]
        hints = [
            d for d in status_pb2.Status.FromString(packed).details if d.Is(error_details_pb2.RetryInfo.DESCRIPTOR)
        ]
        # The bucket refills 2 · size in 60 s, and at most one image of it lacks.
        assert 0 < error_details_pb2.RetryInfo.FromString(hints[0].value).retry_delay.ToMilliseconds() <= 30_000
        assert put(images[2], "other") == [images[2].sha256]
        with pytest.raises(grpc.RpcError, match=f"{len(large.data)} bytes is above the job's quota"):
            put(large, "other")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    make_certificates(folder)
    return folder


def tls(folder: Path, *, mutual: bool = False) -> TeacherServiceConfig:
    return TeacherServiceConfig(
        tls=TeacherTlsConfig(
            cert=folder / "server.pem",
            key=folder / "server.key",
            client_ca=folder / "ca.pem" if mutual else None,
        )
    )


def environment(folder: Path, *, mutual: bool = False) -> dict[str, str]:
    certificate = {"VAOPD_TLS_CERT": str(folder / "client.pem"), "VAOPD_TLS_KEY": str(folder / "client.key")}
    return {"VAOPD_TLS_CA": str(folder / "ca.pem"), **(certificate if mutual else {})}


@pytest.mark.parametrize("mutual", [False, True], ids=["TLS", "mTLS"])
def test_scores_travel_encrypted(certificates: Path, mutual: bool) -> None:
    credentials = from_environment(environment(certificates, mutual=mutual))
    with (
        teacher_in_process(tiny_vlm(), service=tls(certificates, mutual=mutual)) as teacher,
        SyncTeacherClient(teacher.target, **credentials) as client,
    ):
        (result,) = client.score([group()])
    assert isinstance(result, GroupScore)


def test_a_server_with_tls_takes_no_plaintext_no_stranger_and_no_old_protocol(
    certificates: Path, tmp_path: Path
) -> None:
    make_certificates(tmp_path)
    with teacher_in_process(tiny_vlm(), service=tls(certificates)) as teacher:
        for credentials in ({}, from_environment(environment(tmp_path))):  # plaintext; trusts another authority
            with SyncTeacherClient(teacher.target, timeout_s=0.5, **credentials) as client, pytest.raises(Unavailable):
                client.describe()
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_1
        host, _, port = teacher.target.rpartition(":")
        with socket.create_connection((host, int(port))) as plain, pytest.raises(ssl.SSLError):
            old.wrap_socket(plain)


def test_mtls_asks_for_a_certificate_of_its_authority(certificates: Path, tmp_path: Path) -> None:
    make_certificates(tmp_path)
    foreign = {**environment(tmp_path, mutual=True), "VAOPD_TLS_CA": str(certificates / "ca.pem")}
    with teacher_in_process(tiny_vlm(), service=tls(certificates, mutual=True)) as teacher:
        for variables in (environment(certificates), foreign):
            credentials = from_environment(variables)
            with SyncTeacherClient(teacher.target, timeout_s=0.5, **credentials) as client, pytest.raises(Unavailable):
                client.describe()


def test_a_renewed_certificate_is_used_without_a_restart(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    old = from_environment(environment(tmp_path))
    with teacher_in_process(tiny_vlm(), service=tls(tmp_path)) as teacher:
        with SyncTeacherClient(teacher.target, **old) as client:
            client.describe()
        make_certificates(tmp_path, replace=True)
        with SyncTeacherClient(teacher.target, **from_environment(environment(tmp_path))) as client:
            client.describe()
        with SyncTeacherClient(teacher.target, timeout_s=0.5, **old) as client, pytest.raises(Unavailable):
            client.describe()


def start(service: TeacherServiceConfig, address: str = "127.0.0.1:0") -> None:
    with teacher_in_process(tiny_vlm(), service=service, address=address):
        pass


def test_plaintext_for_other_hosts_has_to_be_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"'0\.0\.0\.0:0' can be reached from other hosts.*plaintext = true"):
        start(TeacherServiceConfig(), "0.0.0.0:0")
    start(TeacherServiceConfig(tls=TeacherTlsConfig(plaintext=True)), "0.0.0.0:0")


@pytest.mark.parametrize("broken", ["missing", "no PEM", "another key"])
def test_certificates_that_cant_be_used_are_told_at_the_start(certificates: Path, tmp_path: Path, broken: str) -> None:
    key = tmp_path / "server.key"
    if broken == "no PEM":
        key.write_text("no PEM")
    if broken == "another key":
        key.write_bytes((certificates / "client.key").read_bytes())
    service = tls(certificates)
    with pytest.raises(ConfigError, match=r"\[teacher\.tls\] .*server\.key"):
        start(service.model_copy(update={"tls": service.tls.model_copy(update={"key": key})}))


def test_an_error_of_the_envelope_names_its_field(channel: grpc.Channel, guarded: Guarded) -> None:
    request = score_request("geometry")
    request.groups.append(replace_id(request.groups[0], ""))
    with pytest.raises(grpc.RpcError) as caught:
        list(teacher_pb2_grpc.TeacherStub(channel).ScoreGroups(request, metadata=with_key(guarded.geometry)))
    packed = dict(caught.value.trailing_metadata())["grpc-status-details-bin"]  # type: ignore[attr-defined]
    (violations,) = [
        error_details_pb2.BadRequest.FromString(detail.value).field_violations
        for detail in status_pb2.Status.FromString(packed).details
        if detail.Is(error_details_pb2.BadRequest.DESCRIPTOR)
    ]
    assert [violation.field for violation in violations] == ["groups[1].group_id"]


def replace_id(message: pb.PromptGroup, group_id: str) -> pb.PromptGroup:
    changed = pb.PromptGroup()
    changed.CopyFrom(message)
    changed.group_id = group_id
    return changed
