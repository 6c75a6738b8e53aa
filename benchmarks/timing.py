"""Measures time and memory: the device, the clock, sides that take turns, peaks in a new process.

With a GPU, everything runs there in bfloat16, else on the CPU in float32.
"""

from __future__ import annotations

import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vaopd.telemetry.progress_line import Progress

ROOT = Path(__file__).parents[1]
ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", "bfloat16") if ON_GPU else ("cpu", "float32")
_clock = time.perf_counter


def count_cpu_time() -> None:
    """Measures this process's CPU time in place of wall time, for one thread on a machine with other work."""
    global _clock
    _clock = time.process_time


def clock_name() -> str:
    return "CPU time" if _clock is time.process_time else "wall clock"


def interleaved(sides: Mapping[str, Callable[[], Any]], *, repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns every side's median seconds and last result; the sides take turns, so that all see the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    results: dict[str, Any] = {}
    progress = Progress(f"measuring {', '.join(sides)}", total=repeats * len(sides), unit="turns")
    for turn in range(repeats):
        for number, (name, run) in enumerate(sides.items(), 1):
            synchronise()
            start = _clock()
            results[name] = run()
            synchronise()
            seconds[name].append(_clock() - start)
            progress.report(turn * len(sides) + number)
    return {name: statistics.median(values) for name, values in seconds.items()}, results


def synchronise() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def peak_extra_bytes(run: Callable[[], Any]) -> int:
    """Measures how far memory rises while `run` runs: device memory on a GPU, else resident pages.

    Call it in a new process (`in_subprocess`): pages that the allocator kept from earlier work would hide some.
    """
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    reset_peak = Path("/proc/self/clear_refs")
    if reset_peak.exists():
        reset_peak.write_text("5")  # Linux: resets the high-water mark
        before = _proc_status_bytes("VmRSS")
        run()
        return _proc_status_bytes("VmHWM") - before
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit


def matmul_flops_per_s(size: int = 1024, repeats: int = 5) -> float:
    """Measures the rate of a large matrix product in the same precision, an upper bound for the rest."""
    left, right = torch.randn(2, size, size, device=DEVICE, dtype=getattr(torch, DTYPE))
    seconds, _ = interleaved({"matmul": lambda: left @ right}, repeats=2 * repeats)
    return 2 * size**3 / seconds["matmul"]


def free_bytes() -> float:
    """Returns the free memory; infinite if the system doesn't report it."""
    if ON_GPU:
        return torch.cuda.mem_get_info()[0]
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), math.inf)


def _proc_status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}")


def in_subprocess(script: str, arguments: Sequence[str]) -> Any:
    """Runs one of these scripts with `--child ARGUMENTS`; returns the JSON of its last line."""
    command = [sys.executable, script, "--threads", str(torch.get_num_threads()), "--child", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])
