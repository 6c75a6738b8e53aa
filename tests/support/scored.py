"""Prompt groups as the trainer sees them, without a trainer: sampled by the student, scored by a teacher over gRPC."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support import divergences, tolerance
from tests.support.models import model_folder
from tests.support.rollouts import MAX_PIXELS, PlainStudent
from tests.support.teacher import drawing, encoded, question, teacher_in_process
from vaopd.client import SyncTeacherClient
from vaopd.payloads import to_torch
from vaopd.run.snapshots import WEIGHTS_FILE
from vaopd.run.tensor_files import compute_digest
from vaopd.sampling.transformers_engine import TransformersEngine
from vaopd.types import (
    Degradation,
    EncodedImage,
    GroupId,
    PayloadKind,
    PolicyVersion,
    Prompt,
    RolloutGroup,
    RolloutRequest,
    SamplingSettings,
)
from vaopd.vlm.model import Vlm
from vaopd_trainer.scorer import GroupScorer, Refused
from vaopd_trainer.student_loss import ScoredGroup


def prompts() -> list[Prompt]:
    """One image, two images, and none."""
    pictures = [encoded(drawing(seed)) for seed in range(3)]
    return [
        _prompt("one", "Find the perimeter of the triangle.", pictures[:1]),
        _prompt("two", "Find the area of the rectangle.", pictures[1:]),
        _prompt("none", "Find the complement of the angle.", []),
    ]


def _prompt(prompt_id: str, text: str, images: Sequence[EncodedImage]) -> Prompt:
    return Prompt(prompt_id=prompt_id, messages=question(text, images), images=tuple(images), answer="")


@functools.cache
def vlm(name: str) -> Vlm:
    """Read with the pixel bound of `PlainStudent`; leave its weights alone.

    A trap: the padding of its head is the row of the token that ends a turn, so that one padded id in a softmax halves
    the probability that the answer ends. (The shipped models give theirs next to none.)
    """
    loaded = Vlm.load(model_folder(name), dtype="float32", max_pixels=MAX_PIXELS)
    rows = loaded.model.get_output_embeddings().weight
    with torch.no_grad():
        rows[loaded.vocab_size :] = rows[loaded.tokenizer.eos_token_id]
    return loaded


def plain(name: str) -> PlainStudent:
    """The model under transformers' own processor and full logits: what the whole stack is compared with."""
    return PlainStudent(policy_of(name))


def requests(*, rollouts: int = 3) -> list[RolloutRequest]:
    return [
        RolloutRequest(
            group_id=str(GroupId(purpose="train", step=0, index=index)),
            messages=prompt.messages,
            images=prompt.images,
            num_rollouts=rollouts,
            sampling=SamplingSettings(temperature=1.0, top_p=1.0, max_new_tokens=20, seed=5),
            policy_version=0,
        )
        for index, prompt in enumerate(prompts())
    ]


@functools.cache
def sampled_groups() -> list[RolloutGroup]:
    engine = TransformersEngine(model_folder("student"), worker="w", max_pixels=MAX_PIXELS)
    engine.load_policy(policy_of("student"))
    groups = engine.generate(requests())
    assert all(isinstance(group, RolloutGroup) for group in groups)
    return groups  # type: ignore[return-value]


@dataclass(frozen=True)
class Scored:
    """In the order of the prompts; teacher_head (V, D), refused: what neither student nor teacher would take."""

    groups: list[ScoredGroup]
    refused: list[Refused]
    teacher_head: torch.Tensor


@contextmanager
def scorer_for(
    teacher: Vlm, *, max_tokens: int = 512, batch_tokens: int = 1, columns: Sequence[str] = (), **client: Any
) -> Iterator[tuple[GroupScorer, SyncTeacherClient]]:
    """batch_tokens = 1: the teacher takes each row by itself, so that the same groups always give the same bits."""
    student = vlm("student")
    listed = prompts()

    with (
        teacher_in_process(teacher, batch_tokens=batch_tokens) as server,
        SyncTeacherClient(server.target, tokenizer_fingerprint=student.fingerprint, **client) as connection,
    ):
        scorer = GroupScorer(
            teacher=connection,
            student=student,
            find_prompt=lambda group: listed[group.index],
            max_tokens=max_tokens,
            columns=columns,
        )
        try:
            yield scorer, connection
        finally:
            scorer.close()


def score(
    teacher: str = "teacher",
    *,
    groups: Sequence[RolloutGroup] | None = None,
    payload: PayloadKind = "hidden",
    degradation: Degradation = Degradation(),
    **options: Any,
) -> Scored:
    """Each group is submitted by itself, as it would arrive."""
    with scorer_for(vlm(teacher), payload=payload, degradation=degradation, **options) as (scorer, client):
        for group in sampled_groups() if groups is None else groups:
            scorer.submit([group])
        results = list(scorer.wait_for_results(check=lambda: None))
        head = to_torch(client.head())
    done = sorted((r for r in results if isinstance(r, ScoredGroup)), key=lambda group: group.index)
    return Scored(groups=done, refused=[r for r in results if isinstance(r, Refused)], teacher_head=head)


@functools.cache
def reference_logprobs(name: str) -> list[np.ndarray]:
    """Float64 log-softmax of a plain forward, (T, V) for each rollout of `sampled_groups`, in order."""
    model = plain(name)
    return [
        model.logprobs(request, rollout.response_ids)
        for request, group in zip(requests(), sampled_groups(), strict=True)
        for rollout in group.rollouts
    ]


@functools.cache
def reference_rows(name: str) -> torch.Tensor:
    """`reference_logprobs` as one (M, V)."""
    return torch.from_numpy(np.concatenate(reference_logprobs(name)))


def reference_kl() -> list[np.ndarray]:
    """KL(student ‖ teacher) in float64 over the logical vocabulary, (T,) for each rollout."""
    pairs = zip(reference_logprobs("student"), reference_logprobs("teacher"), strict=True)
    return [(np.exp(p) * (p - q)).sum(-1) for p, q in pairs]


def logits_error(name: str) -> torch.Tensor:
    """(M, 1): how far two float32 forwards of a model may differ at a token, the reference being one."""
    return tolerance.forward(vlm(name).config) * reference_rows(name).abs().amax(-1, keepdim=True)


def logprobs_error(name: str) -> torch.Tensor:
    """(M,): and hence in the log-prob of the sampled token."""
    return tolerance.log_softmax(reference_rows(name), logits_error(name)).gather(-1, sampled_ids()[:, None])[:, 0]


def sampled_ids() -> torch.Tensor:
    """(M,): all sampled tokens, in order."""
    ids = [rollout.response_ids for group in sampled_groups() for rollout in group.rollouts]
    return torch.from_numpy(np.concatenate(ids)).long()


def divergence_error(terms: divergences.Terms = divergences.full, teacher: str = "teacher") -> torch.Tensor:
    """(M,): of a divergence, through whole forwards of both models and then log-softmax and sum in float32."""
    names = ("student", teacher)
    return divergences.error(terms, *map(reference_rows, names), *map(logits_error, names))


def policy_of(name: str) -> PolicyVersion:
    folder = Path(model_folder(name))
    return PolicyVersion(version=0, path=str(folder), sha256=compute_digest(folder / WEIGHTS_FILE))
