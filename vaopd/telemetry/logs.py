"""Writes log lines for people or for machines: `text`, or `json` with one object per line.

    {"time": "2026-11-24T13:05:14.482Z", "level": "INFO", "process": "teacher", "logger": "vaopd_teacher.rpc.servicer",
     "message": "job 'geometry': 2 groups, …", "job": "geometry", "groups": ["train-000003-0001", "train-000003-0002"]}

Ids are fields in JSON and are left out of the text, so that a group can be followed through all processes without a
line per group in a terminal: `log.info("…", extra=fields(job=job, groups=ids))`. Every line has the request's id and,
where traces are on, those of trace and span.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import re
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from vaopd.errors import ConfigError
from vaopd.telemetry import tracing
from vaopd.telemetry.visible import escape_json, escape_lines

FORMATS = ("text", "json")
FORMAT_VARIABLE = "VAOPD_LOG_FORMAT"
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

REQUEST_ID_KEY = "x-request-id"
"""The gRPC metadata that carries the request's id."""
REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Id of the request that is being answered. The API's middleware sets it, the teacher's client sends it on."""

_shared: dict[str, Any] = {}


def make_fields(**values: Any) -> dict[str, dict[str, Any]]:
    """Returns the `extra` of a log call: `job`, `groups`, `step`, `policy_version`. Ids and numbers, never texts."""
    return {"fields": values}


def set_up(format: str, **shared: Any) -> None:
    """Sends this process's log lines to standard error as `text` or `json`. `shared`: see `share`.

    Raises ConfigError for another format.
    """
    if format not in FORMATS:
        raise ConfigError(f"log format {format!r}; use {' or '.join(FORMATS)} (--log-format, {FORMAT_VARIABLE})")
    share(**shared)
    handler = logging.StreamHandler()
    handler.setFormatter(TextFormatter(TEXT) if format == "text" else JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    if format == "text":
        return
    logging.captureWarnings(True)
    # vLLM's lines then come through here too, and progress bars don't break the JSON.
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
    os.environ.setdefault("TQDM_DISABLE", "1")


def share(**values: Any) -> None:
    """Adds fields to every line of this process from now on, such as its role and job; None is left out."""
    _shared.update({key: value for key, value in values.items() if value is not None})


class TextFormatter(logging.Formatter):
    """Formats each record for people; what it quotes can neither control a terminal nor forge a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the record as a line; further lines, of a traceback above all, are indented."""
        return escape_lines(super().format(record))


class JsonFormatter(logging.Formatter):
    """Formats each record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the record as a line of JSON."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            **_shared,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (name := request_id.get()) is not None:
            line["request"] = name
        line |= tracing.get_ids()
        given: Mapping[str, Any] = getattr(record, "fields", {})
        line |= {key: value for key, value in given.items() if value is not None}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return escape_json(json.dumps(line, ensure_ascii=False, default=str))
