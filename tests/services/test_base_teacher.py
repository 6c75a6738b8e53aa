"""The student's base as its teacher, against the same weights in float64 and served over gRPC."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support import scored
from tests.support.models import model_folder
from tests.support.rollouts import MAX_PIXELS
from tests.support.runs import MINIMAL
from tests.support.teacher import teacher_in_process
from tests.support.tolerance import assert_noticed, assert_within
from vaopd.client import SyncTeacherClient
from vaopd.config import Config, validate
from vaopd.errors import ConfigError
from vaopd.images import decode
from vaopd.payloads import hidden_states, to_torch
from vaopd.types import GroupScore, PayloadKind, ScoreRequest
from vaopd.vlm.adapters import load_adapters, name_adapters
from vaopd.vlm.model import Segment, Vlm
from vaopd_trainer.base_teacher import BaseTeacher
from vaopd_trainer.compose import load_student

pytestmark = pytest.mark.numeric


def a_config(**changed: Any) -> Config:
    folder = str(model_folder("student"))
    values = tomllib.loads(MINIMAL) | {
        "data": {"source": "unused", "max_pixels": MAX_PIXELS},
        "student": {"model": folder, "dtype": "float32", "lora": {"rank": 3, "start": "unused"}},
        "teacher": {"model": folder, "shared_base": True},
    }
    for section, keys in changed.items():
        values[section] = values.get(section, {}) | keys
    return validate(Config, values, origin="test")


@pytest.fixture(scope="module")
def student() -> Vlm:
    """Its adapters add something, or to compute without them would not differ."""
    loaded = load_student(a_config(student={"lora": {"rank": 3}}, teacher={"shared_base": False}))
    generator = torch.Generator().manual_seed(0)
    state = name_adapters(loaded.model.state_dict())
    load_adapters(loaded.model, {n: 0.1 * torch.randn(t.shape, generator=generator) for n, t in state.items()})
    return loaded


def responses() -> list[list[np.ndarray]]:
    """To one image, to two, to none."""
    return [[rollout.response_ids for rollout in group.rollouts] for group in scored.sampled_groups()]


def requests() -> list[ScoreRequest]:
    return [
        ScoreRequest(
            group_id=group.group_id,
            responses=tuple(rollout.response_ids for rollout in group.rollouts),
            images=prompt.images,
            prompt_token_ids=group.prompt_token_ids,
        )
        for prompt, group in zip(scored.prompts(), scored.sampled_groups(), strict=True)
    ]


def ask(teacher: BaseTeacher) -> Iterator[GroupScore]:
    for answer in teacher.score(requests()):
        assert isinstance(answer, GroupScore), answer
        yield answer


def compute_logprobs(hidden: Tensor, head: Tensor, ids: np.ndarray) -> Tensor:
    with torch.no_grad():
        return (hidden.float() @ head.T).log_softmax(-1).gather(-1, torch.from_numpy(ids).long()[:, None])[:, 0]


def test_its_log_probs_are_those_of_the_base_and_the_student_s_stay_the_student_s(student: Vlm) -> None:
    learns = {name: weight.requires_grad for name, weight in student.model.named_parameters()}
    plain = scored.plain("student")
    teacher = BaseTeacher(student, a_config())
    for asked, group, found in zip(scored.requests(), responses(), ask(teacher), strict=True):
        images = {image.sha256: student.prepare_image(student.scale_image(decode(image))) for image in asked.images}
        prompt = student.render(asked.messages, images)
        for ids, logprobs in zip(group, found.teacher_logprobs, strict=True):
            expected, error = plain.sampled_logprobs(asked, ids), plain.sampled_error(asked, ids)
            assert_within(logprobs, expected, error)
            adapted = student.compute_response_hidden([Segment(prompt=prompt, responses=(ids,))])
            assert_noticed(compute_logprobs(adapted, student.head, ids), expected, error)
    assert {name: weight.requires_grad for name, weight in student.model.named_parameters()} == learns


@pytest.mark.parametrize("payload", ["hidden", "hidden_pair", "top_k", "sampled"])
def test_a_served_teacher_of_the_same_weights_says_the_same(student: Vlm, payload: PayloadKind) -> None:
    own = BaseTeacher(student, a_config(teacher={"payload": payload}))
    served = Vlm.load(model_folder("student"), dtype="float32", max_pixels=MAX_PIXELS)
    plain = scored.plain("student")
    with (
        teacher_in_process(served) as server,
        SyncTeacherClient(server.target, payload=payload, top_k=64) as client,
    ):
        mine, theirs = own.describe(), client.describe()
        assert (mine.revision, mine.tokenizer_fingerprint) == (theirs.revision, theirs.tokenizer_fingerprint)
        assert torch.equal(to_torch(own.head()), to_torch(client.head()))
        expected = list(client.score(requests()))
    for asked, group, found, other in zip(scored.requests(), responses(), ask(own), expected, strict=True):
        assert isinstance(other, GroupScore)
        assert found.payload.kind == other.payload.kind == payload
        assert found.payload.tensors.keys() == other.payload.tensors.keys()
        errors = [plain.sampled_error(asked, ids) for ids in group]
        for va, other_va, error in zip(found.visual_advantage, other.visual_advantage, errors, strict=True):
            assert_within(va, other_va, 4 * error)  # two views on either side
        if payload.startswith("hidden"):
            hidden = hidden_states(found.payload, torch.float32)
            again = compute_logprobs(hidden, student.head, np.concatenate(group))
            assert_within(np.concatenate(found.teacher_logprobs), again, np.concatenate(errors))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"student": {"lora": None}}, r"set \[student.lora\]"),
        ({"student": {"lora": {"rank": 3}}}, "set student.lora.start"),
        ({"teacher": {"model": "another"}}, "teacher.model = another has to be student.model"),
        ({"trainer": {"sharding": {"kind": "full"}}}, 'trainer.sharding.kind = "full" doesn\'t allow'),
        ({"objective": {"token_score": "view_divergence"}}, "it has no column view_divergence_nats"),
    ],
)
def test_what_it_can_t_do_is_refused_by_name(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        a_config(**changed)
