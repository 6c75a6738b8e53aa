"""Prints how VA is spread over the kinds of tokens: `python benchmarks/va_concentration.py RUN`.

Reads the rollouts that a run of the tiny pair kept (RUN/samples.jsonl). "Read" digits are in the first sentence, where
the numbers are read from the image; the others are copied from there, or results. `vaopd report --figures` draws the
shares by token rank.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from vaopd.scoring.weights import high_group, va_share_of_top

TOP = 0.1
KINDS = ("digit, read", "digit, copied or result", "word or sign")


def kinds_of(tokens: list[str]) -> list[str]:
    """Returns one of KINDS for each token."""
    kinds, reading = [], True
    for token in tokens:
        kinds.append(KINDS[2] if not token.strip().isdigit() else KINDS[0] if reading else KINDS[1])
        reading = reading and not token.strip().endswith(".")
    return kinds


def main() -> None:
    records = [json.loads(line) for line in (Path(sys.argv[1]) / "samples.jsonl").read_text().splitlines()]
    va = np.concatenate([record["visual_advantage"] for record in records])
    kinds = np.array([kind for record in records for kind in kinds_of(record["tokens"])])
    print(f"{len(records)} rollouts, {len(va)} response tokens, mean VA {va.mean():.3f} nats")
    print(f"the top 10 % of tokens carry {va_share_of_top(va, fraction=TOP):.1%} of all VA")
    among_top = Counter(kinds[high_group(va, high_fraction=TOP)])
    print(f"\n{'kind':24}  {'of all tokens':>13}  {'of the top 10 %':>15}  {'of all VA':>9}")
    for kind in KINDS:
        own = kinds == kind
        share = va[own].sum() / va.sum()
        print(f"{kind:24}  {own.mean():13.1%}  {among_top[kind] / among_top.total():15.1%}  {share:9.1%}")


if __name__ == "__main__":
    main()
