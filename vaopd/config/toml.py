"""Reads TOML into pydantic sections: overrides from the command line, wrong keys named with the remedy."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from vaopd.errors import ConfigError


class Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


S = TypeVar("S", bound=Section)


def read_toml(path: str | Path) -> dict[str, Any]:
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"configuration {str(path)!r} can't be read ({error.strerror}); see configs/") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def validate(model: type[S], values: dict[str, Any], *, origin: str) -> S:
    """`values` as a `model`. Raises ConfigError that lists every wrong key."""
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        lines = [_describe(model, item) for item in error.errors()]
        raise ConfigError(f"{origin}:\n  " + "\n  ".join(lines)) from None


def apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or len(parts) < 2:
        raise ConfigError(f"--set {override!r} is not of the form section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    for part in parts[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override!r}: {part!r} is a value, not a section")
    values[parts[-1]] = value


def _describe(model: type[pydantic.BaseModel], error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location) or "configuration"
    if error["type"] == "extra_forbidden":
        return f"{key}: no such key; known here: {', '.join(_known_keys(model, location[:-1]))}"
    if error["type"] == "missing":
        return f"{key}: is required"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" + ("" if error["type"] == "value_error" else f", got {error['input']!r}")


def _known_keys(model: Any, location: list[str]) -> list[str]:
    for part in location:
        model = model.model_fields[part].annotation
    return list(model.model_fields)
