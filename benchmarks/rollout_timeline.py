"""Shows a step's timeline when groups leave a rollout worker one by one, and when they leave as a batch.

`python benchmarks/rollout_timeline.py` measures the tiny pair, vLLM, a Valkey, a teacher process, one worker, a step of
16 groups of 4 responses; all take TOKENS tokens but for one rollout, 40 times as long. An evaluation of 8 groups is
requested behind the step. *batch* waits until all that it took has ended, and takes nothing meanwhile.
"""

from __future__ import annotations

import dataclasses
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Literal

import numpy as np
import PIL.Image
import tables
from serving import ROOT, TINY_TEACHER, encoded, teacher_server

from vaopd.client import SyncTeacherClient
from vaopd.queue import TrainerQueue, WorkerQueue
from vaopd.queue.embedded import EmbeddedRedis
from vaopd.run.snapshots import describe_model
from vaopd.sampling.engine import Ended
from vaopd.sampling.vllm_engine import VllmEngine
from vaopd.types import (
    GroupId,
    PolicyVersion,
    RolloutGroup,
    RolloutRequest,
    SamplingSettings,
    ScoreRequest,
    unique_images,
    user_turn,
)
from vaopd.vlm.prompts import load_processor, tokenizer_fingerprint
from vaopd_rollout.worker import RolloutWorker, Stop

GROUPS, ROLLOUTS, HELD_OUT, TOKENS, LONGER = 16, 4, 8, 8, 40


class Batches:
    """What the worker did before: a step ends when all that was added has ended."""

    capacity: int | None = None

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine
        self._added = 0
        self.load_policy, self.generate, self.close = engine.load_policy, engine.generate, engine.close

    @property
    def policy(self) -> PolicyVersion | None:
        return self._engine.policy

    @property
    def tokens_held(self) -> int:
        return self._engine.tokens_held

    def add(self, key: str, request: RolloutRequest) -> None:
        self._added += 1
        self._engine.add(key, request)

    def step(self) -> list[Ended]:
        ended: list[Ended] = []
        while len(ended) < self._added:
            ended += self._engine.step()
        self._added = 0
        return ended


def requests(number: int) -> list[RolloutRequest]:
    """The step's groups, then the evaluation's. The long rollout is alone in its group, so that its length is free."""
    picture = PIL.Image.fromarray(np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    image = encoded(picture)

    def ask(purpose: Literal["train", "eval"], index: int, rollouts: int, tokens: int) -> RolloutRequest:
        return RolloutRequest(
            group_id=str(GroupId(purpose=purpose, step=number, index=index)),
            messages=user_turn("What is the perimeter of the triangle?", [image]),
            images=unique_images([image]),
            num_rollouts=rollouts,
            sampling=SamplingSettings(temperature=1.0, top_p=1.0, max_new_tokens=tokens, seed=number),
            policy_version=0,
        )

    long = ask("train", 0, 1, LONGER * TOKENS)
    step = [ask("train", index, ROLLOUTS, TOKENS) for index in range(1, GROUPS)]
    return [long, *step, *(ask("eval", index, ROLLOUTS, TOKENS) for index in range(HELD_OUT))]


def follow(queue: TrainerQueue, teacher: SyncTeacherClient, asked: Sequence[RolloutRequest]) -> dict[str, float]:
    """Plays the trainer of one step; returns when things happened, in seconds since the first request."""
    images = {request.group_id: request.images for request in asked}
    arrived: dict[str, float] = {}
    scored: dict[str, float] = {}
    began = time.monotonic()

    def score(group: RolloutGroup) -> None:
        ids = tuple(rollout.response_ids for rollout in group.rollouts)
        name, prompt = group.group_id, group.prompt_token_ids
        request = ScoreRequest(group_id=name, responses=ids, images=images[name], prompt_token_ids=prompt)
        list(teacher.score([request]))
        scored[name] = time.monotonic() - began

    for request in asked:
        queue.enqueue(request)
    with ThreadPoolExecutor(1) as scorer:
        while len(arrived) < len(asked):
            for delivered in queue.collect(block_s=0.2):
                arrived[delivered.group.group_id] = time.monotonic() - began
                queue.acknowledge([delivered.entry_id])
                if delivered.group.group_id.startswith("train"):
                    scorer.submit(score, delivered.group)
    trained = sorted(at for name, at in arrived.items() if name.startswith("train"))
    return {
        "first group arrived": trained[0],
        "15 of 16 groups arrived": trained[-2],
        "15 of 16 groups scored": sorted(scored.values())[-2],
        "the long rollout's group arrived": trained[-1],
        "all 16 groups scored: the step can train": max(scored.values()),
        "evaluation ended": max(at for name, at in arrived.items() if name.startswith("eval")),
    }


def run_step(engine: VllmEngine | Batches, number: int, url: str, teacher: SyncTeacherClient) -> dict[str, float]:
    """Runs a worker in this thread and the trainer in another, until the step and the evaluation have ended."""
    stop = Stop(drain_s=600)
    job = f"step-{number}-{type(engine).__name__}"
    found: dict[str, float] = {}

    def train() -> None:
        try:
            with closing(TrainerQueue(url=url, job=job)) as queue:
                queue.acquire()
                assert engine.policy is not None
                queue.publish_policy(engine.policy)
                with queue.keeper():
                    found.update(follow(queue, teacher, requests(number)))
        finally:
            stop.request()

    trainer = threading.Thread(target=train)
    trainer.start()
    RolloutWorker(
        engine=engine, queue=WorkerQueue(url=url, job=job, worker="w"), requests_per_batch=16, stop=stop
    ).run()
    trainer.join()
    return found


def never_stop(engine: VllmEngine) -> None:
    """Makes an id that is never sampled the only EOS, so that each response has the length of its request."""
    engine._reader = dataclasses.replace(engine._reader, eos_ids=(min(engine._reader.vision_token_ids),))


def main() -> None:
    parser = tables.parser(__doc__)
    options = parser.parse_args()
    with EmbeddedRedis() as redis:
        student = ROOT / "models" / "tiny-student"
        fingerprint = tokenizer_fingerprint(load_processor(student).tokenizer)
        with (
            teacher_server(TINY_TEACHER, batch_tokens=8192) as server,
            SyncTeacherClient(server.target, tokenizer_fingerprint=fingerprint) as teacher,
            closing(VllmEngine(str(student), worker="w", dtype="float32")) as engine,
        ):
            never_stop(engine)
            engine.load_policy(describe_model(student))
            sides = {"batch": Batches(engine), "stream": engine}
            for side in sides.values():
                run_step(side, 10_000, redis.url, teacher)  # everything is loaded
            runs = {name: [] for name in sides}
            for number in range(options.repeats):
                for name, side in sides.items():
                    runs[name].append(run_step(side, number, redis.url, teacher))
    medians = {
        n: {what: statistics.median(run[what] for run in found) for what in found[0]} for n, found in runs.items()
    }
    rows = [
        (what, f"{batch:.2f} s", f"{medians['stream'][what]:.2f} s", f"{batch / medians['stream'][what]:.1f} ×")
        for what, batch in medians["batch"].items()
    ]
    tables.table("A step with one long rollout, tiny pair", ("since the first request", "batch", "stream", ""), rows)
    tables.save(options.json, "rollout_timeline", {"measured": medians})


if __name__ == "__main__":
    main()
