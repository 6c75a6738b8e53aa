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
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="leave logs and files there")
    arguments = parser.parse_args()
    print(f"chaos: seed {arguments.seed}, {arguments.groups} groups", flush=True)
    with tempfile.TemporaryDirectory(prefix="vaopd-chaos-") as scratch:
        folder = arguments.keep or Path(scratch)
        result = Chaos(folder / "chaos", seed=arguments.seed, groups=arguments.groups, say=_say).run()
    _print(result)
    return 1 if result.problems else 0


def _say(text: str) -> None:
    print(f"chaos: {text}", flush=True)


def _print(result: Result) -> None:
    kills = sum(number for kind, number in result.faults.items() if kind.startswith(("kill", "cut power", "empty")))
    stops = sum(number for kind, number in result.faults.items() if kind.startswith("stop"))
    deaths = sum(result.faults[kind] for kind in ("kill redis", "cut power of redis", "empty redis"))
    training = result.books.counts(training=True)
    _say(f"{kills + result.outside['killer']} SIGKILLs ({deaths} of Redis), {stops} SIGSTOPs in {result.took_s:.0f} s")
    _say("faults: " + ", ".join(f"{number} × {kind}" for kind, number in sorted(result.faults.items())))
    _say("from outside: " + ", ".join(f"{number} × {what}" for what, number in sorted(result.outside.items())))
    _say("trainers ended: " + ", ".join(f"{number} × {how}" for how, number in sorted(result.exits.items())))
    _say(", ".join(f"{name} {number}" for name, number in training.items()))
    _say(f"left in Redis: {', '.join(f'{name} {number}' for name, number in result.left.items())}")
    _say(f"final weights {result.weights[:12]}…, expected {result.expected_weights[:12]}…")
    for problem in result.problems:
        _say(f"PROBLEM: {problem}")
    _say("0 lost, 0 trained twice" if not result.problems else f"seed {result.seed} FAILED")


if __name__ == "__main__":
    sys.exit(main())
