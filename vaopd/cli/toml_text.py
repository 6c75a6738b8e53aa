"""A resolved configuration as TOML, readable again by `load_config`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vaopd.config import Config


def config_as_toml(config: Config) -> str:
    """Every field, defaults included; what is None is left out, since TOML has no word for it."""
    sections = config.model_dump(mode="json")
    blocks = []
    for name, values in sections.items():
        lines = [f"{key} = {_value(value)}" for key, value in values.items() if value is not None]
        blocks.append("\n".join([f"[{name}]", *lines]))
    return "\n\n".join(blocks) + "\n"


def _value(value: Any) -> str:
    match value:
        case Mapping():
            inner = ", ".join(f"{json.dumps(str(key))} = {_value(item)}" for key, item in value.items())
            return f"{{ {inner} }}" if inner else "{}"
        case list() | tuple():
            return "[" + ", ".join(_value(item) for item in value) + "]"
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case bool():
            return "true" if value else "false"
        case _:
            return repr(value)
