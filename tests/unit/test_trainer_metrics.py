"""The numbers of a step, worked out by hand on two groups; and that two ranks' halves make the same whole."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from vaopd.types import GroupScore, Payload, Rollout, RolloutGroup
from vaopd.vlm.prompts import PreparedPrompt
from vaopd_trainer import step_numbers
from vaopd_trainer.scorer import BusyTime
from vaopd_trainer.student_loss import ScoredGroup, WeightedGroup


def a_group(index: int, va: list[list[float]], *, weights: list[float], finish: str = "stop") -> WeightedGroup:
    advantages = tuple(np.array(values, np.float32) for values in va)
    rollouts = tuple(
        Rollout(
            rollout_id=f"g{index}/{k}",
            response_ids=np.arange(len(values), dtype=np.int32),
            rollout_logprobs=np.zeros(len(values), np.float32),
            finish_reason=finish,  # type: ignore[arg-type]
        )
        for k, values in enumerate(va)
    )
    prompt_ids = np.array([1], np.int32)
    group = RolloutGroup(
        group_id=f"g{index}",
        policy_version=0,
        policy_sha256="",
        prompt_token_ids=prompt_ids,
        rollouts=rollouts,
        worker="w",
        generation_s=0.5 + index,
    )
    score = GroupScore(
        group_id=f"g{index}",
        teacher_logprobs=advantages,
        degraded_logprobs=advantages,
        visual_advantage=advantages,
        payload=Payload(kind="sampled"),
        prompt_tokens=1,
    )
    prompt = PreparedPrompt(token_ids=prompt_ids.astype(np.int64), images=())
    return WeightedGroup(
        scored=ScoredGroup(index=index, group=group, prompt=prompt, score=score),
        rollout_weights=torch.tensor(weights),
        token_weights=torch.ones(sum(len(values) for values in va)),
    )


# Rollouts of 5, 2 and 1 tokens: one high token each (⌈T/5⌉), marked by its advantage.
FIRST = a_group(0, [[0, 4, 0, 0, 0], [0, 1]], weights=[0.5, 0.5])
FIRST_KL = np.array([1, 9, 1, 1, 1, 2, 3], np.float32)
SECOND = a_group(1, [[2]], weights=[1.0], finish="length")
SECOND_KL = np.array([6], np.float32)


def expected() -> dict[str, Any]:
    return {
        "loss": 0.75,
        "rollouts": 3,
        "mean_va": (4 + 1 + 2) / 8,
        "kl_mean": (9 + 4 + 2 + 3 + 6) / 8,
        "kl_high": (9 + 3 + 6) / 3,
        "kl_low": (4 + 2) / 5,
        "kl_unseen_share": (4 + 2) / 24,  # VA 0, and at least a nat
        "va_spread": (0.15 + 0) / 2,  # means of 0.8 and 0.5; a single sibling
        "high_ties_share": 0.0,
        "weights_entropy": (math.log(2) + 0) / 2,  # uniform over two siblings; certain of one
        "response_tokens_mean": 8 / 3,
        "truncated_fraction": 1 / 3,
        "generation_s": 1.5,
    }


def test_one_rank() -> None:
    found = step_numbers.average_ranks([step_numbers.sum_groups([FIRST, SECOND], [FIRST_KL, SECOND_KL], loss=0.75)])
    assert found.pop("va_top10_share") == pytest.approx(4 / 7)  # the top ⌈0.8⌉ = 1 of 8 tokens
    assert found == pytest.approx(expected())


def test_two_ranks_make_the_same_means_of_their_sums() -> None:
    """But for the share of the top tokens, which is the mean over ranks of each rank's own."""
    parts = [
        step_numbers.sum_groups([FIRST], [FIRST_KL], loss=0.5),
        step_numbers.sum_groups([SECOND], [SECOND_KL], loss=0.25),
    ]
    found = step_numbers.average_ranks(parts)
    assert found.pop("va_top10_share") == pytest.approx((4 / 5 + 1) / 2)
    assert found == pytest.approx(expected())


def test_without_any_low_token_their_mean_is_left_undefined_not_zero() -> None:
    found = step_numbers.average_ranks([step_numbers.sum_groups([SECOND], [SECOND_KL], loss=1.0)])
    assert math.isnan(found["kl_low"])


def test_the_high_group_is_of_the_runs_own_fraction() -> None:
    """At 0.4, ⌈2⌉ of the first rollout's five tokens: the one with VA, and of the equal others the earliest."""
    found = step_numbers.average_ranks([step_numbers.sum_groups([FIRST], [FIRST_KL], loss=1.0, high_fraction=0.4)])
    assert found["kl_high"] == pytest.approx((1 + 9 + 3) / 3)
    assert found["kl_low"] == pytest.approx((1 + 1 + 1 + 2) / 4)


def test_a_steps_parts_add_up_and_what_runs_beside_them_does_not() -> None:
    timings = {"publish_s": 0.5, "wait_s": 2.0, "score_s": 0.5, "forward_backward_s": 1.0, "scoring_s": 2.0}
    values = step_numbers.derive_rates(timings, rollouts=8)
    assert values == {"step_s": 4.0, "rollouts_per_s": 2.0, "score_overlap": 0.75}


def test_of_nothing_there_is_no_rate() -> None:
    """A rank whose rollouts have no VA says nothing of the share of the top; neither does a step without scoring."""
    timings = dict.fromkeys(("publish_s", "wait_s", "score_s", "forward_backward_s"), 1.0) | {"scoring_s": 0.0}
    assert math.isnan(step_numbers.derive_rates(timings, rollouts=8)["score_overlap"])
    some, none = (step_numbers.sum_groups([FIRST], [FIRST_KL], loss=0.5) for _ in range(2))
    assert some is not None
    assert none is not None
    none["va_top10_share"] = math.nan
    assert step_numbers.average_ranks([some, none])["va_top10_share"] == some["va_top10_share"]
    assert math.isnan(step_numbers.average_ranks([none])["va_top10_share"])


def test_busy_time_counts_what_runs_at_once_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 13.0, 20.0, 20.5])
    monkeypatch.setattr("vaopd_trainer.scorer.time.monotonic", lambda: next(clock))
    busy = BusyTime()
    with busy.measure(), busy.measure():
        pass
    with busy.measure():
        pass
    assert busy.take() == 3.5
    assert busy.take() == 0.0


def test_every_number_of_a_step_is_described() -> None:
    """The trainer adds norm or skip, the rate, the times and the collector's counts; "rollouts" it only divides by."""
    written = set(step_numbers.average_ranks([step_numbers.sum_groups([FIRST], [FIRST_KL], loss=0.5)])) - {"rollouts"}
    timings = dict.fromkeys((*step_numbers.STEP_TIMES, "scoring_s"), 1.0)
    written |= (
        set(timings) | set(step_numbers.derive_rates(timings, rollouts=2)) | {"grad_norm", "learning_rate", "skipped"}
    )
    written |= {"policy_drift_mean", "policy_drift_max", "policy_drift_share"}
    counted = {name for name in step_numbers.DESCRIPTIONS if name.startswith(("groups_", "records_"))}
    assert written == set(step_numbers.DESCRIPTIONS) - counted


# -- rollout and trainer log-probs -------------------------------------------------------------------------------------


def with_rollout_logprobs(group: WeightedGroup, values: list[float], *, version: int) -> WeightedGroup:
    """As sampled with these log-probs, one after the other, by this policy version."""
    rest = iter(values)
    rollouts = tuple(
        replace(r, rollout_logprobs=np.array([next(rest) for _ in r.response_ids], np.float32))
        for r in group.scored.group.rollouts
    )
    sampled = replace(group.scored.group, rollouts=rollouts, policy_version=version)
    return replace(group, scored=replace(group.scored, group=sampled))


def drift(*parts: dict[str, float] | None) -> dict[str, float]:
    rest = step_numbers.sum_groups([SECOND], [SECOND_KL], loss=0.0) or {}
    found = step_numbers.average_ranks([None if part is None else rest | part for part in parts])
    return {key: value for key, value in found.items() if key.startswith("policy_drift")}


def test_drift_is_of_the_tokens_that_this_policy_sampled() -> None:
    """Differences of 0, 0.05, 0.25, 0.5 and thrice 0; a group of an older policy isn't compared."""
    first = with_rollout_logprobs(FIRST, [-1.0, -1.0, -1.0, -1.0, -2.0, -2.0, -2.0], version=3)
    old = with_rollout_logprobs(SECOND, [-9.0], version=2)
    mine = np.array([-1.0, -1.05, -0.75, -1.5, -2.0, -2.0, -2.0], np.float32)
    found = drift(step_numbers.sum_drift([first, old], [mine, np.zeros(1, np.float32)], version=3))
    assert found == {
        "policy_drift_mean": pytest.approx(0.8 / 7),
        "policy_drift_max": pytest.approx(0.5),
        "policy_drift_share": pytest.approx(2 / 7),
    }


def test_ranks_are_averaged_by_their_tokens_and_those_without_any_are_left_out() -> None:
    first = with_rollout_logprobs(FIRST, [-1.0] * 7, version=0)
    second = with_rollout_logprobs(SECOND, [-1.0], version=0)
    near = step_numbers.sum_drift([first], [np.full(7, -1.0, np.float32)], version=0)
    far = step_numbers.sum_drift([second], [np.full(1, -2.0, np.float32)], version=0)
    none = step_numbers.sum_drift([], [], version=0)
    assert drift(near, none, far, None) == {
        "policy_drift_mean": pytest.approx(1 / 8),
        "policy_drift_max": pytest.approx(1.0),
        "policy_drift_share": pytest.approx(1 / 8),
    }
    assert drift(none) == {}  # not 0: nothing was compared


def test_what_tells_the_regime() -> None:
    """Of the high group's two tokens one ties with tokens outside; KL below a nat, or with VA, is not unseen."""
    group = a_group(0, [[0.5, 0, 0, 0, 0, 0], [-0.0005, 1e-2]], weights=[0.5, 0.5])
    kl = np.array([2, 1.5, 0.9, 0, 0, 0, 4, 8], np.float32)
    found = step_numbers.average_ranks([step_numbers.sum_groups([group], [kl], loss=1.0)])
    assert found["kl_unseen_share"] == pytest.approx((1.5 + 4) / kl.sum())
    assert found["high_ties_share"] == pytest.approx(1 / 3)  # ⌈6/5⌉ = 2 and ⌈2/5⌉ = 1 tokens; 0 is in and outside
    assert found["va_spread"] == pytest.approx((0.5 / 6 - (1e-2 - 0.0005) / 2) / 2, rel=1e-5)
