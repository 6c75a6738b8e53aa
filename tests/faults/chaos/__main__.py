"""`python -m tests.faults.chaos`: one chaos run, or the tiny training under faults. Prints its seed and its figures."""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
from pathlib import Path

from tests.faults.chaos.driver import Chaos, Result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.chaos")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--groups", type=int, default=10_000)
    parser.add_argument("--training", action="store_true", help="the tiny training instead, one kill in each run")
    parser.add_argument("--runs", type=int, default=20, help="of --training")
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="leave logs and files there")
    arguments = parser.parse_args()
    what = f"{arguments.runs} runs of the tiny training" if arguments.training else f"{arguments.groups} groups"
    _say(f"seed {arguments.seed}, {what}")
    with tempfile.TemporaryDirectory(prefix="vaopd-chaos-") as scratch:
        folder = arguments.keep or Path(scratch)
        if arguments.training:
            from tests.faults.chaos import training

            problems = training.run(folder, seed=arguments.seed, runs=arguments.runs, say=_say)
            return _end(arguments.seed, problems)
        result = Chaos(folder / "chaos", seed=arguments.seed, groups=arguments.groups, say=_say).run()
    _print(result)
    return _end(arguments.seed, result.problems)


def _say(text: str) -> None:
    print(f"chaos: {text}", flush=True)


def _print(result: Result) -> None:
    kills = sum(number for kind, number in result.faults.items() if kind.startswith(("kill", "cut power", "empty")))
    stops = sum(number for kind, number in result.faults.items() if kind.startswith("stop"))
    deaths = sum(result.faults[kind] for kind in ("kill redis", "cut power of redis", "empty redis"))
    training = result.books.count_outcomes(training=True)
    _say(f"{kills + result.outside['killer']} SIGKILLs ({deaths} of Redis), {stops} SIGSTOPs in {result.took_s:.0f} s")
    _say("faults: " + ", ".join(f"{number} × {kind}" for kind, number in sorted(result.faults.items())))
    _say("from outside: " + ", ".join(f"{number} × {what}" for what, number in sorted(result.outside.items())))
    _say("trainers ended: " + ", ".join(f"{number} × {how}" for how, number in sorted(result.exits.items())))
    _say(", ".join(f"{name} {number}" for name, number in training.items()))
    _say(f"left in Redis: {', '.join(f'{name} {number}' for name, number in result.left.items())}")
    _say(f"final weights {result.weights[:12]}…, expected {result.expected_weights[:12]}…")


def _end(seed: int, problems: list[str]) -> int:
    for problem in problems:
        _say(f"PROBLEM: {problem}")
    _say(f"seed {seed} FAILED" if problems else "0 lost, 0 trained twice")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
