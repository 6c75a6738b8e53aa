"""Rank 0's own work in a run: the queue, the run's folder, evaluation, records and progress.

    loop.Trainer (every rank)
          │ publish, enqueue, evaluate_if_due, distribute, finish_evaluation, give_up, record, save_checkpoint, finish
          ▼
    Coordinator (rank 0) ──────────────────► Ranks: groups for the other ranks, and stop
          │
          ├─ Collector ──────────── Redis    requests and policies out, groups in; writes Ledger (RUN/ledger.jsonl)
          ├─ LeaseKeeper ────────── Redis    the job's lease; each renewal repeats the status
          ├─ heldout ────────────── the Collector, for the held-out prompts; student_va, for its own views of them
          ├─ snapshots, checkpoint ─ RUN     policy/, model/, best/, checkpoints/
          ├─ StatusWriter ───────── RUN      status.json
          ├─ JsonLines ──────────── RUN      metrics.jsonl, samples.jsonl, heldout.jsonl
          └─ ProgressLine, TrainerMetrics, trackers

In: the student's weights, tensor by tensor, and each step's numbers. Out: policy versions, requests, checkpoints,
records. Waits for rollout workers, and for a Redis that is full or away; a lost lease or a signal ends each wait
(`check`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from vaopd.config import Config
from vaopd.files.durable import atomic_folder
from vaopd.queue import LeaseKeeper
from vaopd.run.checkpoints import LedgerLine, RunState
from vaopd.run.ledger import Ledger
from vaopd.run.model_card import upload_hint, write_model_card
from vaopd.run.snapshots import keep_snapshot, prune_snapshots, publish_adapter, publish_snapshot, write_model
from vaopd.run.status import StatusWriter
from vaopd.run.tensor_files import TensorStream
from vaopd.telemetry import logs
from vaopd.types import GroupId, PolicyVersion, Prompt, RolloutGroup
from vaopd.vlm.adapters import describe_adapters, merge_adapters
from vaopd.vlm.model import Vlm
from vaopd.weights.serve import SnapshotServer
from vaopd_trainer import checkpoint, kill_points, step_numbers
from vaopd_trainer.collector import Collector
from vaopd_trainer.heldout import Evaluation
from vaopd_trainer.metrics import TrainerMetrics
from vaopd_trainer.prompt_order import TrainingPrompts, make_request
from vaopd_trainer.rank_messages import COORDINATOR, Ranks, Stopped
from vaopd_trainer.records import JsonLines, ProgressLine
from vaopd_trainer.student_loss import WeightedGroup
from vaopd_trainer.student_va import StudentVa
from vaopd_trainer.student_weights import StudentWeights

log = logging.getLogger(__name__)


ADAPTERS_OF = {"model": "adapter", "best": "best_adapter"}
"""Where the adapters lie that are merged into RUN/model and RUN/best."""


@dataclass(kw_only=True, eq=False)
class Coordinator:
    """Publishes, enqueues, distributes, evaluates, records and checkpoints, on rank 0 alone."""

    config: Config
    ranks: Ranks
    student: Vlm
    prompts: TrainingPrompts
    validation: Sequence[Prompt]
    collector: Collector
    ledger: Ledger
    keeper: LeaseKeeper
    status: StatusWriter
    progress_line: ProgressLine
    metrics: TrainerMetrics
    track: Callable[[dict[str, float], int], None]
    """Passes numbers of a step to the trackers."""
    stop: threading.Event
    """Set by a signal."""
    left_out: int = 0
    """Bad records of the training split."""
    not_asked: Mapping[str, int] | None = None
    """Held-out problems beside `validation`, by reason."""
    server: SnapshotServer | None = None
    """Where workers fetch policies; None: they read them where they are written."""

    def __post_init__(self) -> None:
        self._folder = self.config.run_folder
        self._metrics_file = JsonLines(self._folder / "metrics.jsonl")
        self._samples_file = JsonLines(self._folder / "samples.jsonl")
        self._held_out_file = JsonLines(self._folder / "heldout.jsonl")
        self._student_va = StudentVa(
            student=self.student, prompts=self.validation, config=self.config, file=self._held_out_file
        )
        self._snapshot: PolicyVersion
        self._first_step = 0
        self._acknowledged = 0  # how many groups of the state's ledger need no acknowledgement any more
        self._best_accuracy = -1.0
        self._evaluation: Evaluation | None = None  # of the newest policy, begun and not finished
        self._evaluated: dict[int, tuple[str, ...]] = {}  # version -> groups, until a checkpoint is beyond it

    def check(self) -> None:
        """Raises LeaseLost or, on a signal, Stopped, which the other ranks then raise too. Call it in every wait."""
        self.keeper.check()
        if self.stop.is_set():
            self.ranks.stop_others()
            raise Stopped

    # -- the beginning and the end ------------------------------------------------------------------------------------

    def begin(self, state: RunState, *, resumed: bool) -> None:
        """Begins at the state's step; drops the records of later steps, which a killed trainer may have left.

        Groups that a checkpoint (`resumed`) has trained are dropped when they are delivered again.
        """
        self._first_step = state.step
        self.status.write("running", step=state.step, lease_s=self.config.queue.lease_s)
        self._acknowledged = len(state.ledger)
        self.metrics.set_step(state.step)
        if resumed:
            self.collector.resume(state.step, (line.group_id for line in state.ledger))
        self._metrics_file.drop_from(state.step)
        self._samples_file.drop_from(state.step)
        self._held_out_file.drop_from(state.step)
        evaluated = [line["accuracy"] for line in self._metrics_file.read() if line["kind"] == "eval"]
        self._best_accuracy = max((accuracy for accuracy in evaluated if accuracy is not None), default=-1.0)

    def finish(self) -> None:
        """Leaves the last policy in RUN/model, and nothing in the queue."""
        self._keep("model")
        model = self.config.run_folder / "model"
        self.progress_line.print_line(f"the trained model is in {model}; {upload_hint(model)}")
        version = self._snapshot.version
        self.collector.finish(self._evaluated.pop(version, ()), version=version)
        self.status.write("finished")

    def _keep(self, name: str) -> None:
        """Keeps the current policy as RUN/`name`, with a model card; of LoRA merged, and the adapters beside it."""
        target, base = self._folder / name, self.student.path
        if self.config.student.lora is None:
            keep_snapshot(self._snapshot, target)
        else:
            keep_snapshot(self._snapshot, self._folder / ADAPTERS_OF[name])
            dtype = getattr(torch, self.config.student.dtype)
            merged = merge_adapters(base, Path(self._snapshot.path), dtype=dtype)
            with atomic_folder(target) as aside:
                write_model(aside, merged, model_files_from=base)
        write_model_card(self._folder, target, step=self._snapshot.version, base=base)

    # -- policy, prompts and groups -----------------------------------------------------------------------------------

    def publish(self, version: int, weights: TensorStream) -> None:
        """Writes the weights as policy `version`, and announces it to the workers."""
        folder, student = self.config.snapshots_folder, self.config.student
        if student.lora is None:
            self._snapshot = publish_snapshot(folder, version, weights, model_files_from=self.student.path)
        else:
            settings = describe_adapters(self.student.model, base=student.model)
            self._snapshot = publish_adapter(folder, version, weights, settings=settings)
        announced = self.server.offer(self._snapshot) if self.server is not None else self._snapshot
        self.collector.publish(announced, check=self.check)
        # Requests in flight may still name a version that old, and the worker that takes them must find it.
        prune_snapshots(folder, keep=self.config.trainer.max_policy_lag + 2, current=version)

    def enqueue(self, step: int) -> None:
        """Requests the groups of this step and, with a lag, of the next ones that this policy may serve."""
        settings = self.config.trainer
        newest = step + settings.max_policy_lag
        for target in range(step if step == self._first_step else newest, min(newest + 1, settings.steps)):
            requests = [
                make_request(self.prompts.find_prompt(group), group=group, version=step, config=self.config)
                for group in self.prompts.list_groups(target)
            ]
            self.collector.enqueue(
                requests, oldest_version=max(0, target - settings.max_policy_lag), step=target, check=self.check
            )

    def distribute(self, step: int, submit: Callable[[Sequence[RolloutGroup]], None]) -> None:
        """Hands each group of the step to a rank on arrival, the one with the fewest tokens; its own go to `submit`.

        Of groups that arrive together the longest goes first. None ends what a rank gets.
        """
        loads = [0] * self.ranks.world
        ids = [str(group) for group in self.prompts.list_groups(step)]
        for groups in self.collector.wait_for_groups(ids, check=self.check):
            self.metrics.note_progress()
            mine = []
            for group in sorted(groups, key=_count_tokens, reverse=True):
                rank = loads.index(min(loads))
                loads[rank] += _count_tokens(group)
                if rank == COORDINATOR:
                    mine.append(group)
                else:
                    self.ranks.send_group(group, to=rank)
            submit(mine)
        for rank in range(1, self.ranks.world):
            self.ranks.send_group(None, to=rank)

    def give_up(self, refused: Iterable[tuple[str, str]]) -> None:
        """Sends groups that can't be trained on to the dead letters; each is an id and the reason."""
        for group_id, reason in refused:
            self.collector.dead_letter(group_id, reason)

    # -- evaluation and records ---------------------------------------------------------------------------------------

    def evaluate_if_due(self, version: int) -> None:
        """Requests the answers to the held-out prompts from the policy just published; waits for none.

        The step's groups were requested before: they are sampled first, and trained on while the problems are answered.
        """
        if self._is_due(version):
            self._evaluation = Evaluation(
                self.collector,
                self.validation,
                version=version,
                config=self.config,
                check=self.check,
                keep=self._student_va.problems,
            )

    def finish_evaluation(self) -> None:
        """Waits for the evaluation that was begun, if there is one, and keeps the best policy in RUN/best."""
        if self._evaluation is None:
            return
        evaluation, version = self._evaluation, self._evaluation.version
        result = evaluation.finish(
            decode=lambda ids: self.student.tokenizer.decode(ids, skip_special_tokens=True),
            check=self.check,
            not_asked=self.not_asked,
            on_progress=self._show_evaluating,
        )
        self._evaluation = None
        self._evaluated[version] = evaluation.group_ids
        own = self._student_va.measure(evaluation.kept, version=version, check=self.check)
        self.metrics.note_evaluation(result, student_va=own.get("student_va"))
        self._metrics_file.write({"kind": "eval", "step": version, **asdict(result), **own})
        if result.accuracy is not None:  # None: no question could be asked
            if result.accuracy > self._best_accuracy:  # the first best wins
                self._best_accuracy = result.accuracy
                self._keep("best")
            self.track({f"eval/{key}": value for key, value in {"accuracy": result.accuracy, **own}.items()}, version)
        self.progress_line.accuracy = result.accuracy
        self.progress_line.print_line(f"held-out accuracy at step {version}: {result}")

    def record(
        self,
        step: int,
        sums: Sequence[dict[str, float] | None],
        own: dict[str, float],
        *,
        trained: Sequence[LedgerLine],
        weighted: Sequence[WeightedGroup],
        kl: Sequence[np.ndarray],
    ) -> None:
        """Writes the step's numbers; in its first and last step, and where an evaluation is due, rollouts too.

        sums: of each rank's groups. own: what this rank alone measures, its times above all. weighted, kl: this rank's
        groups and the KL (M,) of each, in nats: the rollouts written are theirs.
        """
        values = step_numbers.average_ranks(sums) | own
        rollouts = values.pop("rollouts")
        values |= step_numbers.derive_rates(own, rollouts=rollouts)
        values |= {f"groups_{reason}": float(n) for reason, n in self.collector.counts.items()}
        values |= {"records_left_out": float(self.left_out)} if self.left_out else {}
        record = {key: value for key, value in values.items() if np.isfinite(value)}
        self._metrics_file.write({"kind": "train", "step": step, "time_s": time.time(), **record})
        self.track({f"train/{key}": value for key, value in record.items()}, step)
        if (share := record.get("policy_drift_share", 0.0)) > step_numbers.LARGEST_DRIFT_SHARE:
            log.warning(
                "step %d: %.0f %% of the sampled tokens have another log-prob here than at their worker, by more than "
                "%.1f nats (mean %.3f): it samples from other weights, or reads images by another processor",
                step,
                100 * share,
                step_numbers.DRIFT_NATS,
                record["policy_drift_mean"],
            )
        lags = [line.step - line.policy_version for line in trained]
        self.status.note_step(step + 1)
        self.metrics.note_step(step + 1, record, rollouts=rollouts, lags=lags)
        self.progress_line.show_step(step + 1, values)
        ids = [line.group_id for line in trained]
        fate = "skipped" if "skipped" in own else "trained on"
        log.info("step %d: %s %d groups", step, fate, len(ids), extra=logs.make_fields(step=step, groups=ids))
        if self._is_due(step) or step in (0, self.config.trainer.steps - 1):
            for group, kl_M in zip(weighted, kl, strict=True):
                if not np.isfinite(kl_M).all():  # of a skipped step
                    continue
                prompt = self.prompts.find_prompt(GroupId.parse(group.scored.group.group_id))
                for sample in step_numbers.describe_rollouts(group, kl_M, prompt, self.student.tokenizer):
                    self._samples_file.write({"step": step, **sample})

    def _is_due(self, step: int) -> bool:
        every = self.config.evaluation.every
        return every > 0 and (step % every == 0 or step == self.config.trainer.steps)

    def _show_evaluating(self, done: int, total: int) -> None:
        self.metrics.note_progress()
        self.progress_line.show_evaluation(done, total)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save_checkpoint(self, state: RunState, weights: StudentWeights) -> None:
        """Durable first, then acknowledged: what is acknowledged is in a checkpoint."""
        self.collector.confirm()
        self.ledger.sync()
        checkpoint.save(self._folder / "checkpoints", state, weights, keep=self.config.trainer.keep_checkpoints)
        self.ledger.write("checkpoint", step=state.step)
        kill_points.pass_point("unacknowledged", state.step)
        # A run resumed here evaluates this step's policy again, out of the same groups; an older one never.
        evaluated = [self._evaluated.pop(version) for version in list(self._evaluated) if version < state.step]
        trained = (line.group_id for line in state.ledger[self._acknowledged :])
        self._acknowledged = len(state.ledger)
        self.collector.acknowledge([*trained, *(group_id for ids in evaluated for group_id in ids)])
        # The next step's groups are at most that old. Older records go, so that a resume from the checkpoint before
        # this one has its groups sampled again.
        self.collector.forget(max(0, state.step - self.config.trainer.max_policy_lag))


def _count_tokens(group: RolloutGroup) -> int:
    """Counts what a forward of the group computes, the prompt once."""
    return len(group.prompt_token_ids) + sum(len(rollout.response_ids) - 1 for rollout in group.rollouts)
