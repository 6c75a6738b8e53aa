"""The judge with its worker process: a table of hand-made verdicts, its limits, and that its processes end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.waiting import wait_until
from vaopd.grading import Verdict, judge, pool, prepare, verdict

TABLE = Path(__file__).parents[1] / "data" / "judge_pairs.tsv"
KNOWN_MISSES: set[tuple[str, str]] = set()
"""Response and reference of rows that the judge gets wrong, each with its reason in a comment."""
# Each would keep a computer algebra system busy for minutes, or need gigabytes.
RUNAWAYS = (
    "9^{9^{9^{9}}}",
    "(10!)!",
    "2^{99999999999}",
    r"\binom{10^9}{5\cdot10^8}",
    "(a+b+c+d+e+f)^{50}",
    r"\prod_{n=1}^{10^8} n",
    r"\sqrt{" * 200 + "2" + "}" * 200,
)


@pytest.fixture(autouse=True)
def _fresh_cache() -> None:
    verdict._judge.cache_clear()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives a comparison a minute, so that a busy machine changes no verdict."""
    monkeypatch.setattr(pool, "LIMIT_S", 60.0)


def read_table() -> Iterator[tuple[str, str, str, str]]:
    for line in TABLE.read_text().splitlines():
        if line and not line.startswith("#"):
            kind, response, reference, expected = line.split("\t")
            yield kind, response.replace("⏎", "\n"), reference, expected


def children_of(pid: int) -> list[int]:
    stats = {int(path.name): path for path in Path("/proc").iterdir() if path.name.isdigit()}
    parents = {}
    for child, path in stats.items():
        try:
            parents[child] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
    return [child for child, parent in parents.items() if parent == pid]


def lives(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.usefixtures("patient")
def test_every_hand_made_verdict_of_the_table(record_property: pytest.RecordProperty) -> None:
    rows = list(read_table())
    assert len(rows) >= 300
    counts: Counter[tuple[str, str]] = Counter()
    misses = []
    with ThreadPoolExecutor(pool.AT_ONCE) as judges:
        found = list(judges.map(lambda row: judge(row[1], row[2]).value, rows))
    for (kind, response, reference, expected), got in zip(rows, found, strict=True):
        counts[expected, got] += 1
        if got != expected and (response, reference) not in KNOWN_MISSES:
            misses.append(f"{kind}: {response!r} for {reference!r} is {got}, should be {expected}")
    right = counts["right", "right"]
    record_property("precision", right / (right + counts["wrong", "right"]))
    record_property("recall", right / sum(n for (expected, _), n in counts.items() if expected == "right"))
    assert not misses, "\n".join(misses)


@pytest.mark.parametrize("runaway", RUNAWAYS)
def test_a_comparison_that_is_cut_off_is_not_judged(runaway: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "LIMIT_S", 0.5)  # none would end within minutes
    assert judge(rf"\boxed{{{runaway}}}", "12") is Verdict.NOT_JUDGED
    assert judge(r"\boxed{12}", runaway) is Verdict.NOT_JUDGED
    assert judge(rf"\boxed{{{runaway}}}", runaway) is Verdict.RIGHT  # as text


def test_threads_beside_runaways_get_their_verdicts() -> None:
    """As many runaways as slots but one; math-verify's own limit is a signal, which only the main thread may set."""
    pairs = [(runaway, "12") for runaway in RUNAWAYS[: pool.AT_ONCE - 1]] + [(r"2\sqrt{3}", r"\sqrt{12}")]
    seen: dict[str, Verdict] = {}

    def note(answer: str, reference: str) -> None:
        seen[answer] = judge(rf"\boxed{{{answer}}}", reference)

    prepare()
    threads = [threading.Thread(target=note, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen.pop(r"2\sqrt{3}") is Verdict.RIGHT
    assert set(seen.values()) == {Verdict.NOT_JUDGED}


def test_a_caller_that_finds_no_slot_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_slots", threading.BoundedSemaphore(1))
    monkeypatch.setattr(pool, "LIMIT_S", 0.01)
    with pool._slots:
        assert judge(r"\boxed{2\sqrt{3}}", r"\sqrt{12}") is Verdict.NOT_JUDGED


@pytest.mark.usefixtures("patient")
def test_a_worker_that_was_killed_is_started_again() -> None:
    prepare()
    before = pool._get_worker().pid
    os.kill(before, signal.SIGKILL)
    assert judge(r"\boxed{2\sqrt{3}}", r"\sqrt{12}") is Verdict.RIGHT
    assert pool._get_worker().pid != before


def test_close_leaves_no_process() -> None:
    prepare()
    worker = pool._get_worker().pid
    pool.close()
    assert not lives(worker)


KILLED = r"""
import os, sys, threading
from vaopd.grading import judge, pool
judge(r"\boxed{2\sqrt{3}}", r"\sqrt{12}")
threading.Thread(target=judge, args=(r"\boxed{9^{9^{9^{9}}}}", "12")).start()
print(pool._get_worker().pid, flush=True)
sys.stdin.read()
"""


def test_worker_and_comparison_end_with_a_caller_that_is_killed() -> None:
    caller = subprocess.Popen([sys.executable, "-c", KILLED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert caller.stdout is not None
        worker = int(caller.stdout.readline())
        busy: list[int] = []
        wait_until("a comparison runs", lambda: busy or busy.extend(children_of(worker)) or busy)
    finally:
        caller.kill()
        caller.communicate()
    wait_until("the worker and its comparison have ended", lambda: not any(map(lives, [worker, *busy])))


FORKED = r"""
import os
from vaopd.grading import judge, pool
pool.LIMIT_S = 60.0
judge(r"\boxed{2\sqrt{3}}", r"\sqrt{12}")
mine = pool._get_worker().pid
child = os.fork()
if child == 0:
    os._exit(0 if judge(r"\boxed{3\sqrt{3}}", r"\sqrt{27}") and pool._get_worker().pid != mine else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert judge(r"\boxed{4\sqrt{3}}", r"\sqrt{48}") and pool._get_worker().pid == mine
"""


def test_a_forked_process_has_a_worker_of_its_own() -> None:
    subprocess.run([sys.executable, "-c", FORKED], check=True)


EDITABLE = r"""
import sys
from pathlib import Path
from vaopd.grading import judge, pool
pool.LIMIT_S = 60.0
sys.path = [entry for entry in sys.path if not (Path(entry) / "vaopd").is_dir()]
assert judge(r"\boxed{2\sqrt{3}}", r"\sqrt{12}")
"""


def test_the_worker_finds_an_editable_install() -> None:
    """Such an install is found by a hook of the caller's, and stands in no entry of sys.path."""
    subprocess.run([sys.executable, "-c", EDITABLE], check=True)


def test_the_worker_imports_neither_torch_nor_numpy() -> None:
    code = "import sys; from vaopd.grading import worker; worker.load(); print({'torch', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"
