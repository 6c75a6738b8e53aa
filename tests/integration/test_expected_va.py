"""VA as the student's own distribution expects it, from both views' hidden states over gRPC to the weights of a loss.

Compared with plain transformers forwards of the student and of both views, full logits, float64 log-softmax.
"""

from __future__ import annotations

import dataclasses
import functools
import io

import numpy as np
import PIL.Image
import pytest
import torch

from tests.integration.test_loss_over_grpc import K, grouped, step_of, student_loss, weighed
from tests.support import tolerance
from tests.support.models import model_folder
from tests.support.rollouts import MAX_PIXELS
from tests.support.scored import Scored, logits_error, plain, reference_rows, requests, sampled_groups, score, vlm
from tests.support.teacher import encoded
from tests.support.tolerance import assert_noticed, assert_within, gamma
from vaopd.config import VaOpd
from vaopd.degradation import pixelate
from vaopd.vlm.model import Vlm
from vaopd_trainer.student_loss import weigh

pytestmark = pytest.mark.numeric


@functools.cache
def degraded_rows() -> torch.Tensor:
    """The teacher's float64 log-probs (M, V) of a plain forward with every picture pixelated, of its scaled size."""
    model, rows = plain("teacher"), []
    for request, group in zip(requests(), sampled_groups(), strict=True):
        pictures = [PIL.Image.open(io.BytesIO(image.data)) for image in request.images]
        images = tuple(encoded(pixelate(picture.resize((64, 64)), 0.1)) for picture in pictures)
        degraded = dataclasses.replace(request, images=images)
        rows += [model.logprobs(degraded, rollout.response_ids) for rollout in group.rollouts]
    return torch.from_numpy(np.concatenate(rows))


def expected_terms(student: torch.Tensor, teacher: torch.Tensor, degraded: torch.Tensor) -> torch.Tensor:
    """p_S(y)·max(log p_T(y given v) − log p_T(y given ṽ), 0), whose sum over y is the student's expected VA."""
    return student.exp() * (teacher - degraded).clamp_min(0)


@pytest.fixture(scope="module")
def paired() -> Scored:
    return score(payload="hidden_pair")


def test_the_expected_va_is_that_of_three_plain_forwards(paired: Scored) -> None:
    """And the loss weights by it, without a gradient of its own."""
    with torch.no_grad():
        loss, values = student_loss(paired)(weighed(paired.groups, token_score="expected"))
    rows = [reference_rows("student"), reference_rows("teacher"), degraded_rows()]
    of_degraded = tolerance.forward(vlm("teacher").config) * rows[2].abs().amax(-1, keepdim=True)
    of_logits = [logits_error("student"), logits_error("teacher"), of_degraded]
    error = tolerance.propagated(lambda *z: expected_terms(*(x.log_softmax(-1) for x in z)), rows, of_logits)
    error += tolerance.propagated(expected_terms, rows, [tolerance.log_softmax(x) for x in rows])
    expected = expected_terms(*rows).sum(-1)
    assert expected.max() > 0.1
    assert values.expected_va is not None
    assert_within(values.expected_va, expected, error)
    assert_noticed(expected_terms(rows[0], rows[2], rows[1]).sum(-1), expected, error)  # the views swapped
    assert_noticed(expected_terms(rows[1], rows[1], rows[2]).sum(-1), expected, error)  # the teacher's expectation
    sampled = np.concatenate([va for group in paired.groups for va in group.score.visual_advantage])
    assert_noticed(sampled, expected, error)

    lengths = [len(response) for group in paired.groups for response in group.responses]
    scores = np.split(values.expected_va.numpy(), np.cumsum(lengths)[:-1])
    rollouts = torch.cat([weigh(group, VaOpd(), seed=0).rollout_weights for group in paired.groups])
    weights = [float(w) * grouped(s) for w, s in zip(rollouts, scores, strict=True)]
    terms = torch.from_numpy(np.concatenate(weights)) * values.kl
    assert_within(loss, terms.sum(), gamma(len(terms) + 4) * terms.abs().sum())


def test_the_expected_va_changes_weights_and_nothing_else(paired: Scored) -> None:
    """The gradient is that of the same weights given beforehand, also when siblings are in forwards of their own."""
    trained_student = Vlm.load(model_folder("student"), dtype="float64", max_pixels=MAX_PIXELS)
    groups = weighed(paired.groups, token_score="expected")
    with torch.no_grad():
        _, values = student_loss(paired, student=trained_student)(groups)
    assert values.expected_va is not None
    responses = [response for group in paired.groups for response in group.responses]
    scores = np.split(values.expected_va.numpy(), np.cumsum(list(map(len, responses)))[:-1])
    given = []
    for index, group in enumerate(groups):
        rows = zip(group.rollout_weights, scores[K * index : K * index + K], strict=True)
        weights = torch.from_numpy(np.concatenate([float(w) * grouped(s) for w, s in rows]))
        given.append(dataclasses.replace(group, token_weights=weights, grouping=None))
    loss, gradients = step_of(paired, trained_student, [given])
    errors = tolerance.backward(trained_student.config, gradients, dtype=torch.float64)
    one, two, three = groups
    for batches in ([groups], [[one.select(0, 1)], [one.select(1, 3), two], [three]]):
        found, theirs = step_of(paired, trained_student, batches)
        assert_within(found, loss, tolerance.forward(trained_student.config, dtype=torch.float64) * loss, "loss")
        for name, gradient in theirs.items():
            assert_within((gradient - gradients[name]).norm(), 0.0, errors[name], name)
