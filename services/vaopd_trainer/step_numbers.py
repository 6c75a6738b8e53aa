"""Computes the numbers of a step: sums on each rank, means over all ranks, and the rollouts that the report shows."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from vaopd import objective
from vaopd.grading import judge
from vaopd.scoring.weights import HIGH_FRACTION
from vaopd.types import Prompt, TextPart
from vaopd_trainer.student_loss import WeightedGroup

STEP_TIMES = ("publish_s", "wait_s", "score_s", "forward_backward_s")
"""A step's parts, one after the other: publishing the policy, waiting for its groups, waiting for scores after the last
group has arrived, loss and step. During the waits run `generation_s`, the slowest answer of a worker, and `scoring_s`,
the time in which groups were prepared or at the teacher."""
DESCRIPTIONS = {
    "loss": "loss of the step, nats",
    "mean_va": "visual advantage, mean over all response tokens, nats",
    "kl_mean": "reverse KL, mean over all response tokens, nats",
    "kl_high": "the same over the high group: the tokens of largest VA of each rollout",
    "kl_low": "the same over the other tokens; left out when there are none",
    "va_top10_share": "share of all VA that the top 10 % of tokens carry, mean over ranks",
    "kl_unseen_share": "share of the reverse KL on tokens with a VA of at most 0.001 nats on which teacher and student "
    "differ by 1 nat or more: what the student is sure of and misreads, or words otherwise",
    "va_spread": "standard deviation of siblings' mean VA, mean over groups, nats: what the rollout weights amplify",
    "high_ties_share": "share of the high group whose VA a token outside it has, too, so that the place decides",
    "weights_entropy": "entropy of the rollout weights, mean over groups, nats; log K when they are uniform",
    "response_tokens_mean": "length of the responses, mean, tokens",
    "truncated_fraction": "share of the responses that were cut at the length limit",
    "grad_norm": "norm of the gradient before clipping",
    "policy_drift_mean": "difference between the log-prob that a token was sampled with and the trainer's, mean of its "
    "absolute value over the tokens that this policy sampled, nats; missing when older policies sampled them all",
    "policy_drift_max": "the largest of these differences, nats",
    "policy_drift_share": "share of these tokens that differ by more than 0.1 nats",
    "skipped": "1 when the gradient was not finite and the step changed nothing; missing in other steps",
    "learning_rate": "learning rate of the step",
    "publish_s": "publishing the policy, seconds",
    "wait_s": "waiting for the step's groups, seconds",
    "score_s": "waiting for scores after the last group has arrived, seconds",
    "forward_backward_s": "loss, backward and optimizer step, seconds",
    "step_s": "the four parts above together, seconds; waiting for an evaluation is not in it",
    "generation_s": "the slowest answer of a rollout worker, seconds; runs beside the waiting",
    "scoring_s": "time in which groups were prepared or at the teacher, seconds; runs beside the waiting",
    "score_overlap": "share of the scoring that the step did not wait for; left out when nothing was scored",
    "rollouts_per_s": "rollouts trained on per second of step_s",
    "groups_duplicate": "groups that arrived twice and were dropped, since the trainer started; this and the next "
    "three are missing while they are 0",
    "groups_stale": "groups of a policy that was too old, dropped and requested again",
    "groups_other_weights": "groups sampled with other weights than this policy's, dropped and requested again",
    "groups_dead": "groups that were given up and will never come; `vaopd queue dead` shows why",
    "records_left_out": "bad records of the training split that the run leaves out; missing where there is none",
}
"""The numbers of a "train" line in metrics.jsonl, beside `step` (from 0) and `time_s` (seconds since 1970)."""
EVALUATION_DESCRIPTIONS = {
    "accuracy": "avg@n: mean correctness over all answers to the held-out problems",
    "standard_error": "of the accuracy, over problems",
    "prompts": "held-out problems that were asked",
    "samples": "answers to each, the n of avg@n",
    "not_judged": "answers with a comparison that was cut off by its limit of time or memory; counted as wrong",
    "not_asked": "held-out problems that could not be asked, by reason: neither right nor wrong. Accuracy and its "
    "error are null where none could be asked",
    "judge": "the judge's version and math-verify's",
    "student_va": "the student's own VA on its answers: its own log-prob of a token with the image minus that with the "
    "degraded image, at least 0; mean over the tokens of one answer to each measured problem, nats; this and the next "
    "four are missing with evaluation.student_va_prompts = 0, and for a student that is spread over ranks",
    "student_va_error": "its standard error, over problems",
    "student_va_first_answers": "the same on the answers of the run's first evaluation: the words stay, and only the "
    "student changes",
    "student_va_prompts": "problems that it was measured on",
    "student_va_s": "seconds of the measurement",
}
"""The numbers of an "eval" line; its `step` is the policy version: the steps that were taken before."""
DRIFT_NATS = 0.1
"""A token whose log-prob differs by more than that is counted in policy_drift_share."""
LARGEST_DRIFT_SHARE = 0.05
"""A larger share is warned of, here and by the alert. Two forwards whose logits near 24 are rounded to bfloat16 differ
by σ = 0.04 nats, which takes 1 % of the tokens over 0.1; other weights or pixels take many more."""
UNSEEN_NATS, SURE_NATS = 1e-3, 1.0
"""A token with at most that VA, and at least that KL, counts in kl_unseen_share."""
_IMAGES_SHOWN = 4  # so many groups of a step are written with their image


def sum_groups(
    groups: Sequence[WeightedGroup], kl: Sequence[np.ndarray], loss: float, *, high_fraction: float = HIGH_FRACTION
) -> dict[str, float] | None:
    """Sums over this rank's groups, for `average_ranks`. kl: each group's (M,) in nats; loss: this rank's share.

    None on a rank without groups. high_fraction: the run's own; the paper's for objectives without a high group.
    """
    if not groups:
        return None
    va_NT, mask_NT = objective.pad_rows([va for group in groups for va in group.scored.score.visual_advantage])
    high_NT = objective.high_group(va_NT, mask_NT, high_fraction=high_fraction)
    high_M = high_NT[mask_NT].numpy()
    kl_M = np.concatenate(kl)
    rollouts = [rollout for group in groups for rollout in group.scored.group.rollouts]
    entropy = [float(-(w * w.clamp_min(1e-30).log()).sum()) for w in (group.rollout_weights for group in groups)]
    return {
        "loss": loss,
        "groups": len(groups),
        "rollouts": len(rollouts),
        "tokens": len(kl_M),
        "high_tokens": int(high_M.sum()),
        "va": float(va_NT.sum()),
        "kl": float(kl_M.sum()),
        "kl_high": float(kl_M[high_M].sum()),
        "kl_unseen": float(kl_M[(va_NT[mask_NT].abs().numpy() <= UNSEEN_NATS) & (kl_M >= SURE_NATS)].sum()),
        "va_spread": sum(float(np.std([va.mean() for va in group.scored.score.visual_advantage])) for group in groups),
        "high_ties": _count_ties(va_NT, mask_NT, high_NT),
        "va_top10_share": objective.va_share_of_top(va_NT, mask_NT, fraction=0.1),
        "weights_entropy": sum(entropy),
        "truncated": sum(rollout.finish_reason == "length" for rollout in rollouts),
        "generation_s": max(group.scored.group.generation_s for group in groups),
    }


def _count_ties(va_NT: Tensor, mask_NT: Tensor, high_NT: Tensor) -> int:
    """Counts the tokens of the high group whose VA a token of the same rollout outside it has, too."""
    lowest_N1 = va_NT.masked_fill(~high_NT, math.inf).amin(1, keepdim=True)
    tied_NT = va_NT == lowest_N1
    outside_N1 = (tied_NT & mask_NT & ~high_NT).any(1, keepdim=True)
    return int((tied_NT & high_NT & outside_N1).sum())


def sum_drift(groups: Sequence[WeightedGroup], logprobs: Sequence[np.ndarray], *, version: int) -> dict[str, float]:
    """Compares the trainer's log-probs, each group's (M,), with those that workers recorded as they sampled.

    Both are the student's own at temperature 1, before temperature, top-p and bans, so that these don't matter. Groups
    of an older policy than `version`, the trainer's, are left out: their difference is the training's own.
    """
    differences = [
        np.abs(mine - np.concatenate([rollout.rollout_logprobs for rollout in group.scored.group.rollouts]))
        for group, mine in zip(groups, logprobs, strict=True)
        if group.scored.group.policy_version == version
    ]
    drift_M = np.concatenate([*differences, np.empty(0, np.float32)]).astype(np.float64)
    return {
        "drift_tokens": len(drift_M),
        "drift": float(drift_M.sum()),
        "drift_max": float(drift_M.max(initial=0.0)),
        "drift_large": int((drift_M > DRIFT_NATS).sum()),
    }


def average_ranks(sums: Sequence[dict[str, float] | None]) -> dict[str, float]:
    """Turns the sums of all ranks into the means that `DESCRIPTIONS` describes, and "rollouts", their number."""
    parts = [part for part in sums if part is not None]
    total = {key: sum(part[key] for part in parts) for key in parts[0]}
    low_tokens = total["tokens"] - total["high_tokens"]
    shares = [part["va_top10_share"] for part in parts if math.isfinite(part["va_top10_share"])]  # NaN: no VA there
    return {
        "loss": total["loss"],
        "rollouts": total["rollouts"],
        "mean_va": total["va"] / total["tokens"],
        "kl_mean": total["kl"] / total["tokens"],
        "kl_high": total["kl_high"] / total["high_tokens"],
        "kl_low": (total["kl"] - total["kl_high"]) / low_tokens if low_tokens else math.nan,
        "kl_unseen_share": total["kl_unseen"] / total["kl"] if total["kl"] else math.nan,
        "va_spread": total["va_spread"] / total["groups"],
        "high_ties_share": total["high_ties"] / total["high_tokens"],
        "va_top10_share": sum(shares) / len(shares) if shares else math.nan,
        "weights_entropy": total["weights_entropy"] / total["groups"],
        "response_tokens_mean": total["tokens"] / total["rollouts"],
        "truncated_fraction": total["truncated"] / total["rollouts"],
        "generation_s": max(part["generation_s"] for part in parts),
        **_average_drift([part for part in parts if part.get("drift_tokens")]),
    }


def _average_drift(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns the three numbers of the on-policy check; none where no token was comparable."""
    if not parts:
        return {}
    tokens = sum(part["drift_tokens"] for part in parts)
    return {
        "policy_drift_mean": sum(part["drift"] for part in parts) / tokens,
        "policy_drift_max": max(part["drift_max"] for part in parts),
        "policy_drift_share": sum(part["drift_large"] for part in parts) / tokens,
    }


def derive_rates(timings: dict[str, float], *, rollouts: float) -> dict[str, float]:
    """Computes step_s, rollouts_per_s and score_overlap from a step's times, in seconds."""
    step_s = sum(timings[part] for part in STEP_TIMES)
    return {
        "step_s": step_s,
        "rollouts_per_s": rollouts / step_s,
        # Of nothing there is no share; what is not finite is left out of the records.
        "score_overlap": max(0.0, 1 - timings["score_s"] / timings["scoring_s"]) if timings["scoring_s"] else math.nan,
    }


def describe_rollouts(
    group: WeightedGroup, kl_M: np.ndarray, prompt: Prompt, tokenizer: Any
) -> Iterator[dict[str, Any]]:
    """Yields a record for each rollout: question, tokens with their VA, log-probs and KL, weight, and correctness.

    kl_M: the group's KL (M,) in nats, siblings one after the other.
    """
    score = group.scored.score
    start = 0
    for k, rollout in enumerate(group.scored.group.rollouts):
        text = tokenizer.decode(rollout.response_ids, skip_special_tokens=True)
        verdict = judge(text, prompt.answer) if prompt.answer else None
        record: dict[str, Any] = {
            "group_id": group.scored.group.group_id,
            "rollout_id": rollout.rollout_id,
            "question": describe_question(prompt),
            "answer": prompt.answer,
            "tokens": [tokenizer.decode([token]) for token in rollout.response_ids],
            "visual_advantage": round_values(score.visual_advantage[k]),
            "teacher_logprobs": round_values(score.teacher_logprobs[k]),
            "degraded_logprobs": round_values(score.degraded_logprobs[k]),
            "rollout_logprobs": round_values(rollout.rollout_logprobs),
            **{name: round_values(rows[k]) for name, rows in score.columns.items()},
            "kl": round_values(kl_M[start : start + len(rollout.response_ids)]),
            "rollout_weight": round(float(group.rollout_weights[k]), 6),
            **({} if verdict is None else {"correct": bool(verdict), "verdict": verdict.value}),
        }
        if k == 0 and prompt.images and group.scored.index < _IMAGES_SHOWN:
            record["image_base64"] = base64.b64encode(prompt.images[0].data).decode()
        start += len(rollout.response_ids)
        yield record


def describe_question(prompt: Prompt) -> str:
    """Returns the texts of a prompt's messages."""
    texts = (part.text for message in prompt.messages for part in message.content if isinstance(part, TextPart))
    return " ".join(texts).strip()


def round_values(values: np.ndarray) -> list[float]:
    """Returns the numbers as records have them, with five decimals."""
    return [round(float(value), 5) for value in values]
