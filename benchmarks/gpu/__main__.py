"""Runs phases on one GPU and prints a table with their targets: `python -m benchmarks.gpu [PHASE | PART …]`.

`1` and `2` are two parts of at most five minutes each on an H100; `make gpu-check` runs both. `--cpu` runs the same
code at toy size. Each figure is printed and saved as soon as it is known; a phase that fails doesn't stop the next one.
Needs neither a hub nor vLLM: models have the published shapes and random weights. Figures are saved in
benchmarks/results/gpu-CARD.json, in which phases that were not run now stay as they are.

`full`, which is `make gpu-full`, takes all cards, vLLM and the hub's models, up to an hour, and saves its figures in
gpu-full-CARD.json.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from pathlib import Path

from vaopd_trainer.__main__ import set_environment

# Phase -> seconds it may take; the order is that of a part. The first line of each module says what it measures.
PARTS = {
    "1": {"facts": 40, "teacher": 110, "exact": 20, "attention": 30, "profile": 20, "oom": 15, "vision": 20},
    "2": {"kl": 30, "train": 130, "publish": 40, "grpc": 60, "up": 100, "prepare": 15},
    "full": {"real": 900, "recipe": 2700},
}
BUDGETS_S = {phase: seconds for part in PARTS.values() for phase, seconds in part.items()}
PART_S = 270
"""Parts 1 and 2 begin no phase after this time, and shorten the last one."""
RESULTS = Path(__file__).parents[1] / "results"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "phases", nargs="*", metavar="PHASE", help=f"1, 2, full, or any of {' '.join(BUDGETS_S)}; default 1"
    )
    parser.add_argument("--cpu", action="store_true", help="run the same code at toy size on the CPU")
    parser.add_argument(
        "--results", type=Path, help="folder for the JSON file (default: benchmarks/results, none with --cpu)"
    )
    options = parser.parse_args(argv)
    asked = options.phases or ["1"]
    if unknown := [name for name in asked if name not in PARTS and name not in BUDGETS_S]:
        parser.error(f"no phase {unknown[0]!r}; there are 1, 2, full, {', '.join(BUDGETS_S)}")
    options.phases = [phase for name in asked for phase in PARTS.get(name, (name,))]
    options.full = options.phases[0] in PARTS["full"]
    if any((phase in PARTS["full"]) != options.full for phase in options.phases):
        parser.error("phases of `full` have a file of their own; run them alone")
    return options


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if every phase ran to its end, 1 if one failed; a missed target is no failure."""
    options = parse(argv)
    began = time.monotonic()
    if options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported
    else:
        set_environment(processes=1)  # as the trainer does
    if options.cpu or not options.full:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import timing
    import torch

    from benchmarks.gpu.measure import Check, Record
    from benchmarks.gpu.models import Models

    if not options.cpu and not timing.ON_GPU:
        print("torch finds no GPU here; --cpu runs the same code at toy size", file=sys.stderr)
        return 2
    if options.cpu:
        torch.set_num_threads(1)
    folders = [options.results] if options.results else [] if options.cpu else [RESULTS]
    if os.environ.get("OUT"):  # where a job runner collects a job's files
        folders.append(Path(os.environ["OUT"]))
    record, models = Record(folders, name="gpu-full" if options.full else "gpu"), Models()
    part_s = sum(PARTS["full"].values()) if options.full else PART_S
    failed = []
    for phase in options.phases:
        left_s = part_s - (time.monotonic() - began)
        check = Check(phase, record, models, seconds=min(BUDGETS_S[phase], left_s))
        if left_s < 5 and not options.cpu:
            check.tell("not begun", f"{part_s} s are over", ok=False)
            failed.append(phase)
            continue
        if not check.run(lambda phase=phase: importlib.import_module(f"benchmarks.gpu.{phase}")):
            failed.append(phase)
    record.print_table()
    print(f"\n{time.monotonic() - began:.0f} s" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
