"""Times and records what the phases measure, and bounds the time that a phase takes."""

from __future__ import annotations

import gc
import json
import re
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import floor
import tables
import timing
import torch

from benchmarks.gpu.models import Models

PEAK_FLOPS = floor.H100_FLOPS
GIB = 2**30


class OutOfTime(Exception):
    """A phase has used up its seconds."""


class Record:
    """All lines of this call, written into NAME-CARD.json of some folders after each of them."""

    def __init__(self, folders: Sequence[Path], *, name: str) -> None:
        card = torch.cuda.get_device_name() if timing.ON_GPU else "cpu"
        short = re.search(r"[A-Z]+\d{2,}[A-Z]*", card)  # NVIDIA H100 80GB HBM3 -> H100
        label = short[0] if short else re.sub(r"\W+", "-", card)
        self._name = name
        self._files = [folder / f"{name}-{label.lower()}.json" for folder in folders]
        self._machine = tables.machine()
        self._lines: list[dict[str, Any]] = []

    def add(self, line: dict[str, Any]) -> None:
        self._lines.append(line)
        mark = {True: "ok", False: "MISSED", None: ""}[line["ok"]]
        target = f"   target {line['target']}" if line["target"] else ""
        print(f"{line['phase']:9} {line['what']}: {line['shown']}{target}  {mark}".rstrip(), flush=True)
        for path in self._files:
            path.parent.mkdir(parents=True, exist_ok=True)
            phases = json.loads(path.read_text())["phases"] if path.exists() else {}
            for phase in {line["phase"] for line in self._lines}:
                lines = [{k: v for k, v in one.items() if k != "phase"} for one in self._lines if one["phase"] == phase]
                phases[phase] = {"machine": self._machine, "lines": lines}
            path.write_text(json.dumps({"name": self._name, "phases": phases}, indent=1) + "\n")

    def print_table(self) -> None:
        """Prints every line with its target in Markdown."""
        rows = []
        for line in self._lines:
            mark = {True: "yes", False: "**no**", None: ""}[line["ok"]]
            rows.append([str(cell).replace("|", "/") for cell in (line["phase"], line["what"], line["shown"])])
            rows[-1] += [line["target"].replace("|", "/"), mark]
        tables.table("One GPU", ("phase", "what", "measured", "target", "met"), rows)
        for path in self._files:
            print(f"\nnumbers: {path}")


class Check:
    """What a phase is given: where its lines go, the models, and the seconds that it has left."""

    def __init__(self, phase: str, record: Record, models: Models, *, seconds: float) -> None:
        self.phase = phase
        self.models = models
        self._record = record
        self._seconds = seconds
        self._start = time.monotonic()

    @property
    def left_s(self) -> float:
        return self._seconds - (time.monotonic() - self._start)

    def tell(self, what: str, shown: str, *, target: str = "", ok: bool | None = None, **numbers: float) -> None:
        """Prints and saves one line. ok: whether the target is met; None where there is none at this size."""
        line = {"phase": self.phase, "what": what, "shown": shown, "target": target, "numbers": numbers}
        self._record.add(line | {"ok": None if ok is None else bool(ok)})

    def has_time(self, what: str, estimate_s: float = 0.0) -> bool:
        """Returns whether `estimate_s` are left; says otherwise that `what` is skipped. Always true on a CPU."""
        if not timing.ON_GPU or self.left_s > estimate_s:
            return True
        self.tell(what, f"skipped: {self.left_s:.0f} s of {self._seconds:.0f} are left")
        return False

    def run(self, load: Callable[[], ModuleType]) -> bool:
        """Runs the phase's `run(check)`; returns False if it failed. A phase that hangs in Python is interrupted."""
        old = signal.signal(signal.SIGALRM, _raise_out_of_time)
        signal.alarm(int(self._seconds + 10) if timing.ON_GPU else 600)
        try:
            load().run(self)
            return True
        except Exception as error:  # the next phase is measured all the same
            traceback.print_exc()
            self.tell("failed", f"{type(error).__name__}: {str(error)[:200]}", ok=False)
            return False
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, old)
            free_memory()
            self.tell("seconds", f"{time.monotonic() - self._start:.1f}", seconds=time.monotonic() - self._start)


def _raise_out_of_time(number: int, frame: FrameType | None) -> None:
    raise OutOfTime("the phase's seconds are over")


def measure_s(run: Callable[[], Any], *, repeats: int = 3, warm: int = 1) -> float:
    """Returns the median seconds of `repeats` runs, the device's work included; once on a CPU."""
    for _ in range(warm):
        run()
    found = []
    for _ in range(repeats if timing.ON_GPU else 1):
        timing.synchronise()
        start = time.perf_counter()
        run()
        timing.synchronise()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


class Peak:
    """Set by `measure_peak`: GiB above the memory in use before, and in all."""

    extra_gib = 0.0
    total_gib = 0.0


@contextmanager
def measure_peak() -> Iterator[Peak]:
    """Measures the device's peak memory in the block; zero on a CPU."""
    peak = Peak()
    if not timing.ON_GPU:
        yield peak
        return
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        yield peak
    finally:
        peak.total_gib = torch.cuda.max_memory_allocated() / GIB
        peak.extra_gib = peak.total_gib - before / GIB


def free_memory() -> None:
    gc.collect()
    if timing.ON_GPU:
        torch.cuda.empty_cache()


def profile_s(run: Callable[[], Any]) -> tuple[float, dict[str, float], dict[str, int]]:
    """Profiles one run on a GPU: wall seconds, device seconds by kernel, counts of the host's calls."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        timing.synchronise()
        start = time.perf_counter()
        run()
        timing.synchronise()
        wall_s = time.perf_counter() - start
    kernels: dict[str, float] = {}
    calls: dict[str, int] = {}
    for event in profiler.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.key] = kernels.get(event.key, 0.0) + event.self_device_time_total / 1e6
        else:
            calls[event.key] = calls.get(event.key, 0) + event.count
    return wall_s, kernels, calls


def count_launches(calls: dict[str, int]) -> int:
    return sum(count for name, count in calls.items() if "launchkernel" in name.lower())


def count_waits(calls: dict[str, int]) -> int:
    """Counts how often the host waited for the device's results. The measurement itself waits for the whole device."""
    waits = ("streamsynchronize", "eventsynchronize")
    return sum(count for name, count in calls.items() if any(word in name.lower() for word in waits))
