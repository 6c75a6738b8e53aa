"""Both ends of the teacher's gRPC: a server whose answers are a function of the request, and the real client's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import grpc

from tests.faults.chaos.world import JOB, scores_of
from vaopd.client import GroupFailure, SyncTeacherClient
from vaopd.pb import teacher_pb2 as pb
from vaopd.pb import teacher_pb2_grpc
from vaopd.types import RolloutGroup, ScoreRequest, TeacherDescription, TeacherLimits
from vaopd.wire.common import tensor_to_pb
from vaopd.wire.teacher import description_to_pb

# As the real server's: the client's pings are welcome.
OPTIONS = [("grpc.keepalive_permit_without_calls", 1), ("grpc.http2.min_ping_interval_without_data_ms", 5000)]


class _Teacher(teacher_pb2_grpc.TeacherServicer):
    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.TeacherDescription:
        return description_to_pb(
            TeacherDescription(
                model="chaos",
                revision="0" * 64,
                tokenizer_fingerprint="0" * 64,
                vocab_size=1000,
                hidden_size=8,
                dtype="float32",
                limits=TeacherLimits(),
                payloads=("none",),
                degradations=("pixelate",),
            )
        )

    def ScoreGroups(
        self, request: pb.ScoreGroupsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ScoreGroupsResponse]:
        for group in request.groups:
            responses = [list(rollout.response_ids) for rollout in group.rollouts]
            original, degraded = scores_of(group.group_id, responses)
            yield pb.ScoreGroupsResponse(
                score=pb.GroupScore(
                    group_id=group.group_id,
                    lengths=[len(ids) for ids in responses],
                    teacher_logprobs=tensor_to_pb(original),
                    degraded_logprobs=tensor_to_pb(degraded),
                    visual_advantage=tensor_to_pb((original - degraded).clip(min=0)),
                    prompt_tokens=len(group.tokens.token_ids),
                )
            )


def serve(port: int) -> None:
    """Until it is killed."""
    server = grpc.server(ThreadPoolExecutor(4), options=OPTIONS)
    teacher_pb2_grpc.add_TeacherServicer_to_server(_Teacher(), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    server.wait_for_termination()


class Asking(AbstractContextManager["Asking"]):
    """Scores groups, retrying as the trainer does: group_id -> the teacher's log-probs, (M,)."""

    def __init__(self, target: str) -> None:
        self._client = SyncTeacherClient(target, job=JOB, payload="none", timeout_s=60)

    def __exit__(self, *exception: object) -> None:
        self._client.close()

    def __call__(self, groups: Sequence[RolloutGroup]) -> dict[str, list[float]]:
        requests = [
            ScoreRequest(
                group_id=group.group_id,
                responses=tuple(rollout.response_ids for rollout in group.rollouts),
                prompt_token_ids=group.prompt_token_ids,
            )
            for group in groups
        ]
        scores = {}
        for answer in self._client.score(requests):
            if isinstance(answer, GroupFailure):
                raise answer.error
            scores[answer.group_id] = [value for row in answer.teacher_logprobs for value in row.tolist()]
        return scores
