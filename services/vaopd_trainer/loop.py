"""One rank's steps: from a policy version to the next.

    publish ─► enqueue, evaluate ─► collect ─► score ─► weigh ─► forward, backward ─► step ─► checkpoint
    rank 0      rank 0   │          groups     teacher   objective  StudentLoss      ▲ AdamW    rank 0
                         └────────────── answered beside all this, awaited here ─────┘

In: groups (through the coordinator) and scores (through the scorer). Out: the student's weights, a step further. Waits
for rollout workers and the teacher. On-policy: step s learns from policy version s, at most `max_policy_lag` older.

The collectives, in which all ranks take part, stand here; what rank 0 alone does is `Coordinator`'s.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from vaopd.config import Config
from vaopd.errors import LeaseLost, Mismatch, NumericalError, VaopdError
from vaopd.run.checkpoints import LedgerLine, RunState, load_run_state
from vaopd.scoring.weights import HIGH_FRACTION
from vaopd.telemetry import tracing
from vaopd_trainer import checkpoint, kill_points, step_numbers
from vaopd_trainer.coordinator import Coordinator
from vaopd_trainer.forwards import Accumulator
from vaopd_trainer.optimizer import make_schedule
from vaopd_trainer.rank_messages import Ranks, Stopped
from vaopd_trainer.scorer import GroupScorer, Refused
from vaopd_trainer.student_loss import ScoredGroup, weigh
from vaopd_trainer.student_weights import StudentWeights

log = logging.getLogger(__name__)


class Trainer:
    """One rank. `vaopd_trainer.compose` makes its collaborators; rank 0 has the coordinator."""

    def __init__(
        self,
        *,
        config: Config,
        accelerator: Accelerator,
        ranks: Ranks,
        weights: StudentWeights,
        coordinator: Coordinator | None,
        stop: threading.Event | None = None,
    ) -> None:
        """stop: set by a signal to this process; rank 0's coordinator has its own eye on it."""
        self.config = config
        self.ranks = ranks
        self.coordinator = coordinator
        self.state = RunState()
        self.weights = weights
        self.optimizer = weights.optimizer
        self._stop = stop or threading.Event()
        settings = config.trainer
        self.schedule = make_schedule(self.optimizer, warmup_steps=settings.warmup_steps, steps=settings.steps)
        self._accumulator = Accumulator(accelerator=accelerator, weights=weights, settings=settings)

    # -- the run ------------------------------------------------------------------------------------------------------

    def resume(self, folder: Path) -> None:
        """Continues from a checkpoint, whichever number of ranks wrote it."""
        self.state = load_run_state(folder)
        checkpoint.load(folder, self.weights)
        checkpoint.continue_schedule(self.schedule, self.optimizer, self.state)
        log.info("resumed at step %d with %d trained groups", self.state.step, len(self.state.ledger))

    def run(self, scorer: GroupScorer) -> None:
        """Trains to the last step, evaluates and leaves the final model in RUN/model. Raises Stopped on request."""
        steps = self.config.trainer.steps
        try:
            while self.state.step < steps:
                with tracing.span("train step", job=self.config.run.name, step=self.state.step):
                    self._step(self.state.step, scorer)
                self._check_skipped()
                if self.state.step % self.config.trainer.checkpoint_every == 0 or self.state.step == steps:
                    self._checkpoint()
            self._begin(steps)
            self._finish_evaluation()
        except Stopped:
            self._checkpoint()
            raise
        if self.coordinator is not None:
            self.coordinator.finish()

    def _step(self, step: int, scorer: GroupScorer) -> None:
        publish_s = self._begin(step)
        scored, timings = self._collect(step, scorer)
        self._train(step, scored, {"publish_s": publish_s, **timings})

    def _begin(self, step: int) -> float:
        """Publishes the policy, asks for the step's groups, then for an evaluation if due -> seconds of publishing.

        After the last step there are no more groups to ask for.
        """
        started = time.monotonic()
        self._publish(step)
        publish_s = time.monotonic() - started
        if self.coordinator is not None:
            self.coordinator.enqueue(step)
            self.coordinator.evaluate_if_due(step)
        return publish_s

    def _publish(self, version: int) -> None:
        student = self.config.student
        # Adapters are small: the workers round them.
        stream = self.weights.stream(getattr(torch, student.dtype if student.lora is None else "float32"))
        if self.coordinator is not None:
            self.coordinator.publish(version, stream)
        else:
            for _ in stream:  # all ranks gather each tensor together
                pass

    def _checkpoint(self) -> None:
        self.state.schedule = self.schedule.state_dict()
        if self.coordinator is not None:
            self.coordinator.save_checkpoint(self.state, self.weights)
        else:
            self.weights.save(None)

    # -- groups -------------------------------------------------------------------------------------------------------

    def _collect(self, step: int, scorer: GroupScorer) -> tuple[list[ScoredGroup], dict[str, float]]:
        """Returns this rank's groups of the step, in the order of the prompts, and the seconds of waiting.

        Each is scored as soon as it has arrived.
        """
        started = time.monotonic()
        if self.coordinator is not None:
            self.coordinator.distribute(step, scorer.submit)
        else:
            while (group := self.ranks.receive_group()) is not None:
                scorer.submit([group])
        generated = time.monotonic()
        kill_points.pass_point("collected", step)
        results, failure = self._wait_for_scores(scorer)
        kill_points.pass_point("scored", step)
        refused = [[r.group_id, r.reason] for r in results if isinstance(r, Refused)]
        told = self.coordinator is None and self._stop.is_set()
        everyone = self.ranks.gather(
            {"refused": refused, "failure": None if failure is None else str(failure), "stop": told}
        )
        if any(part["stop"] for part in everyone):  # one host of several is being drained
            raise Stopped
        failed = [part["failure"] for part in everyone if part["failure"] is not None]
        if failed:
            # Weights and ledger are those after the last step, on every rank: none of its work is lost.
            self._checkpoint()
            raise failure or Mismatch(f"another rank can't have its groups scored: {failed[0]}")
        if self.coordinator is not None:
            self.coordinator.give_up((group_id, reason) for part in everyone for group_id, reason in part["refused"])
        scored = sorted((r for r in results if isinstance(r, ScoredGroup)), key=lambda group: group.index)
        if not any(self.ranks.gather(len(scored))):
            raise VaopdError(
                f"step {step}: none of its groups can be trained on; the dead letters say why "
                f"(job {self.config.run.name!r})"
            )
        timings = {"wait_s": generated - started, "score_s": time.monotonic() - generated}
        return scored, timings | {"scoring_s": scorer.busy.take()}

    def _wait_for_scores(self, scorer: GroupScorer) -> tuple[list[ScoredGroup | Refused], VaopdError | None]:
        """Returns the outcome of each group; or the error with which the teacher refuses this trainer altogether."""
        try:
            return list(scorer.wait_for_results(check=self._check_alone)), None
        except LeaseLost:  # another trainer has the run: nothing may be written any more
            raise
        except VaopdError as error:
            return [], error

    def _check_alone(self) -> None:
        """Ends a wait for scores on request; several ranks don't listen then, and end with their step."""
        if self.coordinator is not None and self.ranks.world == 1:
            self.coordinator.check()

    # -- the step -----------------------------------------------------------------------------------------------------

    def _train(self, step: int, scored: list[ScoredGroup], timings: dict[str, float]) -> None:
        started = time.monotonic()
        weighted = [weigh(group, self.config.objective, seed=self._mask_seed(step, group.index)) for group in scored]
        loss, values = self._accumulator.backward(weighted)
        kl = [of_group.kl.numpy() for of_group in values]
        weighted = [group.record_expected_va(found.expected_va) for group, found in zip(weighted, values, strict=True)]
        kill_points.pass_point("backward", step)
        started += self._finish_evaluation()
        norm = self.weights.clip(self.config.trainer.max_grad_norm)
        learning_rate = float(self.schedule.get_last_lr()[0])
        skipped = not math.isfinite(norm)  # on every rank alike: the gradient is the sum of all
        if not skipped:
            self.optimizer.step()
        self.optimizer.zero_grad()
        # The rate follows the steps, skipped or not; torch would warn of one without the optimizer's.
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            self.schedule.step()
        self.state.step = step + 1
        kill_points.pass_point("stepped", step)
        timings["forward_backward_s"] = time.monotonic() - started
        own_fraction = self.config.objective.as_keywords().get("high_fraction", HIGH_FRACTION)
        own_sums = step_numbers.sum_groups(weighted, kl, loss, high_fraction=own_fraction)
        if own_sums is not None:
            logprobs = [of_group.logprobs.numpy() for of_group in values]
            own_sums |= step_numbers.sum_drift(weighted, logprobs, version=step)
        sums = self.ranks.gather(own_sums)
        lines = self.ranks.gather(
            [
                [g.group.group_id, g.group.policy_version, bool(np.isfinite(kl_M).all())]
                for g, kl_M in zip(scored, kl, strict=True)
            ]
        )
        trained = [
            LedgerLine(group_id=group_id, step=step, policy_version=version, skipped=skipped)
            for part in lines
            for group_id, version, _ in part
        ]
        self.state.ledger += trained
        if skipped:
            blamed = [group_id for part in lines for group_id, _, finite in part if not finite]
            log.warning(
                "step %d is skipped: the gradient's norm is %s; groups whose KL is not finite: %s",
                step,
                norm,
                ", ".join(blamed) or "none",
            )
        if self.coordinator is not None:
            own = timings | {"learning_rate": learning_rate} | ({"skipped": 1.0} if skipped else {"grad_norm": norm})
            self.coordinator.record(step, sums, own, trained=trained, weighted=weighted, kl=kl)

    def _finish_evaluation(self) -> float:
        """Waits, on every rank, until the evaluation of this step's policy has ended, if there is one -> the seconds.

        As late as possible, yet before the weights change: a run that is stopped here resumes at this very version, and
        evaluates it out of the same groups. Raises Stopped, on every rank.
        """
        started = time.monotonic()
        if self.coordinator is not None:
            self.coordinator.finish_evaluation()
            for rank in range(1, self.ranks.world):
                self.ranks.send_group(None, to=rank)
        else:
            self.ranks.receive_group()
        return time.monotonic() - started

    def _check_skipped(self) -> None:
        """Ends the run when too many steps in a row were skipped; a checkpoint holds them, so that they stay behind."""
        lines = self.state.list_last_skipped()
        steps = sorted({line.step for line in lines})
        if len(steps) < self.config.trainer.max_skipped_steps:
            return
        self._checkpoint()
        raise NumericalError(
            f"the gradient was not finite in {len(steps)} steps in a row, {steps[0]} to {steps[-1]} "
            f"(trainer.max_skipped_steps = {self.config.trainer.max_skipped_steps}), and nothing was changed in them; "
            f"groups: {', '.join(line.group_id for line in lines)}. --resume continues with the groups after them"
        )

    def _mask_seed(self, step: int, index: int) -> int:
        """Returns the seed of a random mask, the same however the groups are spread over ranks."""
        return int(np.random.SeedSequence([self.config.run.seed, step, index]).generate_state(1)[0])
