"""Puts one trainer rank together and runs it. Called once the configuration is read.

data set ──► TrainingPrompts ─┐         ┌─ Vlm (the student)
                              ▼         ▼
       Teacher ─────────► GroupScorer  StudentLoss ◄── the teacher's head
                              │         │
                              │   StudentWeights ◄── Accelerator; of a checkpoint when resumed
                              └► Trainer ◄── Ranks
                                    │
            on rank 0 alone    folder ──► RUN's settings and teacher; StatusWriter
                               Coordinator ──► Collector ──► TrainerQueue (Redis), Ledger
                                    ├────────► LeaseKeeper ─► TrainerQueue
                                    └────────► ProgressLine, TrainerMetrics ◄── DepthGauge (Redis)
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import Tensor

from vaopd import client, grading, process
from vaopd.client import SyncTeacherClient
from vaopd.client.diagnosis import wait_for_teacher
from vaopd.config import Config, HttpWeights, NoSharding
from vaopd.data.problems import load_problems
from vaopd.errors import LeaseLost, Mismatch, Unavailable, VaopdError
from vaopd.files.durable import name_errors
from vaopd.payloads import to_torch
from vaopd.process.ranks import check_devices
from vaopd.queue import LeaseKeeper, TrainerQueue
from vaopd.queue.depth import DepthGauge
from vaopd.run.checkpoints import FILE, find_latest_checkpoint
from vaopd.run.ledger import Ledger
from vaopd.run.owner import TRAINER, own
from vaopd.run.settings import Changes
from vaopd.run.status import StatusWriter
from vaopd.run.teacher import TeacherRecord
from vaopd.types import TeacherDescription
from vaopd.vlm.adapters import add_adapters, load_adapters, name_base, read_adapters
from vaopd.vlm.model import Vlm, find_file_names
from vaopd.vlm.prompts import check_same_tokenizer
from vaopd.weights.serve import SnapshotServer
from vaopd_trainer.alike import check_alike
from vaopd_trainer.base_teacher import BaseTeacher
from vaopd_trainer.collector import Collector
from vaopd_trainer.coordinator import Coordinator
from vaopd_trainer.folder import begin, explain_replaced_teacher, find_done, prepare_folder
from vaopd_trainer.loop import Trainer
from vaopd_trainer.metrics import TrainerMetrics
from vaopd_trainer.prompt_order import TrainingPrompts
from vaopd_trainer.rank_messages import COORDINATOR, Ranks, Stopped, watch_connections
from vaopd_trainer.records import ProgressLine
from vaopd_trainer.scorer import GroupScorer, Teacher
from vaopd_trainer.sharded_weights import ShardedWeights, is_sharded, make_mesh, shard
from vaopd_trainer.student_loss import StudentLoss
from vaopd_trainer.student_weights import StudentWeights, WholeWeights, list_tensors

log = logging.getLogger(__name__)

EXIT_INTERRUPTED = 130
ROLE = "trainer"


def run(
    config: Config, *, resume: bool, accept_teacher: str | None, stop: threading.Event, metrics: TrainerMetrics
) -> int:
    """Runs this process's rank to the end of the job; returns the exit status. RUN/status.json follows it."""
    accelerator = make_accelerator(config)
    ranks = Ranks()
    set_seed(config.run.seed)
    with contextlib.ExitStack() as stack:
        status, changes = None, Changes()
        if ranks.is_coordinator:
            config.run_folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(own(config.run_folder, TRAINER))
            changes = prepare_folder(config, resume=resume, accept_teacher=accept_teacher is not None)
            status = stack.enter_context(StatusWriter(config.run_folder, role=ROLE))
            stack.enter_context(status.record_failure())
            status.write("starting")
        stack.enter_context(ranks.explain_loss())
        found = find_latest_checkpoint(config.run_folder / "checkpoints") if resume and ranks.is_coordinator else None
        # Rank 0's choice: another host may see the shared folder as it was a minute ago.
        name = ranks.gather(None if found is None else found.name)[COORDINATOR]
        start = None if name is None else config.run_folder / "checkpoints" / name
        with process.loading():
            student = load_student(config)
            if config.teacher.shared_base:
                student.model.to(accelerator.device)  # now, so that the teacher's head is the student's
        if not ranks.is_coordinator:
            ranks.barrier()  # rank 0 measures the prompts, the others find its measures
        problems = load_problems(config)
        if ranks.is_coordinator:
            ranks.barrier()
        prompts = TrainingPrompts(
            problems.training.prompts, per_step=config.trainer.prompts_per_step, seed=config.run.seed
        )
        try:
            teacher, description = connect_teacher(config, student, stack, stop)
        except Stopped:
            return _end_stopped(status, find_done(start))
        fetched = teacher.head() if config.teacher.needs_head else None
        head = None
        if fetched is not None:
            head = student.head.detach() if config.teacher.shared_base else to_torch(fetched).to(accelerator.device)
        record = TeacherRecord.of(description, payload=config.teacher.payload, head=fetched)
        check_alike(ranks, config, student=student.path, teacher=record, prompts=problems.training.prompts)
        coordinator = None
        if status is not None:
            grading.prepare()  # the judge's process, so that no evaluation waits for it
            queue = _take_job(config, stack, resume=resume)
            begin(config, record, start=start, changes=changes, accept=accept_teacher)
            keeper = stack.enter_context(LeaseKeeper(renew=lambda: _renew(queue, status), every_s=queue.lease_s / 3))
            ledger = Ledger(config.run_folder / FILE, owner=queue.owner, fresh=not resume)
            stack.callback(ledger.close)
            progress_line = ProgressLine(steps=config.trainer.steps)
            collector = Collector(queue=queue, ledger=ledger, say=progress_line.print_line)
            gauge = DepthGauge(url=config.queue.find_url(), job=config.run.name)
            stack.callback(gauge.close)
            metrics.watch(depth=gauge.read, counts=collector.counts)
            coordinator = Coordinator(
                config=config,
                ranks=ranks,
                student=student,
                prompts=prompts,
                validation=problems.held_out.prompts,
                left_out=len(problems.training.faults),
                not_asked=problems.held_out.count_faults(),
                collector=collector,
                ledger=ledger,
                keeper=keeper,
                status=status,
                progress_line=progress_line,
                metrics=metrics,
                server=_serve_snapshots(config, stack),
                track=lambda values, step: _try_trackers(lambda: accelerator.log(values, step=step)),
                stop=stop,
            )
        loss = make_loss(config, student, teacher_head=head, device=accelerator.device)
        trainer = Trainer(
            config=config,
            accelerator=accelerator,
            ranks=ranks,
            weights=hold_weights(config, loss, student, accelerator, ranks),
            coordinator=coordinator,
            stop=stop,
        )
        if start is not None:
            trainer.resume(start)
        trainer.state.teacher = record
        if coordinator is not None:
            coordinator.begin(trainer.state, resumed=start is not None)
        # One project for all runs, where it can hold several; TensorBoard's folder is the run's own.
        settings = {"name": config.run.name, "config": config.model_dump(mode="json")}
        remote = {name: settings for name in config.trainer.trackers if name != "tensorboard"}
        project = os.environ.get("WANDB_PROJECT", "vaopd") if remote else config.run.name
        with name_errors(config.run_folder / "trackers"):
            accelerator.init_trackers(project, init_kwargs=remote)
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
            return _end_stopped(status, trainer.state.step)
        except Mismatch as error:
            raise _explain(error, teacher, config, record, step=trainer.state.step) from error
        finally:
            _try_trackers(accelerator.end_training)
    return 0


def _try_trackers(call: Callable[[], None]) -> None:
    """A full disk costs the trackers' curves, not the run, nor the error that ends it."""
    try:
        call()
    except OSError as error:
        log.warning("the trackers take nothing (%s); metrics.jsonl has the same numbers", error)


def _end_stopped(status: StatusWriter | None, step: int) -> int:
    log.warning("stopped at step %d; continue with --resume", step)
    if status is not None:
        status.write("stopped", step=step)
    return EXIT_INTERRUPTED


def _explain(error: Mismatch, teacher: Teacher, config: Config, record: TeacherRecord, *, step: int) -> VaopdError:
    """Returns the error for a teacher that was replaced in mid-run, or `error` when it was not, or is away now."""
    try:
        found = TeacherRecord.of(teacher.describe(), payload=config.teacher.payload)
    except VaopdError:
        return error
    return explain_replaced_teacher(error, config=config, known=record, found=found, step=step)


def _serve_snapshots(config: Config, stack: contextlib.ExitStack) -> SnapshotServer | None:
    if config.weights.folder is not None:  # memory, maybe, which is let go with the run
        stack.callback(shutil.rmtree, config.snapshots_folder, ignore_errors=True)
    if not isinstance(config.weights, HttpWeights):
        return None
    server = SnapshotServer(config.weights.address)
    stack.callback(server.close)
    return server


def load_student(config: Config) -> Vlm:
    """Loads the student; one that will be sharded without its weights, which no rank then holds whole."""
    lora = config.student.lora
    student = Vlm.load(
        config.student.model,
        # What learns is float32 at any compute precision: steps of 1e-6 would vanish in bfloat16.
        dtype="float32" if lora is None else config.student.dtype,
        device="meta" if is_sharded(config.trainer) else None,
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
    )
    if lora is not None:
        add_adapters(student, lora, vision_tower=config.student.train_vision_tower, seed=config.run.seed)
        if lora.start is not None:
            load_adapters(student.model, read_adapters(lora.start, alpha=lora.alpha))
    elif not config.student.train_vision_tower:
        student.family.vision_tower(student.model).requires_grad_(False)
    return student


def hold_weights(
    config: Config, loss: StudentLoss, student: Vlm, accelerator: Accelerator, ranks: Ranks
) -> StudentWeights:
    """Shards the student, or gives it to accelerate whole, with an optimizer for the rank's part of it."""
    settings, sharding = config.trainer, config.trainer.sharding
    keywords: dict[str, Any] = {"model": student.model, "settings": settings, "ranks": ranks}
    if isinstance(sharding, NoSharding) or not is_sharded(settings):
        return WholeWeights(accelerator.prepare(loss), **keywords)
    mesh = make_mesh(sharding, world=ranks.world, device=accelerator.device.type)
    watch_connections()  # those of the mesh, too
    own = name_base(student.model.state_dict())
    file_names = find_file_names(list_tensors(student.path), student.model, own)
    shard(loss, student, mesh=mesh, compute=getattr(torch, config.student.dtype))
    weights = ShardedWeights(loss, **keywords)
    weights.load_model(student.path, file_names)
    return weights


def make_accelerator(config: Config) -> Accelerator:
    """Joins the process group of the ranks, if there are several, on GPUs where the host has them.

    Raises ConfigError for fewer GPUs than ranks.
    """
    check_devices(ROLE, config.trainer.processes, there=torch.cuda.device_count())
    # torch 2.13 renames `broadcast_buffers`; accelerate and older torches know this name alone.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    data_parallel = DistributedDataParallelKwargs(
        find_unused_parameters=True,  # a step of text-only prompts leaves the vision tower without a gradient
        gradient_as_bucket_view=True,  # no second copy of the gradients
        broadcast_buffers=False,  # they are constants, and a rank that begins a step again would broadcast them alone
    )
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if config.student.dtype == "bfloat16" else "no",
        kwargs_handlers=[data_parallel],
        log_with=list(config.trainer.trackers),
        project_dir=str(config.run_folder / "trackers"),
    )


def make_loss(config: Config, student: Vlm, *, teacher_head: Tensor | None, device: torch.device) -> StudentLoss:
    """Returns the loss of a student that accelerate will move to `device`: whether it checkpoints depends on that."""
    return StudentLoss(
        student, teacher_head=teacher_head, trainer=config.trainer, device=device, **config.teacher.make_loss_keywords()
    )


def connect_teacher(
    config: Config, student: Vlm, stack: contextlib.ExitStack, stop: threading.Event
) -> tuple[Teacher, TeacherDescription]:
    """Connects to a teacher that reads the student's tokens and offers payload and columns; else raises Mismatch.

    Waits for one that is starting, and raises Stopped on a signal meanwhile. With teacher.shared_base there is no
    other process to connect to.
    """
    if config.teacher.shared_base:
        base = BaseTeacher(student, config)
        return base, base.describe()

    def check() -> None:
        if stop.is_set():
            raise Stopped

    wait_for_teacher(config.teacher.address, job=config.run.name, check=check)
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
    another = "serve it with the transformers backend of this version, or change objective.token_score"
    if (payload := config.teacher.payload) not in description.payloads:
        whose = f", which objective.token_score needs: {another}" if config.objective.needs_both_views else ""
        raise Mismatch(
            f"teacher {description.model} offers the payloads {', '.join(description.payloads)}, not {payload}"
            + (whose or "; change teacher.payload")
        )
    for column in config.objective.columns:
        if column not in description.columns:
            raise Mismatch(
                f"teacher {description.model} can't compute {column}, which objective.token_score needs; on request it "
                f"computes {', '.join(description.columns) or 'none'}: {another}"
            )
    return teacher, description


def _take_job(config: Config, stack: contextlib.ExitStack, *, resume: bool) -> TrainerQueue:
    """Takes the job's lease; a new run also empties its queue."""
    queue = TrainerQueue(
        url=config.queue.find_url(),
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
    stack.callback(_give_back, queue)
    return queue


def _give_back(queue: TrainerQueue) -> None:
    try:
        queue.release()
    except (Unavailable, Mismatch, LeaseLost) as error:  # what ends the run is another matter
        log.warning("the job is not given back, and is free once its lease has run out: %s", error)


def _renew(queue: TrainerQueue, status: StatusWriter) -> None:
    # The collector refills a Redis that came back empty, even if the keeper notices first.
    try:
        with contextlib.suppress(Mismatch):
            queue.renew()
    except Unavailable:
        status.beat()  # the trainer lives, and waits
        raise
    status.beat()
