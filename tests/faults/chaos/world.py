"""What happens in a chaos run, as functions of its seed: who asks for what, what is answered, and what must come out.

Nothing here depends on time or on faults. So the weights at the end, a chain of digests over every trained group in
its order, can be computed without any process, and a group that was lost, doubled, paired with another's score or
sampled by another policy shows in them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vaopd.types import GroupId, Message, Rollout, RolloutGroup, RolloutRequest, SamplingSettings, TextPart

JOB = "chaos"
ROLLOUTS = 2
PROMPT = np.array([1, 2, 3], np.int32)


@dataclass(frozen=True, kw_only=True)
class World:
    """Everything that a process of the run is told."""

    seed: int
    steps: int
    groups_per_step: int
    folder: Path
    redis_url: str
    """Of the proxy before it."""
    teacher_target: str
    lease_s: float

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def quiet(self) -> Path:
        """Is there once all faults have come; the last step begins then."""
        return self.folder / "quiet"

    def group_ids(self, step: int) -> list[str]:
        return [_training_group(step, index) for index in range(self.groups_per_step)]

    def dice(self, what: str, group_id: str) -> int:
        """A number from 0 to 999."""
        return int.from_bytes(_digest(self.seed, what, group_id)[:4]) % 1000

    def is_poison(self, group_id: str) -> bool:
        """No engine can answer it; 5 in 1000."""
        return self.dice("poison", group_id) < 5

    def is_refused(self, group_id: str) -> bool:
        """The trainer can't train on it; 2 in 1000."""
        return self.dice("refused", group_id) < 2

    def is_killer(self, group_id: str) -> bool:
        """Kills every worker that works on it; two in a run."""
        return group_id in {_training_group(self.steps * quarter // 4, 0) for quarter in (1, 3)}

    def is_duplicated(self, stream: str, group_id: str) -> bool:
        """Its request or its group is published a second time, behind the queue's back; over 5 in 100 together."""
        dice = self.dice("duplicate", group_id)
        return dice < 27 if stream == "requests" else 27 <= dice < 54

    def has_a_corrupt_neighbour(self, stream: str, group_id: str) -> bool:
        """1 in 100 for each stream."""
        return self.dice(f"corrupt {stream}", group_id) < 10

    def must_die(self, group_id: str) -> bool:
        return self.is_poison(group_id) or self.is_refused(group_id) or self.is_killer(group_id)


def _training_group(step: int, index: int) -> str:
    return str(GroupId(purpose="train", step=step, index=index))


def _digest(*parts: object) -> bytes:
    return hashlib.sha256("\x00".join(str(part) for part in parts).encode()).digest()


def first_weights(world: World) -> str:
    return _digest("weights", world.seed).hex()


def policy_sha256(weights: str) -> str:
    return _digest("policy", weights).hex()


def request_for(group_id: str, version: int) -> RolloutRequest:
    return RolloutRequest(
        group_id=group_id,
        messages=(Message(role="user", content=(TextPart(text=f"What is {group_id}?"),)),),
        images=(),
        num_rollouts=ROLLOUTS,
        sampling=SamplingSettings(),
        policy_version=version,
    )


def responses_to(group_id: str, policy: str) -> list[np.ndarray]:
    """K arrays (T_k,) int32 that only this prompt and these weights give."""
    digests = [_digest("response", group_id, policy, k) for k in range(ROLLOUTS)]
    return [np.frombuffer(digest[: 4 * (3 + k)], ">u4").astype(np.int64) % 1000 for k, digest in enumerate(digests)]


def group_for(request: RolloutRequest, policy: str, *, worker: str) -> RolloutGroup:
    rollouts = tuple(
        Rollout(
            rollout_id=f"{request.group_id}/{k}",
            response_ids=ids.astype(np.int32),
            rollout_logprobs=np.full(len(ids), -0.5, np.float32),
            finish_reason="stop",
        )
        for k, ids in enumerate(responses_to(request.group_id, policy))
    )
    return RolloutGroup(
        group_id=request.group_id,
        policy_version=request.policy_version,
        policy_sha256=policy,
        prompt_token_ids=PROMPT,
        rollouts=rollouts,
        worker=worker,
        generation_s=0.0,
    )


def scores_of(group_id: str, responses: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """The teacher: log-probs of both views, (M,) float32 each, of this group and these tokens only."""
    views = []
    for view in ("original", "degraded"):
        texts = [_digest(view, group_id, ids)[0] for ids in responses for _ in ids]
        views.append(-np.array(texts, np.float32) / 64)
    return views[0], views[1]


def train(weights: str, group_id: str, responses: list[list[int]], teacher_logprobs: list[float]) -> str:
    return _digest(weights, group_id, responses, [round(64 * value) for value in teacher_logprobs]).hex()


def expected_weights(world: World) -> str:
    """Without a queue, a worker, a teacher or a fault."""
    weights = first_weights(world)
    for step in range(world.steps):
        policy = policy_sha256(weights)
        for group_id in world.group_ids(step):
            if not world.must_die(group_id):
                responses = [ids.tolist() for ids in responses_to(group_id, policy)]
                weights = train(weights, group_id, responses, scores_of(group_id, responses)[0].tolist())
    return weights
