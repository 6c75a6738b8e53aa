"""Log lines for machines: one JSON object each, with ids as fields."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator

import pytest

from vaopd.client.channel import trace_metadata
from vaopd.errors import ConfigError
from vaopd.telemetry import logs


@pytest.fixture(autouse=True)
def _nothing_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_shared", {})


@pytest.fixture
def request_id() -> Iterator[str]:
    token = logs.request_id.set("the-request")
    yield "the-request"
    logs.request_id.reset(token)


def formatted(message: str, *arguments: object, **extra: object) -> dict[str, object]:
    record = logging.LogRecord("vaopd.test", logging.WARNING, __file__, 1, message, arguments, None)
    record.created = 1_795_526_642.113  # 2026-11-24 13:24:02.113 UTC
    record.__dict__.update(extra)
    line = logs.JsonFormatter().format(record)
    assert "\n" not in line
    return json.loads(line)


def test_a_line_says_when_how_bad_and_what() -> None:
    assert formatted("%d groups sampled", 4) == {
        "time": "2026-11-24T13:24:02.113Z",
        "level": "WARNING",
        "logger": "vaopd.test",
        "message": "4 groups sampled",
    }


def test_ids_are_fields_and_what_is_not_known_is_left_out() -> None:
    line = formatted("sampled", **logs.make_fields(groups=["a", "b"], step=0, job=None))
    assert line["groups"] == ["a", "b"]
    assert line["step"] == 0
    assert "job" not in line


def test_what_a_process_shares_is_in_every_line() -> None:
    logs.share(process="rollout", job="geometry", worker=None)
    line = formatted("ready")
    assert (line["process"], line["job"]) == ("rollout", "geometry")
    assert "worker" not in line


def test_the_request_that_is_answered_is_in_every_line_and_goes_on_with_calls(request_id: str) -> None:
    assert formatted("scored")["request"] == request_id
    assert trace_metadata() == (("x-request-id", request_id),)


def test_without_a_request_each_call_has_an_id_of_its_own() -> None:
    assert "request" not in formatted("scored")
    ((first, name),), ((second, other),) = trace_metadata(), trace_metadata()
    assert first == second == "x-request-id"
    assert name != other
    assert logs.REQUEST_ID.fullmatch(name)


def test_a_traceback_stays_in_its_line() -> None:
    try:
        raise ValueError("what went wrong")
    except ValueError:
        line = formatted("failed", exc_info=sys.exc_info())
    assert str(line["error"]).startswith("Traceback")
    assert str(line["error"]).endswith("ValueError: what went wrong")


def test_a_format_that_there_is_none_of_is_told() -> None:
    with pytest.raises(ConfigError, match=r"log format 'xml'; use text or json \(--log-format, VAOPD_LOG_FORMAT\)"):
        logs.set_up("xml")


@pytest.mark.parametrize("name", ["", "x" * 129, "two words", "line\nbreak", 'quote"'])
def test_what_is_no_request_id_is_not_taken_from_a_client(name: str) -> None:
    assert logs.REQUEST_ID.fullmatch(name) is None


HOSTILE = "\x1b]0;owned\x07\x9b31m\u202egnp.exe\x7f\n2026-11-26 10:00:00,000 INFO vaopd: all is well"


def test_what_a_line_quotes_neither_controls_a_terminal_nor_forges_a_line() -> None:
    record = logging.LogRecord("vaopd.test", logging.ERROR, __file__, 1, "refused: %s", (HOSTILE,), None)
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        record.exc_info = sys.exc_info()
    text = logs.TextFormatter(logs.TEXT).format(record)
    assert "\\x1b]0;owned\\x07\\x9b31m\\u202egnp.exe\\x7f\n  2026-11-26" in text
    assert all(character.isprintable() or character == "\n" for character in text)
    assert [line for line in text.splitlines() if not line.startswith("  ")] == [text.splitlines()[0]]
    line = logs.JsonFormatter().format(record)
    assert line.isprintable()
    assert json.loads(line)["message"] == f"refused: {HOSTILE}"
