"""`vaopd up` on a recipe, twenty steps with the hub's models, vLLM, all cards: the times of a step, drift, memory."""

from __future__ import annotations

import math
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timing

from benchmarks.gpu.measure import Check
from benchmarks.gpu.up import VAOPD, run_bounded
from vaopd.config import Config, load_config
from vaopd.launch.cards import list_cards
from vaopd.launch.checks import find_engine_problem
from vaopd.launch.estimate import estimate_step
from vaopd.launch.placement import place_run, suggest
from vaopd.report import read_run

CONFIG = timing.ROOT / "configs" / ("geometry3k-8b.toml" if timing.ON_GPU else "tiny.toml")
STEPS, WARM = (20, 3) if timing.ON_GPU else (3, 1)
"""Steps, and how many of the first are left out of the medians: compilation and cold caches."""
SHOWN = ("step_s", "publish_s", "wait_s", "score_s", "forward_backward_s", "generation_s", "scoring_s")
LARGEST_DRIFT_SHARE = 0.05


def run(check: Check) -> None:
    check.models.drop()
    with tempfile.TemporaryDirectory(prefix="vaopd-full-") as name:
        folder = Path(name)
        settings = list_settings(folder)
        gpus: list[str] = []
        teacher_cards, chosen = 1, settings
        if timing.ON_GPU:
            cards = list_cards()
            settings += (remedy := suggest(cards, CONFIG, settings))
            gpus = ["--gpus", "auto"]
            placed = place_run(cards, CONFIG, settings)
            teacher_cards = sum(value.count(",") + 1 for value in placed.gpus["teacher"])
            chosen = [*placed.overrides, *settings]
            check.tell("placement", placed.flags + (f", to fit: {' '.join(remedy)}" if remedy else ""))
        command = [*VAOPD, "up", str(CONFIG), "--no-api", *gpus]
        command += [part for setting in settings for part in ("--set", setting)]
        start = time.perf_counter()
        with watch_memory() as memory:
            code, output = run_bounded(command, seconds=check.left_s if timing.ON_GPU else 300.0)
        up_s = time.perf_counter() - start
        run_folder = folder / "full"
        if code != 0:
            for log in sorted((run_folder / "logs").glob("*.log")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-2500:]}", flush=True)
            check.tell(CONFIG.stem, f"exit {code} after {up_s:.0f} s: {output[-300:]}", target="exit 0", ok=False)
            return
        found = read_run(run_folder)
        tell_steps(check, load_config(CONFIG, chosen), found.train, up_s=up_s, teacher_cards=teacher_cards)
        for evaluation in found.evaluations:
            check.tell(
                f"held-out accuracy after {evaluation.step} steps", evaluation.label, accuracy=evaluation.accuracy
            )
        for card, gib in sorted(memory.items()):
            check.tell(f"most memory in use on card {card}", f"{gib:.1f} GiB", gib=gib)
        report_code, _ = run_bounded([*VAOPD, "report", str(run_folder)], seconds=120)
        written = report_code == 0 and (run_folder / "report.html").exists()
        check.tell("report", "written" if written else "missing", target="written", ok=written)


def list_settings(folder: Path) -> list[str]:
    """Returns what `--set` changes of the recipe; without a GPU also data and rollouts of toy size."""
    settings: dict[str, object] = {
        "run.name": "full",
        "run.folder": folder,
        "teacher.address": "127.0.0.1:0",
        "trainer.steps": STEPS,
        "trainer.trackers": "[]",
        "evaluation.every": STEPS,
        "evaluation.prompts": 32 if timing.ON_GPU else 2,
        "evaluation.samples": 2,
        "evaluation.temperature": 1.0,
        "evaluation.student_va_prompts": 0,
    }
    if not timing.ON_GPU:
        from vaopd.data import handwritten_geometry

        handwritten_geometry.write(folder / "data", seed=0, train=32, validation=4, test=4)
        settings |= {"data.source": folder / "data", "rollout.max_new_tokens": 16, "trainer.prompts_per_step": 2}
        settings |= {f"{role}.model": timing.ROOT / "models" / f"tiny-{role}" for role in ("student", "teacher")}
        if find_engine_problem(load_config(CONFIG)):
            settings["rollout.engine"] = "transformers"
    return [f"{key}={value}" for key, value in settings.items()]


def tell_steps(
    check: Check, config: Config, train: Sequence[Mapping[str, Any]], *, up_s: float, teacher_cards: int
) -> None:
    """Tells a step's parts beside what `vaopd up --dry-run` estimates, its numbers, and whether all are finite."""
    steady = train[WARM:]

    def median(key: str) -> float:
        return statistics.median(line.get(key, math.nan) for line in steady)

    finite = all(math.isfinite(value) for line in train for value in line.values() if isinstance(value, int | float))
    advantage = statistics.fmean(line["mean_va"] for line in train)
    check.tell(
        f"{config.run.name}: {CONFIG.stem}, {config.rollout.engine}",
        f"{len(train)} steps in {up_s:.0f} s, numbers {'finite' if finite else 'NOT FINITE'}, mean visual advantage "
        f"{advantage:.4f}",
        target=f"exit 0, {STEPS} steps, finite, mean > 0",
        ok=len(train) == STEPS and finite and advantage > 0,
        seconds=up_s,
        mean_visual_advantage=advantage,
    )
    parts = {key: median(key) for key in SHOWN}
    tokens_s = median("rollouts_per_s") * median("response_tokens_mean")
    shown = ", ".join(f"{key.removesuffix('_s').replace('_', ' ')} {value:.2f}" for key, value in parts.items())
    if timing.ON_GPU:
        length = round(median("response_tokens_mean"))
        counted = estimate_step(
            config,
            response=length,
            workers=config.rollout.workers,
            ranks=config.trainer.processes,
            teacher_cards=teacher_cards,
        )
        shown += f"; estimated for responses of {length} tokens on H100s: {counted.total_s:.1f}"
    check.tell("a step in seconds, median", f"{shown}; {tokens_s:.0f} response tokens/s", tokens_s=tokens_s, **parts)
    drift = {key: median(f"policy_drift_{key}") for key in ("mean", "max", "share")}
    check.tell(
        "log-probs of sampling against the trainer's",
        f"mean {drift['mean']:.1e}, at most {drift['max']:.2f} nats, {drift['share']:.2%} of the tokens over 0.1",
        target=f"≤ {LARGEST_DRIFT_SHARE:.0%}",
        ok=drift["share"] <= LARGEST_DRIFT_SHARE,
        **drift,
    )
    for key in ("loss", "kl_mean", "grad_norm", "truncated_fraction"):
        first, last = (statistics.fmean(line[key] for line in part) for part in (train[:WARM], train[-WARM:]))
        check.tell(f"{key}, first and last {WARM} steps", f"{first:.4f}, {last:.4f}", first=first, last=last)


@contextmanager
def watch_memory() -> Iterator[dict[int, float]]:
    """Collects the most GiB that were in use on each card, asked for every five seconds; nothing without a driver."""
    most: dict[int, float] = {}
    over = threading.Event()
    command = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]

    def watch() -> None:
        while not over.is_set():
            try:
                lines = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
            except (OSError, subprocess.SubprocessError):
                return
            for index, mib in (line.split(",") for line in lines.splitlines()):
                most[int(index)] = max(most.get(int(index), 0.0), int(mib) / 1024)
            over.wait(5)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        over.set()
        watcher.join()
