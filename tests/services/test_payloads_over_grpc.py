"""Every payload that a teacher offers, through a real server into the trainer's loss: how near the exact KL it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.scored import reference_kl, reference_logprobs, sampled_groups, score, vlm
from vaopd.config import TrainerConfig, VaOpd
from vaopd.payloads import PAYLOADS
from vaopd.types import PayloadKind
from vaopd_trainer.student_loss import StudentLoss, weigh

TOP_K = 64


def kl_of(payload: PayloadKind) -> np.ndarray:
    """(M,) over all groups, from what came over the wire."""
    scored = score(payload=payload, top_k=TOP_K)
    loss = StudentLoss(
        vlm("student"),
        teacher_head=scored.teacher_head,
        trainer=TrainerConfig(steps=1, chunk_tokens=16),
        estimator="k1",
    )
    with torch.no_grad():
        _, kl = loss([weigh(group, VaOpd(), seed=0) for group in scored.groups])
    return kl.numpy()


def log_ratio_of_samples() -> np.ndarray:
    ids = [rollout.response_ids for group in sampled_groups() for rollout in group.rollouts]
    pairs = zip(reference_logprobs("student"), reference_logprobs("teacher"), ids, strict=True)
    return np.concatenate([(p - q)[np.arange(len(tokens)), tokens] for p, q, tokens in pairs])


@pytest.mark.parametrize("payload", [payload for payload in PAYLOADS if payload != "none"])
def test_what_arrives_gives_the_divergence_that_the_payload_allows(payload: PayloadKind) -> None:
    found = kl_of(payload)
    exact = np.concatenate(reference_kl())
    match payload:
        case "hidden":
            np.testing.assert_allclose(found, exact, atol=1e-5, rtol=1e-6)
        case "hidden_int8":
            # 8 bits per hidden state; rounding goes both ways, so the mean is nearer than each token is.
            assert np.abs(found - exact).mean() <= 0.01 * exact.mean()
            assert abs((found - exact).mean()) <= 0.002 * exact.mean()
        case "top_k":
            assert (found <= exact + 1e-5).all()
            assert found.mean() >= 0.5 * exact.mean()
        case _:
            np.testing.assert_allclose(found, log_ratio_of_samples(), atol=1e-4)
