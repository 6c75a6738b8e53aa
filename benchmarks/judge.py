"""Measures the judge: precision and recall on the hand-made table, time and memory on generated expressions.

    python -m benchmarks.judge [--expressions 2000] [--seed 0]

Half of the expressions are as models write them, half would keep a computer algebra system busy: towers, factorials,
binomials, powers of long sums, nested roots. Every other one stands in the reference instead of the response.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path

from vaopd.grading import judge, judge_version, pool, prepare

TABLE = Path(__file__).parents[1] / "tests" / "data" / "judge_pairs.tsv"
SAMPLE_EVERY_S = 0.1


def generate_plain(draw: random.Random) -> str:
    """Returns an expression as an answer to a geometry problem may be."""
    a, b, c = (draw.randint(2, 60) for _ in range(3))
    forms: tuple[Callable[[], str], ...] = (
        lambda: rf"\frac{{{a}}}{{{b}}}",
        lambda: rf"{a}\sqrt{{{b}}}",
        lambda: rf"\frac{{{a}\sqrt{{{b}}}}}{{{c}}}",
        lambda: f"{a}x^2+{b}x-{c}",
        lambda: rf"{a}\pi+{b}",
        lambda: f"({a},{b})",
        lambda: f"y={a}x+{b}",
        lambda: rf"\{{{a},{b},{c}\}}",
        lambda: rf"\sqrt{{{a}}}+\sqrt{{{b}}}",
        lambda: rf"\sin({a}x)",
    )
    return draw.choice(forms)()


def generate_costly(draw: random.Random) -> str:
    """Returns an expression that may take for ever, or all memory, to evaluate."""
    n, digits = draw.randint(3, 9), 10 ** draw.randint(2, 11)
    names = "abcdefgxyz"[:n]
    forms: tuple[Callable[[], str], ...] = (
        lambda: "^{".join([str(n)] * draw.randint(2, 6)) + "}" * 8,
        lambda: f"{n}^{{{digits}}}",
        lambda: f"{digits}!",
        lambda: f"{n}" + "!" * draw.randint(1, 5),
        lambda: rf"\binom{{{digits}}}{{{digits // 2}}}",
        lambda: f"({'+'.join(names)})^{{{draw.choice((5, 20, 60, 200, 1000))}}}",
        lambda: r"\sqrt{" * (depth := draw.randint(2, 200)) + str(n) + "}" * depth,
        lambda: rf"\sum_{{k=1}}^{{{digits}}} k^{n}",
        lambda: rf"\prod_{{k=1}}^{{{digits}}} k",
        lambda: rf"\int_0^1 x^{{x^{{x^{n}}}}} dx",
        lambda: "(" * digits.bit_length() * 9 + "1" + ")" * digits.bit_length() * 9,
        lambda: "+".join(rf"\sqrt{{{draw.randint(2, 99)}}}" for _ in range(2 * n)),
        lambda: rf"({'+'.join(names)})^{{{n}}}-({'-'.join(names)})^{{{n}}}",
        lambda: rf"\log({n}^{{{n}^{{{n}^{n}}}}})",
        lambda: f"x^{{{digits % 1009 + n}}}-x-{n}=0",
    )
    return draw.choice(forms)()[:900]


def watch_memory(worker: int, stop: Event, peak_mb: Synchronized[float]) -> None:
    """Samples the resident memory of worker and comparisons together; a process, so that it holds up no caller."""
    while not stop.wait(SAMPLE_EVERY_S):
        pages = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                if worker in (int(path.parent.name), int(path.read_text().rpartition(")")[2].split()[1])):
                    pages += int((path.parent / "statm").read_text().split()[1])
        peak_mb.value = max(peak_mb.value, pages * 4096 / 2**20)


def main() -> None:
    """Prints both measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--expressions", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    prepare()
    print(f"judge {judge_version()}", flush=True)

    counts: Counter[tuple[str, str]] = Counter()
    for line in TABLE.read_text().splitlines():
        if line and not line.startswith("#"):
            _, response, reference, expected = line.split("\t")
            counts[expected, judge(response.replace("⏎", "\n"), reference).value] += 1
    right = counts["right", "right"]
    precision = right / (right + counts["wrong", "right"])
    recall = right / sum(n for (expected, _), n in counts.items() if expected == "right")
    print(f"table: {counts.total()} pairs, precision {precision:.4f}, recall {recall:.4f}, {dict(counts)}")

    draw = random.Random(options.seed)
    processes = multiprocessing.get_context("spawn")
    stop, peak_mb = processes.Event(), processes.Value("d", 0.0)
    watcher = processes.Process(target=watch_memory, args=(pool._get_worker().pid, stop, peak_mb))
    watcher.start()
    for name, generate in (("plain", generate_plain), ("costly", generate_costly)):
        seconds, verdicts = [], Counter[str]()
        for index in range(options.expressions // 2):
            one, other = generate(draw), generate_plain(draw)
            if index % 2:
                one, other = other, one
            began = time.perf_counter()
            verdict = judge(rf"\boxed{{{one}}}", other)
            seconds.append(time.perf_counter() - began)
            verdicts[verdict.value] += 1
        cuts = statistics.quantiles(seconds, n=100, method="inclusive")
        times = f"p50 {cuts[49]:.3f} s, p99 {cuts[98]:.3f} s, worst {max(seconds):.3f} s"
        print(f"{name}: {len(seconds)} expressions, {times}; {dict(verdicts)}", flush=True)
    stop.set()
    watcher.join()
    print(f"memory of worker and comparison: at most {peak_mb.value:.0f} MB")


if __name__ == "__main__":
    main()
