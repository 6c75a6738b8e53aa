"""Puts one trainer rank together and runs it. Called once the configuration is read.

data set ──► TrainingPrompts ─┐         ┌─ Vlm (the student; of a checkpoint when resumed)
                              ▼         ▼
SyncTeacherClient ──────► GroupScorer  StudentLoss ◄── the teacher's head
                              │         │
                              └► Trainer ◄── Accelerator, Ranks
                                    │
            on rank 0 alone    Coordinator ──► Collector ──► TrainerQueue (Redis), Ledger
                                    ├────────► LeaseKeeper ─► TrainerQueue
                                    └────────► ProgressLine, TrainerMetrics ◄── DepthGauge (Redis)
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import Tensor

from vaopd import client, grading, process
from vaopd.client import SyncTeacherClient
from vaopd.config import Config, to_toml
from vaopd.data.loaders import load_training_prompts
from vaopd.errors import ConfigError, Mismatch
from vaopd.evaluation import held_out_prompts
from vaopd.payloads import to_torch
from vaopd.queue import LeaseKeeper, TrainerQueue
from vaopd.queue.depth import DepthGauge
from vaopd.run.checkpoints import FILE, find_latest_checkpoint
from vaopd.run.ledger import Ledger
from vaopd.run.snapshots import load_state
from vaopd.types import TeacherDescription
from vaopd.vlm.model import Vlm
from vaopd.vlm.prompts import check_same_tokenizer
from vaopd_trainer import checkpoint
from vaopd_trainer.collector import Collector
from vaopd_trainer.coordinator import Coordinator
from vaopd_trainer.loop import Trainer
from vaopd_trainer.metrics import TrainerMetrics
from vaopd_trainer.prompt_order import TrainingPrompts
from vaopd_trainer.rank_messages import Ranks, Stopped
from vaopd_trainer.records import ProgressLine
from vaopd_trainer.scorer import GroupScorer
from vaopd_trainer.student_loss import StudentLoss

log = logging.getLogger(__name__)

EXIT_INTERRUPTED = 130


def run(config: Config, *, resume: bool, stop: threading.Event, metrics: TrainerMetrics) -> int:
    """Runs this process's rank to the end of the job; returns the exit status."""
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if config.student.dtype == "bfloat16" else "no",
        # A step of text-only prompts leaves the vision tower without a gradient.
        # The buffers are constants, and a rank that begins a step again must not broadcast them alone.
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                find_unused_parameters=True, gradient_as_bucket_view=True, broadcast_buffers=False
            )
        ],
        log_with=list(config.trainer.trackers),
        project_dir=str(config.run_folder / "trackers"),
    )
    ranks = Ranks()
    set_seed(config.run.seed)
    if ranks.is_coordinator:
        _prepare_folder(config, resume=resume)
    ranks.barrier()
    start = find_latest_checkpoint(config.run_folder / "checkpoints") if resume else None
    with process.loading():
        student = _load_student(config, start)
    prompts = TrainingPrompts(
        load_training_prompts(config),
        per_step=config.trainer.prompts_per_step,
        seed=config.run.seed,
    )

    with contextlib.ExitStack() as stack:
        teacher, description = connect_teacher(config, student, stack)
        needs_head = config.teacher.payload in ("hidden", "hidden_int8")
        head = to_torch(teacher.head()).to(accelerator.device) if needs_head else None
        coordinator = None
        if ranks.is_coordinator:
            grading.prepare()  # the judge's process, so that no evaluation waits for it
            queue = _take_job(config, stack, resume=resume)
            keeper = stack.enter_context(LeaseKeeper(renew=lambda: _renew(queue), every_s=queue.lease_s / 3))
            ledger = Ledger(config.run_folder / FILE, owner=queue.owner, fresh=not resume)
            stack.callback(ledger.close)
            collector = Collector(queue=queue, ledger=ledger)
            gauge = DepthGauge(url=config.queue.url, job=config.run.name)
            stack.callback(gauge.close)
            metrics.watch(depth=gauge.read, counts=collector.counts)
            coordinator = Coordinator(
                config=config,
                ranks=ranks,
                student=student,
                prompts=prompts,
                validation=held_out_prompts(config),
                collector=collector,
                ledger=ledger,
                keeper=keeper,
                progress_line=ProgressLine(steps=config.trainer.steps),
                metrics=metrics,
                track=lambda values, step: accelerator.log(values, step=step),
                stop=stop,
            )
        trainer = Trainer(
            config=config,
            accelerator=accelerator,
            ranks=ranks,
            loss=make_loss(config, student, teacher_head=head, device=accelerator.device),
            coordinator=coordinator,
        )
        if start is not None:
            trainer.resume(start)
        if coordinator is not None:
            coordinator.begin(trainer.state, resumed=start is not None)
        accelerator.init_trackers(config.run.name)
        scorer = GroupScorer(
            teacher=teacher,
            student=student,
            find_prompt=prompts.find_prompt,
            max_tokens=min(student.max_tokens, description.limits.max_tokens_per_rollout),
            columns=config.objective.columns,
        )
        stack.callback(scorer.close)
        try:
            trainer.run(scorer)
        except Stopped:
            log.warning("stopped at step %d; continue with --resume", trainer.state.step)
            return EXIT_INTERRUPTED
        finally:
            accelerator.end_training()
    return 0


def _prepare_folder(config: Config, *, resume: bool) -> None:
    """Makes RUN and writes its configuration; refuses the folder of another run unless that is resumed."""
    folder = config.run_folder
    if not resume and (folder / "metrics.jsonl").exists():
        raise ConfigError(f"run folder {folder} is in use; pass --resume to continue, or choose another run.name")
    folder.mkdir(parents=True, exist_ok=True)
    if not resume or not (folder / "config.toml").exists():  # a trainer may die before it has written anything
        (folder / "config.toml").write_text(to_toml(config))
    if not resume:
        shutil.rmtree(folder / "policy", ignore_errors=True)


def _load_student(config: Config, start: Path | None) -> Vlm:
    """Loads the student with the weights of checkpoint `start`, if given."""
    student = Vlm.load(
        config.student.model,
        dtype="float32",  # at any compute precision: steps of 1e-6 would vanish in bfloat16
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
    )
    if start is not None:
        load_state(student.model, checkpoint.load_student(start))
    if not config.student.train_vision_tower:
        student.family.vision_tower(student.model).requires_grad_(False)
    return student


def make_loss(config: Config, student: Vlm, *, teacher_head: Tensor | None, device: torch.device) -> StudentLoss:
    """Returns the loss of a student that accelerate will move to `device`: whether it checkpoints depends on that."""
    return StudentLoss(
        student,
        teacher_head=teacher_head,
        trainer=config.trainer,
        device=device,
        **config.teacher.make_loss_keywords(),
    )


def connect_teacher(
    config: Config, student: Vlm, stack: contextlib.ExitStack
) -> tuple[SyncTeacherClient, TeacherDescription]:
    """Connects to a teacher that reads the student's tokens and offers payload and columns; else raises Mismatch."""
    teacher = stack.enter_context(
        SyncTeacherClient(
            config.teacher.address,
            job=config.run.name,
            degradation=config.degradation.as_degradation(),
            tokenizer_fingerprint=student.fingerprint,
            **config.teacher.make_payload_keywords(),
            **client.from_environment(),
        )
    )
    description = teacher.describe()
    check_same_tokenizer(student=student.fingerprint, teacher=description.tokenizer_fingerprint)
    if config.teacher.payload not in description.payloads:
        raise Mismatch(
            f"teacher {description.model} offers the payloads {', '.join(description.payloads)}, "
            f"not {config.teacher.payload}; change teacher.payload"
        )
    for column in config.objective.columns:
        if column not in description.columns:
            raise Mismatch(
                f"teacher {description.model} can't compute {column}, which objective.token_score needs; on request it "
                f"computes {', '.join(description.columns) or 'none'}: serve it with another backend, or change "
                "objective.token_score"
            )
    return teacher, description


def _take_job(config: Config, stack: contextlib.ExitStack, *, resume: bool) -> TrainerQueue:
    """Takes the job's lease; a new run also empties its queue."""
    queue = TrainerQueue(
        url=config.queue.url,
        job=config.run.name,
        lease_s=config.queue.lease_s,
        max_deliveries=config.queue.max_deliveries,
    )
    stack.callback(queue.close)
    # A trainer that was killed holds the job until its lease runs out.
    queue.acquire(wait_s=config.queue.lease_s + 5)
    if not resume:
        # What an earlier run of this name left would keep this one's requests from being published.
        queue.purge()
        queue.acquire()
    stack.callback(queue.release)
    return queue


def _renew(queue: TrainerQueue) -> None:
    # The collector refills a Redis that came back empty, even if the keeper notices first.
    with contextlib.suppress(Mismatch):
        queue.renew()
