"""Prints how VA and the divergence are spread over the kinds of tokens: `python benchmarks/va_concentration.py RUN`.

Reads the rollouts that a run of the tiny pair kept (RUN/samples.jsonl). "Read" digits are in the first sentence, where
the numbers are read from the image; the others are copied from there, or results. The second table is of the first
step, which the untrained student sampled; a read digit is misread if the teacher, with the image, gives it less than
half of the probability. `vaopd report --figures` draws the shares by token rank.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

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
    print_anatomy([record for record in records if record["step"] == records[0]["step"]])


def print_anatomy(records: list[dict[str, Any]]) -> None:
    """Prints where the divergence lies, and whether the token groups of the paper find it."""
    names = ("visual_advantage", "kl", "teacher_logprobs")
    va, kl, teacher = (np.concatenate([record[name] for record in records]) for name in names)
    high = np.concatenate([high_group(np.array(record["visual_advantage"])) for record in records])
    read = np.array([kind == KINDS[0] for record in records for kind in kinds_of(record["tokens"])])
    misread = read & (teacher < math.log(0.5))
    print(
        f"\nstep {records[0]['step']}, {len(records)} rollouts: VA is below 0.001 on {(va < 1e-3).mean():.1%} of tokens"
    )
    print(f"{'kind':10}  of all tokens  mean VA  mean KL  of all KL  in the high group")
    for name, own in {"read right": read & ~misread, "misread": misread, "all others": ~read}.items():
        means, share = f"{va[own].mean():7.3f}  {kl[own].mean():7.2f}", kl[own].sum() / kl.sum()
        print(f"{name:10}  {own.mean():13.1%}  {means}  {share:9.1%}  {high[own].mean():17.1%}")


if __name__ == "__main__":
    main()
