"""Puts a teacher's stream together: chunks become tensors, a score and its tensors become a GroupScore.

Every number that was announced has to arrive, in order and possible: finite, no log-prob above 0, VA the difference of
the views. Nothing is filled in, and nothing is made room for that the answer can't need.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import pairwise

import numpy as np

from vaopd.columns import COLUMNS
from vaopd.errors import Mismatch, NumericalError, TeacherFault
from vaopd.pb import common_pb2
from vaopd.pb import teacher_pb2 as pb
from vaopd.types import (
    ITEMSIZE_BYTES,
    GroupFailure,
    GroupScore,
    Payload,
    PayloadKind,
    ScoreRequest,
    TeacherDescription,
    Tensor,
)
from vaopd.wire.common import check_tensor, tensor_from_pb
from vaopd.wire.teacher import columns_from_pb

ROUNDING_NATS = 1e-3
"""Of a log-prob or VA: float32 errs by 1e-5 with logits of 100; anything beyond this is no rounding."""
MAX_BYTES_PER_ROW = 2**20
"""Of a payload's tensor; the widest is a hidden state of some ten thousand numbers."""
MAX_VOCABULARY, MAX_PIXELS, MAX_NAME = 2**24, 2**28, 1024


def check_description(found: TeacherDescription, target: str) -> None:
    """Raises TeacherFault for what no teacher can be: the client makes room and pictures by it, and shows its names."""
    fewest, most = found.pixel_bounds or (1, 1)
    numbers = {"vocab_size": found.vocab_size, "hidden_size": found.hidden_size, **asdict(found.limits)}
    wrong = [f"{name} = {value}" for name, value in numbers.items() if value < 1]
    wrong += [f"vocab_size = {found.vocab_size}"] * (found.vocab_size > MAX_VOCABULARY)
    wrong += [f"pixel_bounds = {found.pixel_bounds}"] * (not 1 <= fewest <= most <= MAX_PIXELS)
    names = {"model": found.model, "revision": found.revision, "dtype": found.dtype}
    wrong += [f"{name} of {len(text)} characters" for name, text in names.items() if len(text) > MAX_NAME]
    if wrong:
        raise TeacherFault(f"the teacher at {target} describes itself with {wrong[0]}; is it one, of this version?")


class TensorAssembly:
    """Collects the chunks of one tensor."""

    def __init__(self, declared: pb.PayloadTensor, *, rows: int) -> None:
        """`rows`: one per token, M, or V of a head. Raises Mismatch for an unknown dtype or another shape."""
        if declared.dtype not in ITEMSIZE_BYTES:
            raise Mismatch(f"the teacher sends tensor {declared.name!r} as {declared.dtype!r}, which is unknown here")
        shape = list(declared.shape)
        row_bytes = math.prod(shape[1:]) * ITEMSIZE_BYTES[declared.dtype]
        if shape[:1] != [rows] or min(shape) < 1 or row_bytes > MAX_BYTES_PER_ROW:
            raise Mismatch(
                f"the teacher announces tensor {declared.name!r} of shape {shape[:8]}; expected {rows} rows of 1 to "
                f"{MAX_BYTES_PER_ROW} bytes"
            )
        self._declared = declared
        self._size_bytes = math.prod(declared.shape) * ITEMSIZE_BYTES[declared.dtype]
        self._received_bytes = 0
        self._chunks: list[bytes] = []

    @property
    def complete(self) -> bool:
        """Whether all bytes have arrived."""
        return self._received_bytes == self._size_bytes

    def add(self, chunk: pb.TensorChunk) -> None:
        """Adds the next chunk. Raises Mismatch for one out of order, or beyond the tensor's end."""
        end = chunk.offset_bytes + len(chunk.data)
        if chunk.offset_bytes != self._received_bytes or end > self._size_bytes or not chunk.data:
            raise Mismatch(
                f"tensor {self._declared.name!r}: a chunk covers bytes {chunk.offset_bytes} to {end}, expected one "
                f"from {self._received_bytes} within {self._size_bytes}; client and teacher are of different versions"
            )
        self._chunks.append(chunk.data)
        self._received_bytes = end

    def make_tensor(self) -> Tensor:
        """Returns the tensor, once it is complete."""
        return check_tensor(self._declared.dtype, tuple(self._declared.shape), b"".join(self._chunks))


class GroupAssembly:
    """Collects one group's answer: its score, then the chunks of its payload."""

    def __init__(
        self, score: pb.GroupScore, request: ScoreRequest, payload: PayloadKind, columns: Iterable[str] = ()
    ) -> None:
        """`columns`: the names that were asked for. Raises Mismatch for lengths or tensors that don't fit."""
        self._score = score
        self._request = request
        self._payload = payload
        self._columns = tuple(columns)
        self._lengths = list(score.lengths)
        self._check_lengths(self._lengths)
        self._tensors = {declared.name: TensorAssembly(declared, rows=sum(self._lengths)) for declared in score.payload}

    @property
    def complete(self) -> bool:
        """Whether every tensor that the score announced has arrived."""
        return all(tensor.complete for tensor in self._tensors.values())

    def add(self, chunk: pb.TensorChunk) -> None:
        """Adds the next chunk of a tensor. Raises Mismatch for a tensor that was not announced."""
        if chunk.name not in self._tensors:
            raise Mismatch(f"group {chunk.group_id!r}: a chunk of tensor {chunk.name!r}, which wasn't announced")
        self._tensors[chunk.name].add(chunk)

    def make_result(self) -> GroupScore | GroupFailure:
        """Returns the score, or a failure when one of its numbers can't be: not finite, or contradicting the others.

        Raises Mismatch when a column is missing, or has another shape or dtype than the responses ask for.
        """
        score, lengths = self._score, self._lengths
        edges = np.cumsum(lengths)[:-1]
        columns = {
            name: self._make_column(tensor, name, sum(lengths)) for name, tensor in columns_from_pb(score).items()
        }
        if missing := set(self._columns) - columns.keys():
            raise Mismatch(
                f"group {score.group_id!r}: the teacher sent no column {sorted(missing)[0]}; it is of an older version"
            )
        tensors = {name: tensor.make_tensor() for name, tensor in self._tensors.items()}
        if problem := _find_impossible(columns, tensors):
            error = NumericalError(f"group {score.group_id!r}: {problem}")
            return GroupFailure(group_id=score.group_id, error=error)
        rows = {name: tuple(np.split(column, edges)) for name, column in columns.items()}
        response_ids = token_texts = None
        if score.token_texts:
            if not len(score.token_texts) == len(score.response_ids) == sum(lengths):
                raise Mismatch(
                    f"group {score.group_id!r}: {len(score.token_texts)} token texts and {len(score.response_ids)} ids "
                    f"came for {sum(lengths)} tokens"
                )
            response_ids = tuple(np.split(np.array(score.response_ids, dtype=np.int32), edges))
            starts = [0, *edges.tolist(), sum(lengths)]
            token_texts = tuple(tuple(score.token_texts[start:end]) for start, end in pairwise(starts))
        return GroupScore(
            group_id=score.group_id,
            teacher_logprobs=rows["teacher_logprobs"],
            degraded_logprobs=rows["degraded_logprobs"],
            visual_advantage=rows["visual_advantage"],
            columns={name: rows[name] for name in self._columns},
            payload=Payload(kind=self._payload, tensors=tensors),
            prompt_tokens=score.prompt_tokens,
            response_ids=response_ids,
            token_texts=token_texts,
            payload_texts=dict(score.payload_texts),
        )

    def _check_lengths(self, lengths: list[int]) -> None:
        """Raises Mismatch when a response that was sent as ids has not as many scores as ids."""
        responses = self._request.responses
        sent = [None if isinstance(response, str) else len(response) for response in responses]
        if (
            len(sent) != len(lengths)
            or any(s not in (None, n) for s, n in zip(sent, lengths, strict=True))
            or min(lengths) < 1
        ):
            raise Mismatch(
                f"group {self._score.group_id!r}: responses of {sent} tokens were sent, {lengths} were scored; "
                "client and teacher are of different versions"
            )

    def _make_column(self, message: common_pb2.Tensor, name: str, tokens: int) -> np.ndarray:
        tensor = tensor_from_pb(message)
        expected = COLUMNS[name].dtype
        if tensor.dtype != expected or tensor.shape != (tokens,):
            raise Mismatch(
                f"group {self._score.group_id!r}: {name} is {tensor.dtype} of shape {tensor.shape}, "
                f"expected {expected} of shape ({tokens},)"
            )
        return tensor.numpy()


def _is_finite(tensor: Tensor) -> bool:
    if tensor.dtype == "bfloat16":  # by the exponents alone: hidden states are large
        return not (np.frombuffer(tensor.data, "<u2") & 0x7F80 == 0x7F80).any()
    return bool(np.isfinite(tensor.numpy()).all())


def _find_impossible(columns: Mapping[str, np.ndarray], tensors: Mapping[str, Tensor]) -> str | None:
    """Returns what is wrong with a score's numbers; None if they can all be."""
    if bad := sum(int((~np.isfinite(column)).sum()) for column in columns.values()):
        return f"{bad} of the teacher's numbers are not finite"
    teacher, degraded = columns["teacher_logprobs"], columns["degraded_logprobs"]
    for name, tensor in tensors.items():
        if not name.endswith("logprobs") and not _is_finite(tensor):
            return f"its payload's {name} has numbers that are not finite"
    listed = {name: tensor.numpy() for name, tensor in tensors.items() if name.endswith("logprobs")}
    for name, values in {"teacher_logprobs": teacher, "degraded_logprobs": degraded, **listed}.items():
        if np.isnan(values).any() or values.max() > ROUNDING_NATS:
            return f"{name} has {values.max():g}, and no log-prob is above 0"
    contradiction = np.abs(columns["visual_advantage"] - np.maximum(teacher - degraded, 0))
    worst = int(contradiction.argmax())
    if contradiction[worst] > ROUNDING_NATS:
        return (
            f"the visual advantage of token {worst} is {columns['visual_advantage'][worst]:g}, its log-probs "
            f"{teacher[worst]:g} and {degraded[worst]:g} make {max(teacher[worst] - degraded[worst], 0):g}"
        )
    return None
