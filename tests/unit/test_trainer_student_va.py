"""The student's own VA on held-out answers, against plain forwards in float64 of transformers' own model."""

from __future__ import annotations

import dataclasses
import io
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest

from tests.support import scored
from tests.support.runs import MINIMAL
from vaopd.config import Config, validate
from vaopd.degradation import pixelate
from vaopd.grading import Verdict
from vaopd.images import decode
from vaopd.types import EncodedImage, RolloutRequest
from vaopd_trainer.records import JsonLines
from vaopd_trainer.student_va import HeldOutAnswer, StudentVa, average, choose_prompts

ONE, TWO, NONE = range(3)  # the prompts of `scored`: with one image, with two, and without


def measured(folder: Path, *, forward_tokens: int = 24_576) -> StudentVa:
    values = tomllib.loads(MINIMAL)
    values |= {"trainer": {"steps": 1, "forward_tokens": forward_tokens}, "student": {"model": "-", "dtype": "float32"}}
    config = validate(Config, values, origin="test")
    file = JsonLines(folder / "heldout.jsonl")
    return StudentVa(student=scored.vlm("student"), prompts=scored.prompts(), config=config, file=file)


def answers(sample: int) -> list[HeldOutAnswer]:
    groups = [scored.sampled_groups()[place] for place in (ONE, TWO)]
    return [
        HeldOutAnswer(place, group.prompt_token_ids, group.rollouts[sample].response_ids, Verdict.WRONG)
        for place, group in zip((ONE, TWO), groups, strict=True)
    ]


def with_degraded_images(request: RolloutRequest) -> RolloutRequest:
    def degrade(image: EncodedImage) -> EncodedImage:
        file = io.BytesIO()
        pixelate(scored.vlm("student").scale_image(decode(image))).save(file, "PNG")
        return EncodedImage(data=file.getvalue())

    return dataclasses.replace(request, images=tuple(map(degrade, request.images)))


def reference(sample: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Own VA of each answer, (T,), and how far two float32 forwards may be from it."""
    plain, found = scored.plain("student"), []
    for request, answer in zip(scored.requests(), answers(sample), strict=False):
        views = (request, with_degraded_images(request))
        original, degraded = (plain.sampled_logprobs(view, answer.response_ids) for view in views)
        error = sum(plain.sampled_error(view, answer.response_ids) for view in views)
        found.append((np.maximum(original - degraded, 0), np.asarray(error)))
    return found


@pytest.mark.parametrize("forward_tokens", [1, 24_576])
def test_it_is_the_difference_of_the_student_s_own_log_probs(tmp_path: Path, forward_tokens: int) -> None:
    """A later evaluation reads the first answers again; the weights are the same here, and so is their VA."""
    student = measured(tmp_path, forward_tokens=forward_tokens)
    assert student.problems == {ONE, TWO}
    first = student.measure(answers(0), version=0, check=lambda: None)
    later = student.measure(answers(1), version=50, check=lambda: None)
    bound = max(float(error.max()) for sample in (0, 1) for _, error in reference(sample))
    for numbers, sample in ((first, 0), (later, 1)):
        expected = np.concatenate([va for va, _ in reference(sample)])
        assert expected.max() > 100 * bound  # these pictures matter
        assert numbers["student_va"] == pytest.approx(expected.mean(), abs=bound)
        assert numbers["student_va_prompts"] == 2
    assert later["student_va_first_answers"] == pytest.approx(first["student_va"], abs=2 * bound)
    assert later["student_va"] != pytest.approx(first["student_va"], abs=2 * bound)
    records = [json.loads(line) for line in (tmp_path / "heldout.jsonl").read_text().splitlines()]
    assert [(record["step"], record["problem"]) for record in records] == [(0, 0), (0, 1), (50, 0), (50, 1)]
    assert ["image_base64" in record for record in records] == [True, True, False, False]
    for record, (va, error) in zip(records, [*reference(0), *reference(1)], strict=True):
        np.testing.assert_allclose(record["student_va"], va, rtol=0, atol=float(error.max()) + 1e-5)  # 5 decimals
        assert len(record["tokens"]) == len(va)
    np.testing.assert_allclose(records[2]["student_va_of_first"], records[0]["student_va"], rtol=0, atol=2 * bound)


def test_without_an_answer_nothing_is_measured(tmp_path: Path) -> None:
    assert measured(tmp_path).measure([], version=0, check=lambda: None) == {}


def test_problems_are_spread_evenly_over_those_with_an_image() -> None:
    prompts = [scored.prompts()[NONE], *(scored.prompts()[ONE] for _ in range(6))]
    assert list(choose_prompts(prompts, most=3)) == [1, 3, 5]
    assert list(choose_prompts(prompts, most=9)) == [1, 2, 3, 4, 5, 6]
    assert choose_prompts(prompts, most=0) == {}


def test_mean_and_error_by_hand() -> None:
    """Rows of 2, 2 and 4 tokens with sums 4, 0 and 4: mean 1, deviations 2, −2 and 0 tokens' worth, √8 / 8."""
    rows = [np.array([1.0, 3.0]), np.zeros(2), np.array([4.0, 0.0, 0.0, 0.0])]
    assert average(rows) == pytest.approx((1.0, 8**0.5 / 8))
