"""Groups runs for a comparison: by configuration without seed and name, labelled by what differs.

Settings that say how a run is computed, not what (`vaopd.run.settings.MACHINE`: addresses, workers, checkpoints), make
no group. A setting that was changed on the way, and another teacher, do.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vaopd.run.records import Run
from vaopd.run.settings import MACHINE, flatten, is_among

VARIANT_NAMES = {
    "va_opd": "VA-OPD",
    "standard": "Standard OPD",
    "rollout_weights": "rollout weights only",
    "token_groups": "token groups only",
    "masked": "masked",
}
_SEED = "run.seed"
_VARIANT = "objective.variant"
_REVISION_CHARACTERS = 8


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs of one configuration, which differ in their seed only. `label` names it, without the number of seeds."""

    variant: str
    label: str
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> dict[int, list[Run]]:
        """Seed -> its runs, in the order of the seeds."""
        return split_by_seed(self.runs)

    @property
    def legend(self) -> str:
        """The label, with the number of seeds if there are several, and the seeds that ran more than once."""
        seeds = self.seeds
        parts = [self.label]
        if len(self.runs) > 1:
            parts.append(f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}")
        return ", ".join(parts) + (f" ({self.describe_repeats()})" if self.describe_repeats() else "")

    def describe_repeats(self) -> str:
        """Returns which seeds ran more than once, e.g. "seed 0 twice"; "" if none did."""
        times = {2: "twice", 3: "three times"}
        repeats = {seed: len(runs) for seed, runs in self.seeds.items() if len(runs) > 1}
        return ", ".join(f"seed {seed} {times.get(count, f'{count} times')}" for seed, count in repeats.items())


def name_variant(variant: str) -> str:
    """Names a `Run.variant` for people.

    >>> name_variant("token_groups by view_divergence")
    'token groups only, by view divergence'
    """
    base, _, score = variant.partition(" by ")
    name = VARIANT_NAMES.get(base, base)
    return f"{name}, by {score.replace('_', ' ')}" if score else name


def split_by_seed(runs: Sequence[Run]) -> dict[int, list[Run]]:
    """Returns seed -> its runs, in the order of the seeds."""
    found: dict[int, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        found.setdefault(run.seed, []).append(run)
    return found


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Returns the groups, in the order of their first runs."""
    members: dict[str, list[Run]] = {}
    settings: dict[str, dict[str, Any]] = {}
    old = any(not run.history for run in runs)
    for run in runs:
        found = _list_settings(run)
        if old:  # one of an earlier vaopd doesn't name its teacher
            found.pop("teacher", None)
        key = json.dumps(found, sort_keys=True, default=str)
        members.setdefault(key, []).append(run)
        settings[key] = found
    names = list(dict.fromkeys(name for found in settings.values() for name in found))
    differing = [name for name in names if len({repr(found.get(name)) for found in settings.values()}) > 1]
    return [
        Group(variant=group[0].variant, label=_make_label(key, settings, differing), runs=tuple(group))
        for key, group in members.items()
    ]


def _list_settings(run: Run) -> dict[str, Any]:
    """Returns what makes the run's configuration: its settings, how they changed on the way, and its teacher."""
    found = {key: value for key, value in flatten(run.config).items() if key != _SEED and not is_among(key, MACHINE)}
    found.pop("objective.token_score", None)
    found[_VARIANT] = run.variant  # which names the score, unless it is VA
    history = list_history(run)
    return found | {name: value for name, value in history.items() if not is_among(name.partition(" ")[0], MACHINE)}


def list_history(run: Run) -> dict[str, str]:
    """Returns the settings that changed on the way, and the teachers, by name and step."""
    found = {f"{key} at step {step}": f"{_format(old)} → {_format(new)}" for step, key, old, new in run.list_changes()}
    for index, (step, revision) in enumerate(run.list_teachers()):
        found[f"teacher at step {step}" if index else "teacher"] = revision[:_REVISION_CHARACTERS]
    return found


def _make_label(key: str, settings: dict[str, dict[str, Any]], differing: Sequence[str]) -> str:
    """Returns the objective's name, and the settings in which the group differs from one of the same objective."""
    own = settings[key]
    variant = str(own[_VARIANT])
    same = [found for found in settings.values() if found[_VARIANT] == variant]
    parts = [
        f"{_shorten(name, differing)} {_format(own[name])}"
        for name in differing
        if name != _VARIANT and name in own and len({repr(found.get(name)) for found in same}) > 1
    ]
    return ", ".join([name_variant(variant), *parts])


def _shorten(name: str, among: Sequence[str]) -> str:
    """Returns a key without its section, unless another differing key ends alike."""
    last = name.rpartition(".")[2]
    return last if Counter(other.rpartition(".")[2] for other in among)[last] == 1 else name


def _format(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "not set" if value is None else str(value)


def keep_finished(runs: Sequence[Run]) -> list[Run]:
    """Leaves out unfinished runs of a configuration that has finished ones: they would cut its curve short."""

    def list_kept() -> Iterator[Run]:
        for group in group_runs(runs):
            done = [run for run in group.runs if run.finished]
            yield from done or group.runs

    kept = {id(run) for run in list_kept()}
    return [run for run in runs if id(run) in kept]
