"""What a client makes of a teacher's stream: chunks become tensors, a score and its tensors become a GroupScore.

Every number that was promised has to be there, in order and finite; nothing is filled in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from vaopd.errors import Mismatch, NumericalError, VaopdError
from vaopd.pb import common_pb2
from vaopd.pb import teacher_pb2 as pb
from vaopd.types import ITEMSIZE_BYTES, GroupScore, Payload, PayloadKind, ScoreRequest, Tensor
from vaopd.wire.common import checked_tensor, tensor_from_pb


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupFailure:
    """A group that was not scored, and why; the other groups of the request are not concerned.

    >>> GroupFailure(group_id="g7", error=NumericalError("3 log-probs are not finite")).error.args[0]
    '3 log-probs are not finite'
    """

    group_id: str
    error: VaopdError


class TensorAssembly:
    """One tensor out of its chunks."""

    def __init__(self, declared: pb.PayloadTensor) -> None:
        if declared.dtype not in ITEMSIZE_BYTES:
            raise Mismatch(f"the teacher sends tensor {declared.name!r} as {declared.dtype!r}, which is unknown here")
        self._declared = declared
        self._size_bytes = math.prod(declared.shape) * ITEMSIZE_BYTES[declared.dtype]
        self._received_bytes = 0
        self._chunks: list[bytes] = []

    @property
    def complete(self) -> bool:
        return self._received_bytes == self._size_bytes

    def add(self, chunk: pb.TensorChunk) -> None:
        end = chunk.offset_bytes + len(chunk.data)
        if chunk.offset_bytes != self._received_bytes or end > self._size_bytes or not chunk.data:
            raise Mismatch(
                f"tensor {self._declared.name!r}: a chunk covers bytes {chunk.offset_bytes} to {end}, expected one "
                f"from {self._received_bytes} within {self._size_bytes}; client and teacher are of different versions"
            )
        self._chunks.append(chunk.data)
        self._received_bytes = end

    def tensor(self) -> Tensor:
        return checked_tensor(self._declared.dtype, tuple(self._declared.shape), b"".join(self._chunks))


class GroupAssembly:
    """One group's answer."""

    def __init__(self, score: pb.GroupScore, request: ScoreRequest, payload: PayloadKind) -> None:
        self._score = score
        self._request = request
        self._payload = payload
        self._tensors = {declared.name: TensorAssembly(declared) for declared in score.payload}

    @property
    def complete(self) -> bool:
        return all(tensor.complete for tensor in self._tensors.values())

    def add(self, chunk: pb.TensorChunk) -> None:
        if chunk.name not in self._tensors:
            raise Mismatch(f"group {chunk.group_id!r}: a chunk of tensor {chunk.name!r}, which wasn't announced")
        self._tensors[chunk.name].add(chunk)

    def result(self) -> GroupScore | GroupFailure:
        score = self._score
        lengths = list(score.lengths)
        self._check_lengths(lengths)
        columns = [
            self._column(message, name, sum(lengths))
            for message, name in (
                (score.teacher_logprobs, "teacher_logprobs"),
                (score.degraded_logprobs, "degraded_logprobs"),
                (score.visual_advantage, "visual_advantage"),
            )
        ]
        if bad := sum(int((~np.isfinite(column)).sum()) for column in columns):
            error = NumericalError(f"group {score.group_id!r}: {bad} of the teacher's numbers are not finite")
            return GroupFailure(group_id=score.group_id, error=error)
        edges = np.cumsum(lengths)[:-1]
        teacher, degraded, advantage = (tuple(np.split(column, edges)) for column in columns)
        response_ids = token_texts = None
        if score.token_texts:
            response_ids = tuple(np.split(np.array(score.response_ids, dtype=np.int32), edges))
            starts = [0, *edges.tolist(), sum(lengths)]
            token_texts = tuple(tuple(score.token_texts[start:end]) for start, end in pairwise(starts))
        return GroupScore(
            group_id=score.group_id,
            teacher_logprobs=teacher,
            degraded_logprobs=degraded,
            visual_advantage=advantage,
            payload=Payload(
                kind=self._payload, tensors={name: tensor.tensor() for name, tensor in self._tensors.items()}
            ),
            prompt_tokens=score.prompt_tokens,
            response_ids=response_ids,
            token_texts=token_texts,
            payload_texts=dict(score.payload_texts),
        )

    def _check_lengths(self, lengths: list[int]) -> None:
        """A response that was sent as ids has as many scores as ids."""
        responses = self._request.responses
        sent = [None if isinstance(response, str) else len(response) for response in responses]
        if len(sent) != len(lengths) or any(s not in (None, n) for s, n in zip(sent, lengths, strict=True)):
            raise Mismatch(
                f"group {self._score.group_id!r}: responses of {sent} tokens were sent, {lengths} were scored; "
                "client and teacher are of different versions"
            )

    def _column(self, message: common_pb2.Tensor, name: str, tokens: int) -> np.ndarray:
        tensor = tensor_from_pb(message)
        if tensor.dtype != "float32" or tensor.shape != (tokens,):
            raise Mismatch(
                f"group {self._score.group_id!r}: {name} is {tensor.dtype} of shape {tensor.shape}, "
                f"expected float32 of shape ({tokens},)"
            )
        return tensor.numpy()
