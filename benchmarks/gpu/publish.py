"""From a step's weights to a worker that has loaded them: cast, write, digest, verify, read, copy to the device."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import timing
import torch
from safetensors.torch import load_file

from benchmarks.gpu.measure import Check
from vaopd.run.snapshots import list_weights, publish_snapshot, verify_snapshot

SHARED_MEMORY = Path("/dev/shm")


def run(check: Check) -> None:
    student = check.models.student()
    folders = [Path(tempfile.gettempdir())]
    folders += [SHARED_MEMORY] if SHARED_MEMORY.is_dir() else []
    for folder in folders:
        if check.has_time(f"in {folder}", 15):
            with tempfile.TemporaryDirectory(prefix="vaopd-publish-", dir=folder) as name:
                measure(check, student.model, Path(name), folder)


def measure(check: Check, model: torch.nn.Module, folder: Path, place: Path) -> None:
    source = folder / "model"
    source.mkdir()
    model.config.save_pretrained(source)
    parts: dict[str, float] = {}
    last = time.perf_counter()

    def note(part: str) -> None:
        nonlocal last
        timing.synchronise()
        parts[part], last = time.perf_counter() - last, time.perf_counter()

    timing.synchronise()
    last = time.perf_counter()
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    note("cast")
    policy = publish_snapshot(folder, 0, state, model_files_from=source)
    note("publish")
    verify_snapshot(policy)
    note("verify")
    read = [tensor for file in list_weights(Path(policy.path)) for tensor in load_file(file).values()]
    for tensor in read:
        tensor.to(timing.DEVICE)
    note("read and copy")
    whole = sum(parts.values())
    size_gb = sum(tensor.nbytes for tensor in read) / 1e9
    check.tell(
        f"{size_gb:.2f} GB by {place}",
        f"{whole:.2f} s: " + ", ".join(f"{part} {seconds:.2f}" for part, seconds in parts.items()),
        target="≤ 1 s" if timing.ON_GPU else "",
        ok=whole <= 1.0 if timing.ON_GPU else None,
        seconds=whole,
        gb=size_gb,
        **{part.replace(" ", "_") + "_s": seconds for part, seconds in parts.items()},
    )
