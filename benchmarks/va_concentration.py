"""Prints how VA is spread over the kinds of tokens: `python benchmarks/va_concentration.py RUN`.

Reads the rollouts that a run of the tiny pair kept (RUN/samples.jsonl), takes the top 10 % of all their response tokens
by VA and prints their share of all VA and their kinds. "Read" digits are in the first sentence, where the numbers are
read from the image; the others are copied from there, or results.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path

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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="a run's folder")
    records = [json.loads(line) for line in (parser.parse_args().run / "samples.jsonl").read_text().splitlines()]
    tokens = [
        (va, kind)
        for record in records
        for va, kind in zip(record["visual_advantage"], kinds_of(record["tokens"]), strict=True)
    ]
    tokens.sort(key=lambda item: item[0], reverse=True)
    top = tokens[: math.ceil(TOP * len(tokens))]
    total = sum(va for va, _ in tokens)
    print(f"{len(records)} rollouts, {len(tokens)} response tokens, mean VA {total / len(tokens):.3f} nats")
    print(f"the top 10 % of tokens carry {sum(va for va, _ in top) / total:.1%} of all VA")
    among_top = Counter(kind for _, kind in top)
    count = Counter(kind for _, kind in tokens)
    print(f"\n{'kind':24}  {'of all tokens':>13}  {'of the top 10 %':>15}  {'of all VA':>9}")
    for kind in KINDS:
        share = sum(va for va, other in tokens if other == kind) / total
        print(f"{kind:24}  {count[kind] / len(tokens):13.1%}  {among_top[kind] / len(top):15.1%}  {share:9.1%}")


if __name__ == "__main__":
    main()
