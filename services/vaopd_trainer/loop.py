"""The trainer: one prompt group's way from the data set to the step that learns from it.

In: prompts, groups (through the collector), scores (through the scorer). Out: policy versions, checkpoints, metrics.
A step: publish the policy, enqueue its prompts, collect and score the groups, weigh, forward and backward, step. Waits
for: rollout workers and the teacher. On-policy: step s learns from policy version s, at most `max_policy_lag` older.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from transformers import get_cosine_schedule_with_warmup

from vaopd.config import Config
from vaopd.errors import NumericalError, VaopdError
from vaopd.run.snapshots import link_snapshot, prune_snapshots, publish_snapshot, ties_head, without_tied_head
from vaopd.telemetry import logs, tracing
from vaopd.types import PolicyVersion, Prompt
from vaopd.vlm.model import Vlm
from vaopd.wire.queue import rollout_group_from_bytes, rollout_group_to_bytes
from vaopd_trainer import checkpoint, kill_points, step_numbers
from vaopd_trainer.coordinator import Coordinator
from vaopd_trainer.heldout import evaluate
from vaopd_trainer.prompt_order import PromptOrder, training_request
from vaopd_trainer.rank_messages import COORDINATOR, Ranks
from vaopd_trainer.records import JsonLines
from vaopd_trainer.scorer import Refused, Scorer
from vaopd_trainer.student_loss import ScoredGroup, StudentLoss, WeightedGroup, weigh

log = logging.getLogger(__name__)

_STOP = b"stop"  # no protobuf message of a group: those begin with the tag of group_id


class Interrupted(Exception):
    """SIGTERM or Ctrl-C arrived; all finished steps are in a checkpoint."""


class Trainer:
    """One rank. Collaborators come in ready-made; `services/vaopd_trainer/__main__.py` composes them."""

    def __init__(
        self,
        *,
        config: Config,
        accelerator: Accelerator,
        ranks: Ranks,
        student: Vlm,
        loss: StudentLoss,
        prompts: Sequence[Prompt],
        coordinator: Coordinator | None,
        stop: threading.Event,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.ranks = ranks
        self.student = student
        self.prompts = prompts
        self.coordinator = coordinator
        self.stop = stop
        self.folder = config.run_folder.resolve()  # workers read snapshots from there, whatever folder they run in
        self.progress = checkpoint.Progress()
        self._first_step = 0
        self._acknowledged = 0  # lines of the ledger whose groups the queue need not be told of again
        self._best_accuracy = -1.0
        self._evaluated: dict[int, tuple[str, ...]] = {}  # version -> groups, until a checkpoint is beyond it
        self.order = PromptOrder(prompts=len(prompts), seed=config.run.seed)
        self.metrics_file = JsonLines(self.folder / "metrics.jsonl")
        self.samples_file = JsonLines(self.folder / "samples.jsonl")
        settings = config.trainer
        trainable = [p for p in loss.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trainable, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
        )
        self.schedule = get_cosine_schedule_with_warmup(
            optimizer, round(settings.warmup_fraction * settings.steps), settings.steps
        )
        self.loss, self.optimizer = accelerator.prepare(loss, optimizer)

    # -- the run ------------------------------------------------------------------------------------------------------

    def resume(self, folder: Path) -> None:
        """Goes on from a checkpoint. The student's weights were loaded from it before the model was wrapped."""
        self.progress = checkpoint.load_progress(folder)
        self._first_step = self.progress.step
        self._acknowledged = len(self.progress.ledger)
        checkpoint.load_optimizer(folder, self.optimizer)
        self.schedule.load_state_dict(self.progress.schedule)
        # The schedule sets the optimizer's rate after a step only; this one still has step 0's.
        for group, rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        if self.coordinator is not None:
            self.coordinator.metrics.resumed(self._first_step)
            self.coordinator.collector.resume(self._first_step, (line.group_id for line in self.progress.ledger))
            self.metrics_file.drop_from(self.progress.step)
            self.samples_file.drop_from(self.progress.step)
            evaluated = [line["accuracy"] for line in self.metrics_file.read() if line["kind"] == "eval"]
            self._best_accuracy = max(evaluated, default=-1.0)
        log.info("resumed at step %d with %d trained groups", self.progress.step, len(self.progress.ledger))

    def forget_records(self) -> None:
        """For a run that begins (again) at step 0: one that was killed before its first checkpoint left records."""
        self.metrics_file.drop_from(0)
        self.samples_file.drop_from(0)

    def run(self, scorer: Scorer) -> None:
        """Trains to the last step, evaluates and leaves the final model in RUN/model. Raises Interrupted on request."""
        steps = self.config.trainer.steps
        try:
            while self.progress.step < steps:
                with tracing.span("train step", job=self.config.run.name, step=self.progress.step):
                    self._step(self.progress.step, scorer)
                if self.progress.step % self.config.trainer.checkpoint_every == 0 or self.progress.step == steps:
                    self._checkpoint()
            self._publish(steps)
            self._evaluate_if_due(steps)
        except Interrupted:
            self._checkpoint()
            raise
        if self.coordinator is not None:
            link_snapshot(self._snapshot, self.folder / "model")
            self.coordinator.collector.finish(self._evaluated.pop(steps, ()), version=steps)

    def _step(self, step: int, scorer: Scorer) -> None:
        started = time.monotonic()
        self._publish(step)
        publish_s = time.monotonic() - started
        self._enqueue(step)
        self._evaluate_if_due(step)
        scored, timings = self._collect(step, scorer)
        self._train(step, scored, {"publish_s": publish_s, **timings})

    def _check(self) -> None:
        """Called by the coordinator while it waits: where a lost lease or a request to stop ends the run."""
        assert self.coordinator is not None
        self.coordinator.keeper.check()
        if self.stop.is_set():
            for rank in range(1, self.ranks.world):
                self.ranks.send(_STOP, to=rank)
            raise Interrupted

    def _check_alone(self) -> None:
        """As `_check`, where the other ranks are not listening: several of them end with their step."""
        if self.coordinator is not None and self.ranks.world == 1:
            self._check()

    # -- policy and prompts -------------------------------------------------------------------------------------------

    def _publish(self, version: int) -> None:
        state = self.accelerator.get_state_dict(self.loss)  # a collective under FSDP: every rank calls it
        if self.coordinator is None:
            return
        dtype = getattr(torch, self.config.student.dtype)
        self._snapshot: PolicyVersion = publish_snapshot(
            self.folder,
            version,
            {name.removeprefix("model."): tensor.to(dtype) for name, tensor in state.items()},
            model_files_from=self.student.path,
        )
        self.coordinator.collector.publish(self._snapshot, check=self._check)
        # Requests in flight may still name a version that old, and the worker that takes them must find it.
        prune_snapshots(self.folder, keep=self.config.trainer.max_policy_lag + 2, current=version)

    def group_id(self, step: int, index: int) -> str:
        return f"train-{step:06d}-{index:04d}"

    def prompt_of(self, group_id: str) -> tuple[int, Prompt]:
        """A training group's place in its step, and its prompt."""
        _, step, index = group_id.split("-")
        position = int(step) * self.config.trainer.prompts_per_step + int(index)
        return int(index), self.prompts[self.order.index(position)]

    def _enqueue(self, step: int) -> None:
        """The prompts of this step and, with a lag allowed, of the next ones, which this policy may serve already."""
        if self.coordinator is None:
            return
        settings = self.config.trainer
        newest = step + settings.max_policy_lag
        for target in range(step if step == self._first_step else newest, min(newest + 1, settings.steps)):
            ids = [self.group_id(target, index) for index in range(settings.prompts_per_step)]
            requests = [
                training_request(self.prompt_of(group_id)[1], group_id=group_id, version=step, config=self.config)
                for group_id in ids
            ]
            self.coordinator.collector.enqueue(
                requests, oldest_version=max(0, target - settings.max_policy_lag), step=target, check=self._check
            )

    # -- groups -------------------------------------------------------------------------------------------------------

    def _collect(self, step: int, scorer: Scorer) -> tuple[list[ScoredGroup], dict[str, float]]:
        """This rank's groups of the step, each scored as soon as it arrived; in the order of the prompts."""
        started = time.monotonic()
        size = self.config.trainer.prompts_per_step
        if self.coordinator is not None:
            self._distribute([self.group_id(step, index) for index in range(size)], self.coordinator, scorer)
        else:
            for _ in range(size // self.ranks.world):
                data = self.ranks.receive()
                if data == _STOP:
                    raise Interrupted
                scorer.submit([rollout_group_from_bytes(data)] if data else [])
        generated = time.monotonic()
        kill_points.reached("collected", step)
        results = list(scorer.results(check=self._check_alone))
        kill_points.reached("scored", step)
        self._give_up([result for result in results if isinstance(result, Refused)])
        scored = sorted((r for r in results if isinstance(r, ScoredGroup)), key=lambda group: group.index)
        if not scored:
            raise VaopdError(
                f"step {step}: none of this rank's groups can be trained on; the dead letters say why "
                f"(job {self.config.run.name!r})"
            )
        timings = {"wait_s": generated - started, "score_s": time.monotonic() - generated}
        return scored, timings | {"scoring_s": scorer.busy.take()}

    def _distribute(self, group_ids: list[str], coordinator: Coordinator, scorer: Scorer) -> None:
        """Hands every group to its rank on arrival; a rank is sent an empty message for a group that will not come."""
        missing = set(group_ids)
        for groups in coordinator.collector.groups(group_ids, check=self._check):
            coordinator.metrics.progressed()
            mine = []
            for group in groups:
                missing.discard(group.group_id)
                rank = self._rank_of(group.group_id)
                if rank == COORDINATOR:
                    mine.append(group)
                else:
                    self.ranks.send(rollout_group_to_bytes(group), to=rank)
            scorer.submit(mine)
        for group_id in missing:
            if (rank := self._rank_of(group_id)) != COORDINATOR:
                self.ranks.send(b"", to=rank)

    def _rank_of(self, group_id: str) -> int:
        return int(group_id.rpartition("-")[2]) % self.ranks.world

    def _give_up(self, refused: list[Refused]) -> None:
        message = json.dumps([[item.group_id, item.reason] for item in refused]).encode()
        everyone = self.ranks.gather(message)
        if self.coordinator is not None:
            for group_id, reason in (pair for part in everyone for pair in json.loads(part)):
                self.coordinator.collector.dead_letter(group_id, reason)

    # -- the step -----------------------------------------------------------------------------------------------------

    def _train(self, step: int, scored: list[ScoredGroup], timings: dict[str, float]) -> None:
        started = time.monotonic()
        weighted = [weigh(group, self.config.objective, seed=self._mask_seed(step, group.index)) for group in scored]
        loss, kl = self._backward(weighted)
        kill_points.reached("backward", step)
        norm = self.accelerator.clip_grad_norm_(self.loss.parameters(), self.config.trainer.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise NumericalError(f"step {step}: the gradient's norm is {float(norm)}; nothing was changed")
        learning_rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.progress.step = step + 1
        kill_points.reached("stepped", step)
        timings["forward_backward_s"] = time.monotonic() - started
        parts = self.ranks.gather(json.dumps(step_numbers.of_rank(weighted, kl, loss)).encode())
        lines = self.ranks.gather(json.dumps([[g.group.group_id, g.group.policy_version] for g in scored]).encode())
        if self.coordinator is not None:
            trained = [
                checkpoint.LedgerLine(group_id=group_id, step=step, policy_version=version)
                for part in lines
                for group_id, version in json.loads(part)
            ]
            self.progress.ledger.extend(trained)
            timings |= {"grad_norm": float(norm), "learning_rate": learning_rate}
            self._record(step, [json.loads(part) for part in parts], timings, trained)
            if self._is_due(step) or step in (0, self.config.trainer.steps - 1):  # before and after
                self._write_samples(step, weighted, kl)

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
        """Gradients are exchanged once per step, in the last backward."""
        return nullcontext() if last else self.accelerator.no_sync(self.loss)

    def _mask_seed(self, step: int, index: int) -> int:
        return int(np.random.SeedSequence([self.config.run.seed, step, index]).generate_state(1)[0])

    # -- evaluation, records, checkpoints -----------------------------------------------------------------------------

    def _is_due(self, step: int) -> bool:
        every = self.config.evaluation.every
        return every > 0 and (step % every == 0 or step == self.config.trainer.steps)

    def _evaluate_if_due(self, step: int) -> None:
        if self.coordinator is None or not self._is_due(step):
            return
        result, group_ids = evaluate(
            self.coordinator.collector,
            self.coordinator.validation,
            version=step,
            config=self.config,
            check=self._check,
            decode=lambda ids: self.student.tokenizer.decode(ids, skip_special_tokens=True),
            tell=self.coordinator.evaluating,
        )
        self.coordinator.metrics.evaluated(result.accuracy, result.standard_error)
        self._evaluated[step] = group_ids
        if result.accuracy > self._best_accuracy:  # the first best wins
            self._best_accuracy = result.accuracy
            link_snapshot(self._snapshot, self.folder / "best")
        self.metrics_file.write(
            {
                "kind": "eval",
                "step": step,
                "accuracy": result.accuracy,
                "standard_error": result.standard_error,
                "prompts": result.prompts,
                "samples": result.samples,
            }
        )
        self.accelerator.log({"eval/accuracy": result.accuracy}, step=step)
        self.coordinator.progress_line.accuracy = result.accuracy
        self.coordinator.progress_line.say(f"held-out accuracy at step {step}: {result}")

    def _record(
        self, step: int, parts: list[dict], own: dict[str, float], trained: Sequence[checkpoint.LedgerLine]
    ) -> None:
        """`own`: what the coordinator alone measures, its times above all."""
        assert self.coordinator is not None
        values = step_numbers.of_step(parts) | own
        rollouts = values.pop("rollouts")
        values |= step_numbers.of_times(own, rollouts=rollouts)
        values |= {f"groups_{reason}": float(n) for reason, n in self.coordinator.collector.counts.items()}
        record = {key: value for key, value in values.items() if np.isfinite(value)}
        self.metrics_file.write({"kind": "train", "step": step, "time_s": time.time(), **record})
        self.accelerator.log({f"train/{key}": value for key, value in record.items()}, step=step)
        lags = [line.step - line.policy_version for line in trained]
        self.coordinator.metrics.stepped(step + 1, record, rollouts=rollouts, lags=lags)
        self.coordinator.progress_line.step(step + 1, values)
        ids = [line.group_id for line in trained]
        log.info("step %d: trained on %d groups", step, len(ids), extra=logs.fields(step=step, groups=ids))

    def _write_samples(self, step: int, weighted: list[WeightedGroup], kl: list[np.ndarray]) -> None:
        for group, kl_M in zip(weighted, kl, strict=True):
            _, prompt = self.prompt_of(group.scored.group.group_id)
            for record in step_numbers.samples_of(group, kl_M, prompt, self.student.tokenizer):
                self.samples_file.write({"step": step, **record})

    def _checkpoint(self) -> None:
        """Durable first, then acknowledged: what is acknowledged is in a checkpoint."""
        state = self.accelerator.get_state_dict(self.loss)
        if self.coordinator is None:
            return
        self.progress.schedule = self.schedule.state_dict()
        self.coordinator.collector.confirm()
        self.coordinator.ledger.sync()
        checkpoint.save(
            self.folder / "checkpoints",
            self.progress,
            student=without_tied_head(
                {name.removeprefix("model."): tensor for name, tensor in state.items()},
                tied=ties_head(self.student.path),
            ),
            optimizer=self.optimizer.optimizer,
            keep=self.config.trainer.keep_checkpoints,
        )
        self.coordinator.ledger.write("checkpoint", step=self.progress.step)
        kill_points.reached("unacknowledged", self.progress.step)
        # A run resumed here evaluates this step's policy again, out of the same groups; an older one never.
        evaluated = [self._evaluated.pop(version) for version in list(self._evaluated) if version < self.progress.step]
        trained = (line.group_id for line in self.progress.ledger[self._acknowledged :])
        self._acknowledged = len(self.progress.ledger)
        self.coordinator.collector.acknowledge([*trained, *(group_id for ids in evaluated for group_id in ids)])
        # The next step's groups are at most that old; older records go, so that a resume from the checkpoint before
        # this one samples its groups anew.
        self.coordinator.collector.forget(max(0, self.progress.step - self.config.trainer.max_policy_lag))
