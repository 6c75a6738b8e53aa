"""Loads the problems of a run: training and held-out, checked, measured and disjoint.

    split ──► texts, answers, markers ──► pictures, lengths (measures.py) ──► CheckedSplit ──► overlap ──► accept
              control tokens              limit of tokens                     faults by record              bad_records

`--dry-run`, `vaopd up`, `vaopd data check`, `vaopd eval` and the trainer read a data set here.
"""

from __future__ import annotations

import dataclasses
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vaopd.data.loaders import Prompts, open_split
from vaopd.data.measures import Measured, Meter, Report, measure
from vaopd.data.records import Fault
from vaopd.errors import InvalidInput, NotFound
from vaopd.files.hub import is_hub_id, read_control_tokens

if TYPE_CHECKING:
    from vaopd.config import Config
    from vaopd.config.run import DataConfig

HELD_OUT_SEED = 42  # the paper's

log = logging.getLogger(__name__)

MakeReport = Callable[[str], Report]
"""Makes the progress report of a split, e.g. "data/mine (train)"."""


def be_quiet(task: str) -> Report:
    """Reports nothing."""
    return lambda done, total: None


@dataclass(frozen=True, kw_only=True)
class CheckedSplit:
    """A split's records, with their measures and faults.

    prompts: those without a fault. faults: by record, one each. total: records that were checked.
    """

    prompts: Prompts
    total: int
    faults: tuple[Fault, ...] = ()
    measured: Mapping[int, Measured] = field(default_factory=dict)

    def count_faults(self) -> dict[str, int]:
        """Counts the bad records by kind, the most frequent first."""
        return dict(Counter(fault.kind for fault in self.faults).most_common())

    def list_first(self, kind: str) -> str:
        """Lists the first bad records of a kind, e.g. "records 3, 17"."""
        bad = [str(fault.index) for fault in self.faults if fault.kind == kind]
        return f"record{'s' if len(bad) > 1 else ''} {', '.join(bad[:10])}{' …' if len(bad) > 10 else ''}"

    def list_duplicates(self) -> list[tuple[int, int]]:
        """Returns the records whose problem stands earlier in the split, each with the first such record."""
        first: dict[str, int] = {}
        found = []
        for index in sorted(self.measured):
            earlier = first.setdefault(self.measured[index].content, index)
            if earlier != index:
                found.append((index, earlier))
        return found

    def without_problems_of(self, other: CheckedSplit) -> CheckedSplit:
        """Adds a fault for each record whose problem, by question and pixels, is one of the other split's."""
        theirs = {other.measured[index].content: index for index in reversed(other.prompts.indices)}
        new = [
            Fault(
                index=index,
                kind="overlap",
                field=self.prompts.name_text_field(index),
                message=f"the same question and pictures as {other.prompts.describe_place(theirs[content])}, which is "
                "held out; a problem can't be in both",
            )
            for index in self.prompts.indices
            if (content := self.measured[index].content) in theirs
        ]
        return self._with_faults(new)

    def accept(self, data: DataConfig) -> CheckedSplit:
        """Returns itself where the configuration allows its faults, with a warning that counts and names them.

        Raises InvalidInput with bad_records = "error", above max_bad_fraction, and where no record is left.
        """
        if not self.faults:
            return self
        kinds = "; ".join(f"{count} {kind}: {self.list_first(kind)}" for kind, count in self.count_faults().items())
        message = (
            f"{len(self.faults)} of {self.total} records can't be used ({kinds}); the first: "
            f"{self.prompts.describe_fault(self.faults[0])}"
        )
        if data.bad_records == "error":
            raise InvalidInput(
                f"{message}. Correct them (`vaopd data check CONFIG` lists all), or leave them out: "
                "--set data.bad_records=skip"
            )
        if len(self.faults) > data.max_bad_fraction * self.total:
            raise InvalidInput(
                f"{message}. That is {len(self.faults) / self.total:.1%}, above data.max_bad_fraction = "
                f"{data.max_bad_fraction:.1%}; correct them, or raise the bound"
            )
        log.warning("left out: %s", message)
        return self

    def _with_faults(self, new: list[Fault]) -> CheckedSplit:
        if not new:
            return self
        faults = sorted([*self.faults, *new], key=lambda fault: fault.index)
        return dataclasses.replace(self, prompts=self.prompts.without(new), faults=tuple(faults))


@dataclass(frozen=True, kw_only=True)
class Problems:
    """What a run trains on and what it evaluates on; no problem is in both."""

    training: CheckedSplit
    held_out: CheckedSplit


def load_problems(config: Config, *, make_report: MakeReport = be_quiet, download: bool = True) -> Problems:
    """Loads and checks both splits of a run; with evaluation.every = 0, none is held out.

    download: fetch the student's processor if it isn't on this host.

    Raises InvalidInput or NotFound, naming key and source: for what can't be read, for bad records that
    `data.bad_records` doesn't allow, and where no training problem is left.
    """
    data = config.data
    own, other = _list_places(config)
    with _naming(own):
        training = check_training(config, make_report=make_report, download=download)
    if config.evaluation.every == 0:
        with _naming(own):
            none = CheckedSplit(prompts=training.prompts.pick([]), total=0)
            return Problems(training=_require_some(training.accept(data)), held_out=none)
    with _naming(other):
        held_out = check_held_out(config, make_report=make_report, download=download)
    with _naming(own):
        training = _require_some(training.without_problems_of(held_out).accept(data))
    with _naming(other):
        held_out.accept(data)
    return Problems(training=training, held_out=held_out)


def _require_some(training: CheckedSplit) -> CheckedSplit:
    if not len(training.prompts):
        raise InvalidInput("no record is left to train on; correct the data")
    return training


def check_local_problems(config: Config, *, make_report: MakeReport = be_quiet) -> None:
    """Checks as `load_problems` does what is on this host; no hub is asked for a data set or a processor."""
    places = dict(zip((check_training, check_held_out), _list_places(config), strict=True))
    if all(Path(source).is_dir() for _, source in places.values()):
        load_problems(config, make_report=make_report, download=False)
        return
    if config.evaluation.every == 0:
        places.pop(check_held_out)
    for check, place in places.items():
        if Path(place[1]).is_dir():
            with _naming(place):
                check(config, make_report=make_report, download=False).accept(config.data)


def check_training(config: Config, *, make_report: MakeReport = be_quiet, download: bool = True) -> CheckedSplit:
    """Checks every record of the training split; without the student's processor, all but the lengths."""
    data = config.data
    prompts = _open(config, data.source, data.train_split, subset=data.subset, needs_answer=False)
    return check_split(
        prompts,
        control_tokens=read_control_tokens(config.student.model),
        meter=_make_meter(config, download=download),
        limit=config.prompt_limit,
        make_report=make_report,
    )


def check_held_out(config: Config, *, make_report: MakeReport = be_quiet, download: bool = True) -> CheckedSplit:
    """Checks the records of the validation split that a run evaluates on; see `check_training`."""
    data = config.data
    source, subset = data.source, data.subset
    if data.validation_source:
        source, subset = data.validation_source, data.validation_subset
    prompts = _open(config, source, data.validation_split, subset=subset)
    return check_split(
        prompts.pick(pick_held_out(len(prompts), config.evaluation.prompts)),
        control_tokens=read_control_tokens(config.student.model),
        meter=_make_meter(config, download=download),
        limit=config.prompt_limit,
        make_report=make_report,
    )


def check_split(
    prompts: Prompts,
    *,
    control_tokens: Sequence[str] = (),
    meter: Meter | None = None,
    limit: tuple[int, str] | None = None,
    make_report: MakeReport = be_quiet,
) -> CheckedSplit:
    """Checks and measures records; without a meter, no tokens are counted.

    limit: tokens that a prompt may have, and the setting that says so.
    """
    unsound = prompts.find_faults(control_tokens)
    sound = prompts.without(unsound)
    task = f"checking {prompts.source} ({prompts.split})"
    measured, unreadable = measure(sound, meter, on_progress=make_report(task))
    over_long = [
        Fault(
            index=index,
            kind="over-long",
            field=prompts.name_text_field(index),
            message=f"the prompt has {found.tokens} tokens, the limit is {limit[1]}; lower data.max_pixels, or shorten "
            "or drop the record",
        )
        for index, found in measured.items()
        if limit is not None and found.tokens is not None and found.tokens > limit[0]
    ]
    faults = sorted([*unsound, *unreadable, *over_long], key=lambda fault: fault.index)
    return CheckedSplit(
        prompts=sound.without([*unreadable, *over_long]), total=len(prompts), faults=tuple(faults), measured=measured
    )


def pick_held_out(records: int, wanted: int) -> list[int]:
    """Returns the indices of the held-out problems among a split's records: all, or the paper's sample.

    >>> pick_held_out(300, 200)[:5], pick_held_out(3, 200)
    ([0, 2, 3, 4, 7], [0, 1, 2])
    """
    if wanted >= records:
        return list(range(records))
    return sorted(random.Random(HELD_OUT_SEED).sample(range(records), wanted))


def _open(config: Config, source: str, split: str, *, subset: str, needs_answer: bool = True) -> Prompts:
    return open_split(
        source,
        split=split,
        instruction=config.data.instruction or None,
        system_prompt=config.data.system_prompt or None,
        control_tokens=read_control_tokens(config.student.model),
        subset=subset,
        columns=config.data.columns,
        may_differ=source != config.data.source,
        needs_answer=needs_answer,
    )


def _make_meter(config: Config, *, download: bool) -> Meter | None:
    """Makes the student's meter; None for a model that is neither here nor, with `download`, to be had by its id."""
    model = config.student.model
    meter = Meter(model, min_pixels=config.data.min_pixels, max_pixels=config.data.max_pixels)
    return meter if meter.is_here or (download and is_hub_id(model)) else None


def _list_places(config: Config) -> tuple[tuple[str, str], tuple[str, str]]:
    """Returns key and source of the training and of the held-out problems."""
    data = config.data
    own = ("source", data.source)
    return own, ("validation_source", data.validation_source) if data.validation_source else own


@contextmanager
def _naming(place: tuple[str, str]) -> Iterator[None]:
    """Names the configuration's key and the source in errors."""
    key, source = place
    try:
        yield
    except (InvalidInput, NotFound) as error:
        raise type(error)(f"data.{key} = {source}: {error}") from None
