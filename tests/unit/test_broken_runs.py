"""A run's folder may hold anything: reading it ends at once, in little memory, with one error that names the file."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path

import pytest

from tests.support.broken import DAMAGES, FILES
from tests.support.runs import make_run
from vaopd.errors import VaopdError
from vaopd.report import report_html
from vaopd.report.watch import describe_start, watch
from vaopd.run.ledger import audit
from vaopd.run.records import read_run


def show(folder: Path) -> None:
    """As `vaopd report` does."""
    report_html([read_run(folder)])


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_it_is_one_error_that_names_the_file(file: str, damage: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / file).unlink(missing_ok=True)
    DAMAGES[damage](run / file)
    with pytest.raises(VaopdError, match=file if damage != "wrong types" else r"run"):
        show(run)


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "wrong types"])
@pytest.mark.parametrize("file", ["ledger.jsonl", "checkpoints/step_000004/state.json"])
def test_an_audit_is_one_error_too(file: str, damage: str, tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").touch()
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).unlink(missing_ok=True)
    DAMAGES[damage](tmp_path / file)
    with pytest.raises(VaopdError, match=Path(file).name):
        audit(tmp_path)


@pytest.mark.parametrize("word", ["a" * 2**19, "a://b:" * 2**16, "@" * 2**19, "a:" * 2**18 + "@"])
def test_a_configuration_of_one_endless_word_is_read(word: str, tmp_path: Path) -> None:
    """The search for passwords took time by the square of a word's length: a quarter of an hour for a megabyte."""
    run = make_run(tmp_path / "run")
    with (run / "config.toml").open("a") as config:
        config.write(f'[queue]\nurl = "{word}"\n')
    assert read_run(run).config["queue"]["url"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_log_that_is_none_is_named_beside_the_others(damage: str, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    DAMAGES[damage](tmp_path / "logs" / "teacher.log")
    (tmp_path / "logs" / "trainer.log").write_text("loads the student\n")
    assert describe_start(tmp_path)[-1] == "  trainer    loads the student"


@pytest.mark.parametrize("file", FILES)
def test_a_gigabyte_is_refused_unread(file: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    DAMAGES["a sparse gigabyte"](run / file)
    show(make_run(tmp_path / "whole"))  # what is imported for it doesn't count
    tracemalloc.start()
    try:
        with pytest.raises(VaopdError, match=r"1024.0 MiB, more than the \d+ MiB that are read"):
            show(run)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


def test_a_long_line_is_refused_before_it_is_whole_in_memory(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "samples.jsonl").open("ab") as file:
        file.truncate(400 * 2**20)
    with pytest.raises(VaopdError, match=r"samples.jsonl:\d+ is longer than 32 MiB"):
        show(run)


def test_watch_ends_with_the_error(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    DAMAGES["a loop of links"](run / "metrics.jsonl")
    with pytest.raises(VaopdError, match=r"metrics\.jsonl"):
        watch(run, stream=io.StringIO())
