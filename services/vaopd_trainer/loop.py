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
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from transformers import get_cosine_schedule_with_warmup

from vaopd.config import Config
from vaopd.errors import NumericalError, VaopdError
from vaopd.run.checkpoints import LedgerLine, RunState, load_run_state
from vaopd.telemetry import tracing
from vaopd_trainer import checkpoint, kill_points, step_numbers
from vaopd_trainer.coordinator import Coordinator, Weights
from vaopd_trainer.rank_messages import Ranks, Stopped
from vaopd_trainer.scorer import GroupScorer, Refused
from vaopd_trainer.student_loss import ScoredGroup, StudentLoss, WeightedGroup, weigh

log = logging.getLogger(__name__)


class Trainer:
    """One rank. `vaopd_trainer.compose` makes its collaborators; rank 0 has the coordinator."""

    def __init__(
        self,
        *,
        config: Config,
        accelerator: Accelerator,
        ranks: Ranks,
        loss: StudentLoss,
        coordinator: Coordinator | None,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.ranks = ranks
        self.coordinator = coordinator
        self.state = RunState()
        self._weights: Weights | None = None  # those of a checkpoint, until they are published
        settings = config.trainer
        trainable = [p for p in loss.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trainable, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
        )
        self.schedule = get_cosine_schedule_with_warmup(optimizer, settings.warmup_steps, settings.steps)
        self.loss, self.optimizer = accelerator.prepare(loss, optimizer)

    # -- the run ------------------------------------------------------------------------------------------------------

    def resume(self, folder: Path) -> None:
        """Continues from a checkpoint. Its weights were loaded into the student before the model was wrapped."""
        self.state = load_run_state(folder)
        checkpoint.load_optimizer(folder, self.optimizer)
        self.schedule.load_state_dict(self.state.schedule)
        # The schedule sets the optimizer's rate after a step only; this one still has step 0's.
        for group, rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        log.info("resumed at step %d with %d trained groups", self.state.step, len(self.state.ledger))

    def run(self, scorer: GroupScorer) -> None:
        """Trains to the last step, evaluates and leaves the final model in RUN/model. Raises Stopped on request."""
        steps = self.config.trainer.steps
        try:
            while self.state.step < steps:
                with tracing.span("train step", job=self.config.run.name, step=self.state.step):
                    self._step(self.state.step, scorer)
                if self.state.step % self.config.trainer.checkpoint_every == 0 or self.state.step == steps:
                    self._checkpoint()
            self._begin(steps)
            if self.coordinator is not None:
                self.coordinator.finish_evaluation()
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
        # After a checkpoint its weights serve; a sharded student's are a copy, which is let go here. None alone means
        # "not gathered": on other ranks they may be empty, and all ranks gather together.
        weights, self._weights = self._weights, None
        if weights is None:
            weights = self._gather_weights()
        if self.coordinator is not None:
            self.coordinator.publish(version, weights)

    def _checkpoint(self) -> None:
        self.state.schedule = self.schedule.state_dict()
        self._weights = self._gather_weights()
        if self.coordinator is not None:
            self.coordinator.save_checkpoint(self.state, self._weights, self.optimizer.optimizer)

    def _gather_weights(self) -> Weights:
        """Returns the whole student's weights on rank 0. A collective under FSDP."""
        state = self.accelerator.get_state_dict(self.loss)
        return {name.removeprefix("model."): tensor for name, tensor in state.items()}

    # -- groups -------------------------------------------------------------------------------------------------------

    def _collect(self, step: int, scorer: GroupScorer) -> tuple[list[ScoredGroup], dict[str, float]]:
        """Returns this rank's groups of the step, in the order of the prompts, and the seconds of waiting.

        Each is scored as soon as it has arrived.
        """
        started = time.monotonic()
        if self.coordinator is not None:
            self.coordinator.distribute(step, scorer.submit)
        else:
            for _ in range(self.config.trainer.prompts_per_step // self.ranks.world):
                group = self.ranks.receive_group()
                scorer.submit([] if group is None else [group])
        generated = time.monotonic()
        kill_points.pass_point("collected", step)
        results = list(scorer.wait_for_results(check=self._check_alone))
        kill_points.pass_point("scored", step)
        refused = self.ranks.gather([[r.group_id, r.reason] for r in results if isinstance(r, Refused)])
        if self.coordinator is not None:
            self.coordinator.give_up((group_id, reason) for part in refused for group_id, reason in part)
        scored = sorted((r for r in results if isinstance(r, ScoredGroup)), key=lambda group: group.index)
        if not scored:
            raise VaopdError(
                f"step {step}: none of this rank's groups can be trained on; the dead letters say why "
                f"(job {self.config.run.name!r})"
            )
        timings = {"wait_s": generated - started, "score_s": time.monotonic() - generated}
        return scored, timings | {"scoring_s": scorer.busy.take()}

    def _check_alone(self) -> None:
        """Ends a wait for scores on request; several ranks don't listen then, and end with their step."""
        if self.coordinator is not None and self.ranks.world == 1:
            self.coordinator.check()

    # -- the step -----------------------------------------------------------------------------------------------------

    def _train(self, step: int, scored: list[ScoredGroup], timings: dict[str, float]) -> None:
        started = time.monotonic()
        weighted = [weigh(group, self.config.objective, seed=self._mask_seed(step, group.index)) for group in scored]
        loss, kl = self._backward(weighted)
        kill_points.pass_point("backward", step)
        started += self._finish_evaluation()
        norm = self.accelerator.clip_grad_norm_(self.loss.parameters(), self.config.trainer.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise NumericalError(f"step {step}: the gradient's norm is {float(norm)}; nothing was changed")
        learning_rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.state.step = step + 1
        kill_points.pass_point("stepped", step)
        timings["forward_backward_s"] = time.monotonic() - started
        sums = self.ranks.gather(step_numbers.sum_groups(weighted, kl, loss))
        lines = self.ranks.gather([[g.group.group_id, g.group.policy_version] for g in scored])
        trained = [
            LedgerLine(group_id=group_id, step=step, policy_version=version)
            for part in lines
            for group_id, version in part
        ]
        self.state.ledger += trained
        if self.coordinator is not None:
            own = timings | {"grad_norm": float(norm), "learning_rate": learning_rate}
            self.coordinator.record(step, sums, own, trained=trained, weighted=weighted, kl=kl)

    def _finish_evaluation(self) -> float:
        """Waits until the evaluation of this step's policy has ended, if there is one -> the seconds of waiting.

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

    def _backward(self, weighted: list[WeightedGroup]) -> tuple[float, list[np.ndarray]]:
        """Accumulates the gradient over forwards of whole groups -> this rank's share of the loss, each group's KL."""
        size = self.config.trainer.groups_per_forward
        batches = [weighted[start : start + size] for start in range(0, len(weighted), size)]
        total = 0.0
        kl: list[np.ndarray] = []
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with self.accelerator.autocast(), self._sync(last):
                loss, kl_M = self.loss(batch)
                share = loss / self.config.trainer.prompts_per_step
                # Data parallelism averages gradients over ranks; the loss is a sum over all groups.
                self.accelerator.backward(share * self.ranks.world)
            total += float(share.detach())
            lengths = [len(group.token_weights) for group in batch]
            kl.extend(part.float().cpu().numpy() for part in kl_M.split(lengths))
        return total, kl

    def _sync(self, last: bool) -> AbstractContextManager[None]:
        """Exchanges gradients once per step, in the last backward."""
        return nullcontext() if last else self.accelerator.no_sync(self.loss)

    def _mask_seed(self, step: int, index: int) -> int:
        """Returns the seed of a random mask, the same however the groups are spread over ranks."""
        return int(np.random.SeedSequence([self.config.run.seed, step, index]).generate_state(1)[0])
