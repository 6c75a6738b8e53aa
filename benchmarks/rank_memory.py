"""Measures the resident memory of trainer ranks, and bytes and seconds of snapshots and checkpoints, on a CPU.

`python benchmarks/memory_table.py --measure-ranks`: random models of 36, 64 and 105 M parameters take a step on 1, 2
and 4 gloo ranks, in bfloat16, with checkpointed activations. Counted are anonymous pages above those of the process
before it loads the student. Beside them stands what vaopd/vlm/memory.py predicts for a card.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import groups
import tables
import torch
from groups import PATCH_PX, QUICK

from tests.support.rank_processes import run_ranks
from vaopd.config import Config, validate
from vaopd.files.durable import atomic_folder
from vaopd.run.checkpoints import RunState
from vaopd.run.tensor_files import write_tensors
from vaopd.vlm import memory
from vaopd_trainer import checkpoint
from vaopd_trainer.compose import hold_weights, load_student, make_accelerator
from vaopd_trainer.forwards import Accumulator
from vaopd_trainer.rank_messages import Ranks
from vaopd_trainer.student_loss import StudentLoss
from vaopd_trainer.student_weights import StudentWeights

VOCABULARY, TEACHER_WIDTH, CHUNK_TOKENS, LORA_RANK = 32_000, 64, 32, 16
MIDDLE = 24
LAYERS = (8, MIDDLE, 48)
MIB = 2**20
# Large blocks get pages of their own and give them back, so that pages are what is alive.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
CELLS: dict[int, list[tuple[str, bool, int]]] = {
    1: [("none", lora, layers) for lora in (False, True) for layers in LAYERS],
    2: [*(("full", lora, layers) for lora in (False, True) for layers in LAYERS), ("none", False, MIDDLE)],
    4: [("none", False, MIDDLE), ("full", False, MIDDLE), ("hybrid", False, MIDDLE), ("full", True, MIDDLE)],
}
"""Ranks -> sharding, adapters or full weights, layers."""


def measure() -> None:
    """Starts the ranks and prints the tables."""
    os.environ |= ALLOCATOR | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with tempfile.TemporaryDirectory(prefix="vaopd-rank-memory-") as name:
        for layers in LAYERS:
            groups.save_model(Path(name) / f"{layers}", vocabulary=VOCABULARY, layers=layers)
        for world in CELLS:
            codes, said = run_ranks("rank_memory", name, world=world, folder=Path(name))
            if any(codes):
                raise SystemExit(said)
        found = [json.loads(line) for line in (Path(name) / "found.jsonl").read_text().splitlines()]
    tables.table(
        "Memory of a trainer rank, MiB",
        ("student", "learns", "sharding", "ranks", "held", "counted", "peak of a step", "counted", "loading"),
        [[_size(f), f["learns"], f["kind"], str(f["world"]), _mib(f["held"]), _mib(f["held_counted"]), _mib(f["peak"]),
          _mib(f["peak_counted"]), _mib(f["loading"])] for f in found],
        "Held: weights, gradients and moments after a step. Loading: the peak before the first step. Largest rank.",
    )  # fmt: skip
    tables.table(
        "Snapshots and checkpoints",
        ("student", "learns", "sharding", "ranks", "snapshot (MiB)", "s", "peak of a rank (MiB)", "checkpoint (MiB)",
         "s"),
        [[_size(f), f["learns"], f["kind"], str(f["world"]), _mib(f["snapshot_bytes"]), f"{f['snapshot_s']:.2f}",
          _mib(f["snapshot_peak"]), _mib(f["checkpoint_bytes"]), f"{f['checkpoint_s']:.2f}"] for f in found],
        "In the student's precision (adapters: float32); fsynced. Peak: above what the rank holds.",
    )  # fmt: skip


def _size(found: dict[str, Any]) -> str:
    return f"{found['parameters'] / 1e6:.0f} M"


def _mib(number_of_bytes: float) -> str:
    return f"{number_of_bytes / MIB:.0f}"


# ------------------------------------------------------------------------------------------------------------ one rank


class Pages:
    """Anonymous resident memory of this process, and its peak in a block."""

    def __init__(self) -> None:
        gc.collect()  # the cell before
        self.before = read_anonymous_bytes()

    def read(self) -> int:
        gc.collect()
        return read_anonymous_bytes() - self.before

    @contextmanager
    def peak(self) -> Iterator[list[int]]:
        """Yields a list that holds the peak once the block has ended."""
        seen, ended = [0], threading.Event()

        def watch() -> None:
            while not ended.wait(0.002):
                seen[0] = max(seen[0], read_anonymous_bytes() - self.before)

        thread = threading.Thread(target=watch)
        thread.start()
        yield seen
        ended.set()
        thread.join()


def read_anonymous_bytes() -> int:
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def main(name: str) -> None:
    """One rank: all cells of its number of ranks."""
    torch.set_num_threads(1)
    folder, cells = Path(name), CELLS[int(os.environ["WORLD_SIZE"])]
    for number, (kind, lora, layers) in enumerate([cells[0], *cells]):
        found = run_cell(folder, kind, lora=lora, layers=layers)
        if number and os.environ["RANK"] == "0":  # the first one has loaded libraries, too
            with (folder / "found.jsonl").open("a") as file:
                file.write(json.dumps(found) + "\n")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_cell(folder: Path, kind: str, *, lora: bool, layers: int) -> dict[str, Any]:
    """Loads, takes a step, writes a snapshot and a checkpoint -> the largest of all ranks' figures."""
    model = folder / f"{layers}"
    config = make_config(model, kind, lora=lora)
    accelerator, ranks = make_accelerator(config), Ranks()
    head = torch.randn(VOCABULARY, TEACHER_WIDTH).bfloat16()
    pages = Pages()
    with pages.peak() as loading:
        student = load_student(config)
        loss = StudentLoss(student, teacher_head=head, trainer=config.trainer, checkpoint_activations=True)
        weights = hold_weights(config, loss, student, accelerator, ranks)
    hidden = torch.randn(sum(QUICK.lengths), TEACHER_WIDTH)
    group = groups.weigh(groups.group(student, QUICK, seed=ranks.rank), hidden, seed=ranks.rank)
    accumulator = Accumulator(accelerator=accelerator, weights=weights, settings=config.trainer)
    with pages.peak() as peak:
        for _ in range(2):  # the first one has no moments yet
            weights.optimizer.zero_grad()
            accumulator.backward([group])
            weights.clip(1.0)
            weights.optimizer.step()
    held = pages.read()
    weights.optimizer.zero_grad()
    begun = pages.read()
    with pages.peak() as snapshot, tempfile.TemporaryDirectory(dir=folder) as scratch:
        snapshot_s, snapshot_bytes = publish(weights, Path(scratch), adapters=lora)
        checkpoint_s, checkpoint_bytes = save(weights, Path(scratch))
    own = {"held": held, "peak": peak[0], "loading": loading[0], "snapshot_peak": max(0, snapshot[0] - begun)}
    of_ranks = ranks.gather(own)
    sizes = memory.find_model(str(model))
    shards = {"none": 1, "full": ranks.world, "hybrid": 2}[kind]
    adapters = sizes.count_adapter_parameters(LORA_RANK, vision_tower=True) if lora else 0
    learning = adapters or sizes.parameters
    counted = memory.count_trainer_fixed_bytes(
        sizes, 2 * head.numel(), ranks=ranks.world, shards=shards, chunk_tokens=CHUNK_TOKENS, adapters=adapters
    ) - head.nbytes  # fmt: skip
    height, width = groups.IMAGE_SIDES[QUICK.prompt]
    counted += memory.count_image_bytes(sizes, height * width * (PATCH_PX * groups.MERGE) ** 2)
    counted += group.tokens * memory.count_token_bytes(sizes)
    return {
        "parameters": sizes.parameters,
        "kind": kind,
        "world": ranks.world,
        "learns": f"adapters, {adapters / 1e6:.1f} M" if lora else "all",
        **{name: max(each[name] for each in of_ranks) for name in own},
        "held_counted": 16 * learning // shards + (2 * sizes.parameters // shards if lora else 0),
        "peak_counted": counted,
        "snapshot_s": snapshot_s,
        "snapshot_bytes": snapshot_bytes,
        "checkpoint_s": checkpoint_s,
        "checkpoint_bytes": checkpoint_bytes,
    }


def make_config(model: Path, kind: str, *, lora: bool) -> Config:
    values = {
        "run": {"name": "r"},
        "data": {"source": "unused"},
        "student": {"model": str(model)} | ({"lora": {"rank": LORA_RANK}} if lora else {}),
        "teacher": {"model": "unused"},
        "trainer": {
            "steps": 10,
            "chunk_tokens": CHUNK_TOKENS,
            "trackers": [],
            "sharding": {"kind": kind} | ({"ranks_per_copy": 2} if kind == "hybrid" else {}),
        },
    }
    return validate(Config, values, origin="benchmark")


def publish(weights: StudentWeights, folder: Path, *, adapters: bool) -> tuple[float, int]:
    """Writes a policy as the trainer does, on rank 0 -> seconds, bytes."""
    stream = weights.stream(torch.float32 if adapters else torch.bfloat16)
    began = time.perf_counter()
    if weights.ranks.is_coordinator:
        with atomic_folder(folder / "policy") as part:
            write_tensors(stream, part / "model.safetensors")
    else:
        for _ in stream:
            pass
    weights.ranks.barrier()
    return time.perf_counter() - began, _count_bytes(folder / "policy")


def save(weights: StudentWeights, folder: Path) -> tuple[float, int]:
    began = time.perf_counter()
    if weights.ranks.is_coordinator:
        checkpoint.save(folder / "checkpoints", RunState(step=1), weights, keep=1)
    else:
        weights.save(None)
    weights.ranks.barrier()
    return time.perf_counter() - began, _count_bytes(folder / "checkpoints")


def _count_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
