"""Loads prompts from a local folder or a data set of the hub, as `vaopd.types.Prompt`s.

`vaopd.data.records` says what a record is and what may be wrong with it; `vaopd.data.problems` loads a run's records,
pictures checked and lengths measured. Here a bad record is an `InvalidInput` that names its index and field: text,
answer and counts are checked at once for all records, image bytes when a prompt is taken. Images stay encoded.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Literal, overload

import numpy as np

from vaopd.config import ColumnsConfig
from vaopd.data.records import (
    IMAGE_MARKER,
    Fault,
    Schema,
    as_answer,
    find_control_token,
    find_fault,
    make_messages,
    read_image,
    recognise,
)
from vaopd.data.tables import Rows, as_entries, read_split
from vaopd.errors import InvalidInput
from vaopd.types import Prompt

_log = logging.getLogger(__name__)


def load_prompts(
    source: str,
    *,
    split: str,
    limit: int | None = None,
    shuffle_seed: int | None = None,
    instruction: str | None = None,
    control_tokens: Sequence[str] = (),
    bad_records: Literal["error", "skip"] = "error",
    subset: str = "",
    columns: ColumnsConfig = ColumnsConfig(),
    cache_dir: Path | None = None,
) -> Prompts:
    r"""Loads the prompts of one split, in order or shuffled; at most `limit` of them (taken after shuffling).

    source: a folder with `{split}.parquet`, `{split}-*.parquet` or `{split}/*.parquet`, the same in `data/`, or, for
    "train", one Parquet file of any name; `.jsonl` likewise; `{split}/metadata.jsonl` beside images; else a hub id
    like "hiyouga/geometry3k".
    instruction: appended to the text on a line of its own, e.g. "Put the final answer in \boxed{}."
    control_tokens: texts that no record may hold, since models refuse them (`vaopd.files.hub.read_control_tokens`).
    bad_records: "skip" leaves out, with a warning, records with a wrong text, answer or number of images.
    subset: the configuration of a hub id. columns: other names of its columns.
    cache_dir: where `datasets` keeps what it downloads or maps.

    Raises InvalidInput for a bad record, and as `open_split` does.
    """
    if limit is not None and limit < 1:
        raise InvalidInput(f"limit must be at least 1, or None for all, got {limit}")
    prompts = open_split(
        source,
        split=split,
        instruction=instruction,
        control_tokens=control_tokens,
        subset=subset,
        columns=columns,
        cache_dir=cache_dir,
    )
    faults = prompts.find_faults(control_tokens)
    if faults:
        message = prompts.describe_faults(faults)
        if bad_records != "skip":
            raise InvalidInput(f"{message}; correct the data, or load it with bad_records='skip'")
        _log.warning("skipping %d of %d records; the first: %s", len(faults), len(prompts), message)
        if len(faults) == len(prompts):
            raise InvalidInput(f"{message}; no record is left")
    order = np.arange(len(prompts))
    if shuffle_seed is not None:
        order = np.random.default_rng(shuffle_seed).permutation(order)
    bad = {fault.index for fault in faults}
    return prompts.pick([int(index) for index in order if int(index) not in bad][:limit])


def open_split(
    source: str,
    *,
    split: str,
    instruction: str | None = None,
    system_prompt: str | None = None,
    control_tokens: Sequence[str] = (),
    subset: str = "",
    columns: ColumnsConfig = ColumnsConfig(),
    may_differ: bool = False,
    needs_answer: bool = True,
    cache_dir: Path | None = None,
) -> Prompts:
    """Opens a split with all of its records in order, none of them checked; arguments as in `load_prompts`.

    system_prompt: before every question. may_differ: `columns` are another data set's, and this one may have the known
    names. needs_answer: whether a record without a reference is bad.

    Raises NotFound or InvalidInput for files that can't be read, columns that are missing, a split without records and
    an instruction that no prompt may hold.
    """
    for name, text in (("instruction", instruction or ""), ("system_prompt", system_prompt or "")):
        words = name.replace("_", " ")
        if IMAGE_MARKER in text:
            raise InvalidInput(
                f"the {words} holds {IMAGE_MARKER}, which marks images in texts; take it out", field=f"data.{name}"
            )
        if found := find_control_token(text, control_tokens):
            raise InvalidInput(
                f"the {words} holds {found!r}, a control token of the model; take it out", field=f"data.{name}"
            )
    files = read_split(source, split, cache_dir, subset=subset, named=columns.model_dump().values())
    num_records = sum(map(len, files))
    if num_records == 0:
        raise InvalidInput(f"{source}: split {split!r} has no records; give a split that has some")
    shards = recognise(files, source, columns=columns, may_differ=may_differ, needs_answer=needs_answer)
    folder = Path(source) if Path(source).is_dir() else None
    order = np.arange(num_records)
    return Prompts(
        shards=shards,
        order=order,
        source=source,
        split=split,
        folder=folder,
        instruction=instruction,
        system_prompt=system_prompt,
    )


class Prompts(Sequence[Prompt]):
    """The prompts of a split as a sequence; each is made when it is taken. Use it from any thread."""

    def __init__(
        self,
        *,
        shards: Sequence[tuple[Rows, Schema]],
        order: np.ndarray,
        source: str,
        split: str,
        folder: Path | None,
        instruction: str | None,
        system_prompt: str | None,
    ) -> None:
        self.source = source
        self.split = split
        self._shards = shards
        self._ends = list(accumulate(len(rows) for rows, _ in shards))
        self._order = order
        self._folder = folder
        self._instruction = instruction
        self._system_prompt = system_prompt

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> Prompts: ...

    def __getitem__(self, index: int | slice) -> Prompt | Prompts:
        if isinstance(index, slice):
            return self._with_order(self._order[index])
        prompt = self.read(int(self._order[index]))
        if isinstance(prompt, Fault):
            raise InvalidInput(self.describe_fault(prompt))
        return prompt

    @property
    def name(self) -> str:
        """The split, for messages."""
        return f"split {self.split!r}"

    @property
    def indices(self) -> list[int]:
        """Each prompt's record, counted from 0 in the split."""
        return [int(index) for index in self._order]

    def pick(self, indices: Sequence[int]) -> Prompts:
        """Returns the prompts of these records, in this order."""
        return self._with_order(np.array(indices, dtype=np.int64))

    def without(self, faults: Collection[Fault]) -> Prompts:
        """Returns the other prompts, in the same order."""
        return self._with_order(self._order[~np.isin(self._order, [fault.index for fault in faults])])

    def count_without_answer(self) -> int:
        """Counts the records without an answer that could be compared with."""
        chosen, missing = set(self.indices), 0
        for (rows, schema), end in zip(self._shards, self._ends, strict=True):
            answers = rows.read_column(schema.answer) if schema.answer in rows.columns else [None] * len(rows)
            missing += sum(
                index in chosen and not _read_answer(answer) for index, answer in enumerate(answers, end - len(rows))
            )
        return missing

    def find_faults(self, control_tokens: Sequence[str] = ()) -> list[Fault]:
        """Checks text, answer and number of images of the records, all at once; not the images."""
        chosen = set(self.indices)
        faults = []
        for (rows, schema), end in zip(self._shards, self._ends, strict=True):
            has_images = schema.images in rows.columns
            has_answers = schema.needs_answer or schema.answer in rows.columns
            records = zip(
                rows.read_column(schema.text),
                rows.read_column(schema.answer) if has_answers else [None] * len(rows),
                rows.count_images(schema.images) if has_images else [0] * len(rows),
                strict=True,
            )
            for index, record in enumerate(records, end - len(rows)):
                if index in chosen and (fault := find_fault(index, schema, *record, control_tokens)):
                    faults.append(fault)
        return faults

    def describe_faults(self, faults: Sequence[Fault]) -> str:
        """Names the first bad record in full, and how many there are, with the first indices."""
        message = self.describe_fault(min(faults, key=lambda fault: fault.index))
        if len(faults) > 1:
            bad = sorted({fault.index for fault in faults})
            message += f" ({len(bad)} of {len(self)} records are bad: {', '.join(map(str, bad[:10]))} …)"
        return message

    def describe_fault(self, fault: Fault) -> str:
        """Names a bad record in full."""
        return f"{self.describe_place(fault.index)}, field {fault.field!r}: {fault.message}"

    def describe_place(self, index: int) -> str:
        """Names a record of the split by its index."""
        return f"{self.name}, record {index}"

    def read(self, index: int) -> Prompt | Fault:
        """Reads a record that `find_faults` finds sound, or returns the fault of one of its images."""
        rows, schema, row = self._locate(index)
        record = rows.read(row)
        images = []
        for position, entry in enumerate(as_entries(record.get(schema.images))):
            try:
                images.append(read_image(entry, folder=self._folder, table=rows.file))
            except InvalidInput as error:
                return self.make_picture_fault(index, position, str(error))
        turns = schema.split_turns(record[schema.text])
        if self._instruction is not None:
            turns[-1] = (turns[-1][0], f"{turns[-1][1]}\n{self._instruction}")
        system = record.get(schema.system) or self._system_prompt
        if system and turns[0][0] != "system":
            turns.insert(0, ("system", str(system)))
        given = (record[name] for name in schema.record_ids if record.get(name) not in (None, ""))
        return Prompt(
            prompt_id=str(next(given, f"{self.split}-{index}")),
            messages=make_messages(turns, [image.sha256 for image in images]),
            images=tuple({image.sha256: image for image in images}.values()),
            answer=as_answer(record.get(schema.answer))
            if schema.needs_answer
            else _read_answer(record.get(schema.answer)),
        )

    def make_picture_fault(self, index: int, position: int, message: str) -> Fault:
        """Returns the fault of a record's image."""
        field = f"{self._locate(index)[1].images}[{position}]"
        return Fault(index=index, kind="picture", field=field, message=message)

    def name_text_field(self, index: int) -> str:
        """Returns the column of a record's text."""
        return self._locate(index)[1].text

    def _with_order(self, order: np.ndarray) -> Prompts:
        other = copy.copy(self)
        other._order = order
        return other

    def _locate(self, index: int) -> tuple[Rows, Schema, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        rows, schema = self._shards[shard]
        return rows, schema, index - self._ends[shard] + len(rows)


def _read_answer(value: object) -> str:
    """Returns the reference of a record that is only trained on; "" for one that couldn't be compared with."""
    try:
        return as_answer(value)
    except InvalidInput:
        return ""
