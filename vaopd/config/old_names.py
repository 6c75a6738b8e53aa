"""Accepts keys and flags of the release before, with one line that names the new ones. Goes with the next release."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vaopd.config.toml import Section, find_variants
from vaopd.errors import ConfigError

log = logging.getLogger(__name__)

Warn = Callable[[str], None]

RUN_KEYS = {"objective.sampled_estimator": "teacher.sampled_estimator"}
RUN_KEYS_WITHOUT_EFFECT = {"trainer.groups_per_forward": "forwards are packed by trainer.forward_tokens"}
SERVICE_KEYS = {
    name: f"teacher.{name}" for name in ("engine", "sharing", "images", "tls", "keys", "quotas", "stuck_after_s")
}
FLAGS = {
    "--keys": "api.keys.file",
    "--requests-per-minute": "api.quotas.requests_per_minute",
    "--tls-cert": "api.tls.cert",
    "--tls-key": "api.tls.key",
    "--stuck-after": "rollout.stuck_after_s",
}

FOR_EVERY_VARIANT = {
    "degradation": ("strength",),
    "objective": ("temperature", "high_fraction", "high_weight", "mask", "mask_fraction"),
    "rollout": ("engine_options",),
    "teacher": ("top_k", "sampled_estimator"),
}
"""Keys that every variant of a section used to take, with or without an effect."""


@functools.cache
def warn_once(line: str) -> None:
    """Logs a line, once in a process."""
    log.warning(line)


def ignore(line: str) -> None:
    """Says nothing: another process says it."""


def accept_run_keys(model: type[Section], values: dict[str, Any], *, origin: str, warn: Warn) -> None:
    """Moves a run's old keys to their new places and drops those that its variants don't use."""
    moved = _move(values, RUN_KEYS, origin=origin)
    notes: list[str] = []
    for key, reason in RUN_KEYS_WITHOUT_EFFECT.items():
        parent, name = _find_parent(values, key), key.rpartition(".")[2]
        if parent is not None and parent.pop(name, None) is not None:
            notes.append(f"{key} has no effect any more: {reason}")
    for name, keys in FOR_EVERY_VARIANT.items():
        section, variants = values.get(name), find_variants(model.model_fields[name])
        if variants is None or not isinstance(section, dict) or (member := variants.find_member(section)) is None:
            continue  # validation says what is wrong there
        unused = [key for key in keys if key in section and key not in member.model_fields]
        for key in unused:
            del section[key]
        if unused:
            names = [moved.pop(f"{name}.{key}", f"{name}.{key}") for key in unused]
            chosen = f'{name}.{variants.tag} = "{section.get(variants.tag, variants.default)}"'
            notes.append(f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} no effect with {chosen}")
    _warn(warn, origin, [*(f"{old} is now {new}" for new, old in moved.items()), *notes])


def accept_service_keys(values: dict[str, Any], *, origin: str, warn: Warn) -> None:
    """Moves the sections of a teacher's service file below [teacher]."""
    moved = _move(values, SERVICE_KEYS, origin=origin)
    engine = values.get("teacher", {}).get("engine", {})
    notes = []
    if isinstance(engine, dict) and engine.get("backend") == "vllm" and engine.get("processes") == 1:
        del engine["processes"]
        notes.append('engine.processes has no effect with backend = "vllm"')
    _warn(warn, origin, [*(f"{old} is now {new}" for new, old in moved.items()), *notes])


def accept_flags(values: dict[str, Any], given: Mapping[str, Any], *, warn: Warn) -> None:
    """Sets what an old flag gives, over what the service file says."""
    for flag, value in given.items():
        *sections, key = FLAGS[flag].split(".")
        target = values
        for name in sections:
            target = target.setdefault(name, {})
        target[key] = value
        warn(
            f"{flag} is now {key} in [{'.'.join(sections)}] of the service file (--service FILE); "
            "the next release refuses this"
        )


def _move(values: dict[str, Any], names: Mapping[str, str], *, origin: str) -> dict[str, str]:
    """Moves old keys to their new places; returns new -> old. Raises ConfigError where both are given."""
    moved = {}
    for old, new in names.items():
        source, name = _find_parent(values, old), old.rpartition(".")[2]
        if source is None or name not in source:
            continue
        target, key = _find_parent(values, new, make=True), new.rpartition(".")[2]
        if target is None:
            continue
        if key in target:
            raise ConfigError(f"{origin}:\n  {old}: is the old name of {new}, which is given too; leave {old} out")
        target[key] = source.pop(name)
        moved[new] = old
    return moved


def _find_parent(values: dict[str, Any], key: str, *, make: bool = False) -> dict[str, Any] | None:
    """Returns the table that holds "section.key"; None if a value stands in its place, or it is not there."""
    table: Any = values
    for name in key.split(".")[:-1]:
        table = table.setdefault(name, {}) if make else table.get(name)
        if not isinstance(table, dict):
            return None
    return table


def _warn(warn: Warn, origin: str, notes: Sequence[str]) -> None:
    if notes:
        warn(f"{origin}: {'; '.join(notes)}; the next release refuses this")
