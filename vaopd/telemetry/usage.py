"""Keeps libraries from reporting their use to their makers."""

from __future__ import annotations

import os

SWITCHES = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
}


def disable_usage_reports() -> None:
    """Sets the variables, for this process and its children, before a library reads them. The user's have priority."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
