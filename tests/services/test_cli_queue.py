"""`vaopd queue`: dead letters as an operator meets them."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis

from tests.support.groups import a_request, answer, take_one
from tests.support.queue_jobs import Job
from tests.support.runs import MINIMAL
from vaopd.cli import main
from vaopd.config import load_config
from vaopd.launch.resume import write_launch
from vaopd.run.status import StatusWriter


@pytest.fixture
def two_letters(a_job: Job) -> Job:
    trainer, worker = a_job.trainer(), a_job.worker("w1")
    for name in ("g1", "g2"):
        trainer.enqueue(a_request(name, policy_version=7))
        worker.fail(take_one(worker), f"no image for {name}")
    return a_job


def run(job: Job, *arguments: str) -> int:
    return main(["queue", *arguments, "--job", job.name, "--url", job.url])


def test_each_letter_is_shown_with_its_reason(two_letters: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(two_letters, "dead") == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["id", "group", "policy", "stream", "deliveries", "reason"]
    assert [line.split()[1:] for line in lines] == [
        ["g1", "7", "requests", "1", "no", "image", "for", "g1"],
        ["g2", "7", "requests", "1", "no", "image", "for", "g2"],
    ]


def test_one_is_dropped_and_one_sent_again(two_letters: Job, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (letter.entry_id for letter in two_letters.dead_letters().list())
    assert run(two_letters, "drop", first) == 0
    assert run(two_letters, "retry", second) == 0
    assert run(two_letters, "retry", second) == 2
    assert f"has no dead letter '{second}'" in capsys.readouterr().err
    assert two_letters.dead_letters().list() == []
    assert answer(two_letters.worker("w2")).group_id == "g2"


@pytest.mark.parametrize("fields", [{"x": b"\xff"}, {"key": b"k", "letter": b"\xff"}, {"letter": b""}])
def test_what_is_no_letter_is_listed_and_can_only_be_dropped(
    fields: dict[str, bytes], a_job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    name = redis.Redis.from_url(a_job.url).xadd(f"vaopd:{{{a_job.name}}}:dead", fields).decode()
    assert run(a_job, "dead") == 0
    assert "not a dead letter: another program has written" in capsys.readouterr().out
    assert run(a_job, "retry", name) == 2
    assert f"`vaopd queue drop {name}` removes it" in capsys.readouterr().err
    assert run(a_job, "drop", name) == 0
    assert a_job.dead_letters().list() == []


def test_all_are_sent_again(two_letters: Job) -> None:
    assert run(two_letters, "retry", "--all") == 0
    worker = two_letters.worker("w2")
    assert [answer(worker).group_id, answer(worker).group_id] == ["g1", "g2"]


def test_a_runs_folder_names_job_and_redis(
    two_letters: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = {
        "run": f'name = "{two_letters.name}"',
        "queue": f'url = "{two_letters.url}"',
        "data": 'source = "x"',
        "student": 'model = "x"',
        "teacher": 'model = "x"',
        "trainer": "steps = 1",
    }
    text = "\n".join(f"[{name}]\n{values}" for name, values in sections.items())
    (tmp_path / "config.toml").write_text(text)
    assert main(["queue", "drop", "--all", "--run", str(tmp_path)]) == 0
    assert two_letters.dead_letters().list() == []
    assert main(["queue", "dead"]) == 2
    assert "use --job JOB or --run RUN" in capsys.readouterr().err


def test_the_redis_of_a_run_that_has_ended_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = tmp_path / "test", tmp_path / "test" / "config.toml"
    folder.mkdir()
    file.write_text(MINIMAL)
    here = [f"run.folder={tmp_path}", "queue.url=embedded"]
    write_launch(load_config(file, here), teacher=None, service=None, gpus={})
    with StatusWriter(folder, role="trainer") as status:
        status.conclude()
    assert main(["queue", "dead", "--run", str(folder)]) == 2
    assert "has a Redis of its own, which ended with the run: `vaopd ledger --groups`" in capsys.readouterr().err
