"""The books of a run: what an audit reads out of ledger.jsonl and the newest checkpoint, and its complaints."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.disks import full_disk
from vaopd.cli import main
from vaopd.errors import InvalidInput, LeaseLost, LimitExceeded, NotFound
from vaopd.files.plain import UnfitFile
from vaopd.run.checkpoints import LedgerLine, RunState, write_run_state
from vaopd.run.ledger import Audit, Ledger, audit


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(tmp_path / "ledger.jsonl", owner="t1", fresh=True)
    yield ledger
    ledger.close()


def published(ledger: Ledger, group: str, *, step: int | None, policy: int = 0) -> None:
    ledger.write("published", group=group, step=step, policy=policy)


def delivered(ledger: Ledger, group: str, *, policy: int = 0) -> None:
    ledger.write("delivered", group=group, policy=policy, worker="w0", deliveries=1)


def checkpoint(run: Path, step: int, *trained: tuple[str, int]) -> None:
    """As the trainer leaves it; `trained`: groups, each with its step. Policy versions are 0."""
    folder = run / "checkpoints" / f"step_{step:06d}"
    folder.mkdir(parents=True)
    lines = [LedgerLine(group_id=group, step=of, policy_version=0) for group, of in trained]
    write_run_state(folder, RunState(step=step, ledger=lines), files={})


def outcomes(books: Audit) -> dict[str, str]:
    return {fate.group_id: fate.name_outcome(books.step) for fate in books.fates}


def test_books_that_balance(ledger: Ledger, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four groups for two steps: one never came, one was sampled twice; and one problem of evaluation."""
    for group, step in [("a", 0), ("b", 0), ("c", 1), ("d", 1), ("future", 2)]:
        published(ledger, group, step=step)
    published(ledger, "eval", step=None)
    for group in ("a", "c", "d", "eval"):
        delivered(ledger, group)
    ledger.write("dropped", group="c", policy=0, reason="duplicate")
    ledger.write("dead", group="b", reason="no such image")
    checkpoint(tmp_path, 1, ("a", 0))
    ledger.write("checkpoint", step=1)
    checkpoint(tmp_path, 2, ("a", 0), ("c", 1), ("d", 1))
    ledger.write("checkpoint", step=2)

    books = audit(tmp_path)
    assert books.problems == []
    assert outcomes(books) == {
        "a": "trained",
        "b": "dead-lettered",
        "c": "trained",
        "d": "trained",
        "eval": "evaluated",
        "future": "in flight",
    }
    assert {fate.group_id: fate.checkpoint for fate in books.fates if fate.trained} == {"a": 1, "c": 2, "d": 2}

    assert main(["ledger", str(tmp_path), "--groups"]) == 0
    shown = capsys.readouterr().out
    assert "trained = published − in flight − dead-lettered: 3 = 4 − 1, each once" in shown
    assert "dropped, duplicate" in shown
    assert "dead-lettered: no such image" in shown


@pytest.mark.parametrize(
    ("trained", "complaint"),
    [
        ([], "a was published for step 0 and neither trained nor dead-lettered: it is lost"),
        ([("a", 0), ("a", 0)], r"a was trained 2 times, in steps \[0, 0\]"),
        ([("a", 0), ("b", 0)], "b was trained in step 0 and never published"),
        ([("a", 1)], "a was published for step 0 and trained in step 1"),
    ],
)
def test_a_gap_or_a_duplicate_is_named_and_fails_the_command(
    ledger: Ledger,
    tmp_path: Path,
    trained: list[tuple[str, int]],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    published(ledger, "a", step=0)
    delivered(ledger, "a")
    checkpoint(tmp_path, 2, *trained)
    assert main(["ledger", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert "1 problem\n" in told.out
    assert re.search(complaint, told.err)


def test_what_was_trained_must_have_been_delivered_with_that_policy(ledger: Ledger, tmp_path: Path) -> None:
    for group in ("a", "b"):
        published(ledger, group, step=0)
    delivered(ledger, "b", policy=1)
    checkpoint(tmp_path, 1, ("a", 0), ("b", 0))
    assert audit(tmp_path).problems == [
        "a was trained in step 0 and never delivered",
        "b was delivered with policy version 1 and trained as 0",
    ]


def test_a_dead_letter_that_was_sent_again_may_be_trained_and_one_that_was_not_may_not(
    ledger: Ledger, tmp_path: Path
) -> None:
    for group in ("retried", "haunting"):
        published(ledger, group, step=0)
        delivered(ledger, group)
        ledger.write("dead", group=group, reason="five deaths")
    delivered(ledger, "retried")
    checkpoint(tmp_path, 1, ("retried", 0), ("haunting", 0))
    assert audit(tmp_path).problems == ["haunting was trained in step 0, though it was dead-lettered: five deaths"]


def test_an_evaluation_that_lost_a_problem_is_told(ledger: Ledger, tmp_path: Path) -> None:
    published(ledger, "eval", step=None, policy=0)
    assert audit(tmp_path).problems == []  # it may still come
    checkpoint(tmp_path, 1)
    assert len(audit(tmp_path).problems) == 1


def test_a_resumed_run_takes_the_checkpoints_beyond_it_back(ledger: Ledger, tmp_path: Path) -> None:
    """Trained once before the damage and once after: the newest checkpoint says which of the two counts."""
    published(ledger, "a", step=2)
    delivered(ledger, "a")
    for step in (2, 4):
        ledger.write("checkpoint", step=step)
    ledger.write("resumed", step=2)
    published(ledger, "a", step=2)
    delivered(ledger, "a")
    ledger.write("checkpoint", step=3)
    checkpoint(tmp_path, 3, ("a", 2))
    books = audit(tmp_path)
    assert books.problems == []
    assert [fate.checkpoint for fate in books.fates] == [3]


def test_a_line_that_a_crash_cut_short_is_neither_read_nor_written_on(ledger: Ledger, tmp_path: Path) -> None:
    published(ledger, "a", step=0)
    path = tmp_path / "ledger.jsonl"
    with path.open("a") as file:
        file.write('{"event":"deli')
    assert list(outcomes(audit(tmp_path))) == ["a"]

    again = Ledger(path, owner="t2", fresh=False)
    delivered(again, "a")
    again.close()
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["published", "delivered"]


@pytest.mark.parametrize(
    "line",
    [
        '{"event":"deli',
        '{"event":"published","group":"b","step":"x","policy":0}',
        '{"event":"published","group":1,"step":1,"policy":0}',
        '{"event":"dropped","group":"a","reason":1}',
        '{"event":"checkpoint","step":"x"}',
    ],
)
def test_a_damaged_line_is_named(line: str, ledger: Ledger, tmp_path: Path) -> None:
    published(ledger, "a", step=0)
    (tmp_path / "ledger.jsonl").write_text((tmp_path / "ledger.jsonl").read_text() + line + "\n")
    with pytest.raises(InvalidInput, match=r"ledger.jsonl:2 is not a (JSON object|ledger event)"):
        audit(tmp_path)


def test_a_pipe_in_its_place_is_named_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ledger.jsonl")
    with pytest.raises(UnfitFile, match="not a regular file"):
        Ledger(tmp_path / "ledger.jsonl", owner="t", fresh=False)


def test_a_folder_without_books_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="it is not a run folder, or is of a version without ledgers"):
        audit(tmp_path)


def test_a_new_run_of_an_old_name_begins_new_books(ledger: Ledger, tmp_path: Path) -> None:
    published(ledger, "a", step=0)
    Ledger(tmp_path / "ledger.jsonl", owner="t1", fresh=True).close()
    assert audit(tmp_path).fates == []


def test_a_trainer_that_was_taken_for_dead_learns_it_from_the_books(ledger: Ledger, tmp_path: Path) -> None:
    ledger.check_owner()
    successor = Ledger(tmp_path / "ledger.jsonl", owner="t2", fresh=False)
    successor.check_owner()
    with pytest.raises(LeaseLost, match="trainer 't1' was taken for dead, and 't2' has continued"):
        ledger.check_owner()
    successor.close()


def test_a_full_disk_holds_up_no_event_and_loses_none(
    ledger: Ledger, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Half a line fits, so the rest must follow it later."""
    published(ledger, "a", step=0)
    with full_disk((tmp_path / "ledger.jsonl").stat().st_size + 10):
        published(ledger, "b", step=0)
        published(ledger, "c", step=0)
        with pytest.raises(LimitExceeded, match="nothing was acknowledged: make room, and resume"):
            ledger.sync()
    assert list(outcomes(audit(tmp_path))) == ["a"]
    assert len(caplog.records) == 1  # told once
    ledger.sync()
    assert list(outcomes(audit(tmp_path))) == ["a", "b", "c"]


def test_a_run_whose_folder_was_removed_commits_nothing(ledger: Ledger, tmp_path: Path) -> None:
    """Its events would go to a file that nobody finds."""
    (tmp_path / "ledger.owner").unlink()
    with pytest.raises(NotFound, match=r"ledger.owner is gone: the run's folder was removed .* nothing was ack"):
        ledger.check_owner()
