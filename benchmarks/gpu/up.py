"""`vaopd up` on the tiny pair with six steps: teacher, worker and trainer on one GPU in bfloat16, then the report."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timing

from benchmarks.gpu.measure import Check

STEPS = 6
LIMIT_S = 120.0
CONFIG = timing.ROOT / "configs" / "tiny.toml"
VAOPD = (sys.executable, "-m", "vaopd.cli")


def run(check: Check) -> None:
    check.models.drop()
    with tempfile.TemporaryDirectory(prefix="vaopd-up-") as name:
        measure(check, Path(name))


def measure(check: Check, folder: Path) -> None:
    from vaopd.data import handwritten_geometry
    from vaopd.report import read_run

    data = folder / "data"
    handwritten_geometry.write(data, seed=0, train=64, validation=8, test=8)
    settings = {
        "run.name": "check",
        "run.folder": folder,
        "data.source": data,
        "student.model": timing.ROOT / "models" / "tiny-student",
        "student.dtype": timing.DTYPE,
        "teacher.model": timing.ROOT / "models" / "tiny-teacher",
        "teacher.dtype": timing.DTYPE,
        "teacher.device_map": "cuda:0" if timing.ON_GPU else "cpu",
        "teacher.address": "127.0.0.1:0",
        "rollout.engine": "transformers",  # vLLM need not be there
        "rollout.max_new_tokens": 32,
        "rollout.requests_per_batch": 4,
        "trainer.steps": STEPS,
        "trainer.prompts_per_step": 4,
        "trainer.trackers": "[]",
        "evaluation.every": 0,
    }
    command = [*VAOPD, "up", str(CONFIG), "--no-api"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    start = time.perf_counter()
    code, output = run_bounded(command, seconds=min(LIMIT_S, check.left_s) if timing.ON_GPU else LIMIT_S)
    up_s = time.perf_counter() - start
    run_folder = folder / "check"
    if code != 0:
        for log in sorted((run_folder / "logs").glob("*.log")):
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-2500:]}", flush=True)
        check.tell(
            f"vaopd up, {timing.DTYPE}", f"exit {code} after {up_s:.0f} s: {output[-300:]}", target="0", ok=False
        )
        return
    lines = read_run(run_folder).train
    numbers = [value for line in lines for value in line.values() if isinstance(value, int | float)]
    advantages = [line["mean_va"] for line in lines if "mean_va" in line]
    mean = sum(advantages) / max(1, len(advantages))
    report_code, _ = run_bounded([*VAOPD, "report", str(run_folder)], seconds=60)
    written = (run_folder / "report.html").exists()
    finite = all(map(math.isfinite, numbers))
    check.tell(
        f"vaopd up, {timing.DEVICE}, {timing.DTYPE}",
        f"{len(lines)} steps in {up_s:.0f} s, numbers {'finite' if finite else 'NOT FINITE'}, mean visual advantage "
        f"{mean:.4f}, report {'written' if written else 'missing'}",
        target=f"exit 0, {STEPS} steps, finite, mean > 0, report",
        ok=len(lines) == STEPS and finite and mean > 0 and report_code == 0 and written,
        seconds=up_s,
        mean_visual_advantage=mean,
    )


def run_bounded(command: list[str], *, seconds: float) -> tuple[int, str]:
    """Runs a command in a session of its own; after `seconds` it is asked to end, then killed with its children."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=timing.ROOT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            output, _ = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        return -1, output
