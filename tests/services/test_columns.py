"""A column that a request asks for: from the engine to a score, and to the API's reply, by its name alone."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.services.test_teacher_scores import plain_logits
from tests.support import tolerance
from tests.support.api import BODY, Api, error_of
from tests.support.models import tiny_vlm
from tests.support.teacher import TeacherInProcess, drawing, teacher_in_process, token_request
from tests.support.tolerance import assert_noticed, assert_within, propagated
from vaopd.client import SyncTeacherClient
from vaopd.client.answers import GroupAssembly
from vaopd.columns import COLUMNS, Column
from vaopd.config import Config
from vaopd.degradation import pixelate
from vaopd.errors import InvalidInput, Mismatch, NumericalError
from vaopd.http_types import DegradationModel, ScoreBody
from vaopd.pb import teacher_pb2 as pb
from vaopd.scoring.reply import make_reply
from vaopd.types import GroupScore
from vaopd.wire.teacher import columns_to_pb
from vaopd_teacher.engines import columns
from vaopd_teacher.engines.load import make_backend
from vaopd_trainer.compose import connect_teacher

GAP = "likeliest_gap_nats"
"""Made up here: by how much the likeliest token's log-prob differs between the views."""
ENTROPY = "teacher_entropy_nats"
DIVERGENCE = "view_divergence_nats"
ALWAYS = ("teacher_logprobs", "degraded_logprobs", "visual_advantage")


@pytest.fixture
def informed(monkeypatch: pytest.MonkeyPatch) -> Iterator[TeacherInProcess]:
    """A teacher that knows one more column: one line in each of the two tables."""
    monkeypatch.setitem(COLUMNS, GAP, Column(name=GAP, meaning="made up", on_request=True))
    gap = columns.Computation(
        views=("original", "degraded"), of=lambda p: p["original"].amax(-1) - p["degraded"].amax(-1)
    )
    monkeypatch.setitem(columns.COMPUTED, GAP, gap)
    with teacher_in_process(tiny_vlm()) as running:
        yield running


def score(target: str, *, names: list[str], **options: object) -> GroupScore:
    request = token_request(tiny_vlm(), "g", pictures=[drawing(1)])
    with SyncTeacherClient(target, **options) as client:  # type: ignore[arg-type]
        (result,) = client.score([request], with_token_texts=True, columns=names)
    assert isinstance(result, GroupScore), result
    return result


def expected_gap(ids: np.ndarray) -> np.ndarray:
    original, degraded = (
        plain_logits([picture], ids).log_softmax(-1).amax(-1).numpy()
        for picture in (drawing(1), pixelate(drawing(1), 0.1))
    )
    return original - degraded


def gap_error(ids: np.ndarray) -> torch.Tensor:
    """(T,): of two log-probs, each out of two float32 forwards and moved by twice what its row's logits are."""
    largest = sum(plain_logits([p], ids).abs().amax(-1) for p in (drawing(1), pixelate(drawing(1), 0.1)))
    return 2 * tolerance.forward(tiny_vlm().config) * largest


def test_a_new_column_reaches_the_score_and_the_reply_by_its_name(informed: TeacherInProcess) -> None:
    found = score(informed.target, names=[GAP], payload="none")
    assert found.response_ids is not None
    assert list(found.columns) == [GAP]
    for ids, gap in zip(found.response_ids, found.columns[GAP], strict=True):
        assert_within(gap, expected_gap(ids), gap_error(ids))
        assert np.abs(gap).max() > 0.01  # or the views would not have been told apart
    reply = make_reply(found, informed.description, degradation=DegradationModel(), top_k=0)
    assert [rollout.columns[GAP] for rollout in reply.rollouts] == [gap.tolist() for gap in found.columns[GAP]]
    assert ScoreBody(question="?", response="!", columns=[GAP]).columns == [GAP]


def test_a_column_that_nobody_asks_for_is_not_computed(
    informed: TeacherInProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: columns.Logprobs) -> None:
        raise AssertionError("computed without being asked for")

    broken = replace(columns.COMPUTED[GAP], of=refuse)
    monkeypatch.setitem(columns.COMPUTED, GAP, broken)
    assert score(informed.target, names=[]).columns == {}


def test_a_column_is_the_same_beside_a_payload_and_in_small_forwards(informed: TeacherInProcess) -> None:
    alone = score(informed.target, names=[GAP], payload="none")
    with teacher_in_process(tiny_vlm(), batch_tokens=1) as small:  # a forward for each rollout and view
        beside = score(small.target, names=[GAP], payload="hidden")
    assert alone.response_ids is not None
    for ids, mine, other in zip(alone.response_ids, alone.columns[GAP], beside.columns[GAP], strict=True):
        assert_within(mine, other, gap_error(ids))


def test_a_column_with_a_number_that_is_not_finite_is_an_error_of_its_group(
    informed: TeacherInProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = replace(columns.COMPUTED[GAP], of=lambda p: p["original"].amax(-1) / 0)
    monkeypatch.setitem(columns.COMPUTED, GAP, broken)
    with SyncTeacherClient(informed.target) as client:
        (failed,) = client.score([token_request(tiny_vlm(), "g")], columns=[GAP])
    assert not isinstance(failed, GroupScore)
    assert isinstance(failed.error, NumericalError)
    assert GAP in str(failed.error)


def test_a_backend_refuses_a_column_that_it_can_t_compute_by_name(informed: TeacherInProcess) -> None:
    assert GAP in informed.description.columns
    lacking = replace(make_backend(tiny_vlm(), batch_tokens=4096, vision_bytes=0), columns=())  # as vLLM's is
    with (
        teacher_in_process(lacking) as other,
        pytest.raises(Mismatch, match=f"can't compute column '{GAP}'; on request it computes none"),
    ):
        score(other.target, names=[GAP])


@pytest.mark.parametrize("name", ["teacher_logprobs", "likeliest_gap", ""])
def test_a_column_that_can_t_be_asked_for_is_refused_before_anything_is_sent(name: str) -> None:
    with (
        SyncTeacherClient("127.0.0.1:1") as client,
        pytest.raises(InvalidInput, match=f"column '{name}' can't be asked for"),
    ):
        list(client.score([token_request(tiny_vlm(), "g")], columns=[name]))
    with pytest.raises(ValueError, match="no such column"):
        ScoreBody(question="?", response="!", columns=[name])


def test_an_answer_without_the_column_is_that_of_an_older_teacher(informed: TeacherInProcess) -> None:
    request = token_request(tiny_vlm(), "g")
    lengths = [len(ids) for ids in request.responses]
    message = pb.GroupScore(group_id="g", lengths=lengths)
    columns_to_pb(dict.fromkeys(ALWAYS, np.zeros(sum(lengths), np.float32)), message)
    assert isinstance(GroupAssembly(message, request, "none").make_result(), GroupScore)
    with pytest.raises(Mismatch, match=f"sent no column {GAP}"):
        GroupAssembly(message, request, "none", [GAP]).make_result()


# ---------------------------------------------------------------------------------------------- the teacher's entropy


def test_the_entropy_of_an_even_distribution_is_the_log_of_its_size() -> None:
    """Four ids of logit 5 and one so small that it counts for nothing: log 4. One id alone: 0."""
    logits = torch.tensor([[5.0, 5.0, 5.0, 5.0, -500.0], [900.0, 0.0, 0.0, 0.0, 0.0]])
    # Four terms, each a log-prob and its exp, rounded by themselves.
    error = propagated(entropy_terms, [logits.log_softmax(-1)], [tolerance.log_softmax(logits)])
    assert_within(columns.entropy(logits.log_softmax(-1)), [math.log(4), 0.0], error)


def entropy_terms(log_probs: torch.Tensor) -> torch.Tensor:
    return -log_probs.exp() * log_probs


@pytest.mark.numeric
@pytest.mark.parametrize("payload", ["none", "hidden"])
def test_the_entropy_is_that_of_a_plain_forward_over_the_logical_vocabulary(
    teacher: TeacherInProcess, payload: str
) -> None:
    found = score(teacher.target, names=[ENTROPY], payload=payload)
    assert found.response_ids is not None
    for ids, entropy in zip(found.response_ids, found.columns[ENTROPY], strict=True):
        logits = plain_logits([drawing(1)], ids)
        expected = entropy_terms(logits.log_softmax(-1)).sum(-1)
        # Of the logits after two float32 forwards, and of the sum over the vocabulary.
        of_logits = tolerance.forward(tiny_vlm().config) * logits.abs().amax(-1, keepdim=True)
        error = propagated(lambda z: entropy_terms(z.log_softmax(-1)), [logits], [of_logits])
        error += propagated(entropy_terms, [logits.log_softmax(-1)], [tolerance.log_softmax(logits)])
        assert entropy.dtype == np.float32
        assert_within(entropy, expected, error)
        assert_noticed(expected.roll(1), expected, error)  # another token's


# ------------------------------------------------------------------------------------------------ the view divergence


@pytest.mark.numeric
@pytest.mark.parametrize("payload", ["none", "hidden"])
def test_the_view_divergence_is_that_of_two_plain_forwards(teacher: TeacherInProcess, payload: str) -> None:
    """Both views' full distributions, by transformers' own forward, and Σ p·(log p − log p̃) in float64."""
    found = score(teacher.target, names=[DIVERGENCE], payload=payload)
    assert found.response_ids is not None
    for ids, divergence in zip(found.response_ids, found.columns[DIVERGENCE], strict=True):
        views = [plain_logits([p], ids) for p in (drawing(1), pixelate(drawing(1), 0.1))]
        expected = divergence_terms(*(view.log_softmax(-1) for view in views)).sum(-1)
        # Of the logits after two float32 forwards, and of the sum over the vocabulary.
        of_logits = [tolerance.forward(tiny_vlm().config) * view.abs().amax(-1, keepdim=True) for view in views]
        error = propagated(lambda z, w: divergence_terms(z.log_softmax(-1), w.log_softmax(-1)), views, of_logits)
        logprobs = [view.log_softmax(-1) for view in views]
        error += propagated(divergence_terms, logprobs, [tolerance.log_softmax(view) for view in views])
        assert divergence.dtype == np.float32
        assert_within(divergence, expected, error)
        swapped = divergence_terms(*reversed(logprobs)).sum(-1)
        assert_noticed(swapped, expected, error)
        assert_noticed(expected.roll(1), expected, error)  # another token's


def divergence_terms(original: torch.Tensor, degraded: torch.Tensor) -> torch.Tensor:
    return original.exp() * (original - degraded)


@pytest.mark.parametrize(
    ("token_score", "payload", "message"),
    [
        ("view_divergence", "hidden", f"can't compute {DIVERGENCE}, which objective.token_score needs"),
        (
            "expected",
            "hidden_pair",
            "not hidden_pair, which objective.token_score needs: serve it with the transformers backend",
        ),
    ],
)
def test_a_trainer_refuses_a_teacher_that_can_t_give_what_its_objective_needs(
    tmp_path: Path, token_score: str, payload: str, message: str
) -> None:
    whole = make_backend(tiny_vlm(), batch_tokens=4096, vision_bytes=0)
    lacking = replace(whole, columns=(), payloads=("none", "hidden"))  # as vLLM's, or of an older version
    with teacher_in_process(lacking) as other, contextlib.ExitStack() as stack:
        config = Config.model_validate(
            {
                "run": {"name": "x", "folder": tmp_path},
                "data": {"source": "none"},
                "student": {"model": "none"},
                "teacher": {"model": "none", "address": other.target, "payload": payload},
                "objective": {"variant": "token_groups", "token_score": token_score},
                "trainer": {"steps": 1},
            }
        )
        with pytest.raises(Mismatch, match=message):
            connect_teacher(config, tiny_vlm(), stack, threading.Event())


def test_the_api_answers_with_the_columns_that_were_asked_for(api: Api, teacher: TeacherInProcess) -> None:
    (rollout,) = api.score(**BODY, columns=[ENTROPY]).json()["rollouts"]
    assert len(rollout["columns"][ENTROPY]) == len(rollout["tokens"])
    (plain,) = api.score(**BODY).json()["rollouts"]
    assert plain == rollout | {"columns": {}}
    assert all(0 < value < math.log(teacher.description.vocab_size) for value in rollout["columns"][ENTROPY])
    (listed,) = api.http.get("/v1/teachers").json()["teachers"]
    assert listed["columns"] == [ENTROPY, DIVERGENCE]


def test_the_api_names_a_column_that_there_is_not(api: Api) -> None:
    answer = api.score(**BODY, columns=[ENTROPY, "entropy"])
    problem = error_of(answer)
    assert (answer.status_code, problem["field"]) == (422, "columns.1")
    assert ENTROPY in problem["detail"]
