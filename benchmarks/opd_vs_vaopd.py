"""Compares VA-OPD with Standard OPD (`make compare`): the same student and prompts, three seeds each.

Runs configs/tiny.toml once per variant and seed, one after the other, and draws both held-out accuracy curves with
bands (the range over the seeds). Finished runs are kept, so an interrupted comparison continues where it stopped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from vaopd.report import plot_accuracy, read_run

VARIANTS = ("va_opd", "standard")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path, default=Path("docs/images/opd-vs-vaopd.png"))
    options = parser.parse_args()
    runs = []
    for seed in range(options.seeds):
        for variant in VARIANTS:
            name = f"compare-{variant}-{seed}"
            folder = Path("runs") / name
            runs.append(folder)
            if (folder / "model").is_dir():
                continue
            settings = (f"run.name={name}", f"run.seed={seed}", f"objective.variant={variant}")
            addresses = ("teacher.address=127.0.0.1:0", "api.address=127.0.0.1:0")
            overrides = [argument for value in (*settings, *addresses) for argument in ("--set", value)]
            command = [sys.executable, "-m", "vaopd.cli", "up", "configs/tiny.toml", "--no-api", *overrides]
            if code := subprocess.call(command):
                return code
    for folder in runs:
        evaluations = read_run(folder).evaluations
        curve = "  ".join(f"{e.step}: {e.accuracy:.3f}" for e in evaluations)
        print(f"{folder.name:24} {curve}  (judge {evaluations[-1].judge})")
    plot_accuracy(runs, options.plot, band="range")
    print(f"plot: {options.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
