"""Loads prompts from a local folder or a data set of the hub, as `vaopd.types.Prompt`s.

A record has a text (`problem` as in Geometry3K, `question` as in ViRL39K), an `answer`, and `images` or `image`: one or
a list of bytes, paths or structs of both. "<image>" in the text marks the place of an image; images without any marker
come first. A bad record is an `InvalidInput` that names its index and field: text, answer and counts are checked at
once for all records, image bytes when a prompt is taken. Images stay encoded.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

import numpy as np

from vaopd.data.tables import Rows, as_entries, read_split
from vaopd.errors import InvalidInput
from vaopd.files.hub import read_control_tokens
from vaopd.types import EncodedImage, ImagePart, Message, Prompt, TextPart

if TYPE_CHECKING:
    from vaopd.config import Config

IMAGE_MARKER = "<image>"
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Schema:
    """The columns of a data set's text, answer, images and record id."""

    name: str
    text: str
    images: str
    answer: str = "answer"
    record_id: str | None = None


SCHEMAS = (
    Schema(name="Geometry3K", text="problem", images="images"),
    Schema(name="ViRL39K", text="question", images="image", record_id="qid"),
    Schema(name="data set", text="problem", images="image"),
    Schema(name="data set", text="question", images="images", record_id="qid"),
)


def load_prompts(
    source: str,
    *,
    split: str,
    limit: int | None = None,
    shuffle_seed: int | None = None,
    instruction: str | None = None,
    control_tokens: Sequence[str] = (),
    bad_records: Literal["raise", "skip"] = "raise",
    cache_dir: Path | None = None,
) -> Prompts:
    r"""Loads the prompts of one split, in order or shuffled; at most `limit` of them (taken after shuffling).

    source: a folder with `{split}.parquet`, `{split}-*.parquet` or `{split}/*.parquet`, the same in `data/`, or, for
    "train", one Parquet file of any name; `.jsonl` likewise; `{split}/metadata.jsonl` beside pictures; else a hub id
    like "hiyouga/geometry3k". instruction: appended to the text on a line of its own, e.g.
    "Put the final answer in \boxed{}." control_tokens: texts that no record may hold, since models refuse them
    (`vaopd.files.hub.read_control_tokens`). bad_records: "skip" leaves out, with a warning, records with a wrong text,
    answer or number of images. cache_dir: where `datasets` keeps what it downloads or maps.
    """
    if limit is not None and limit < 1:
        raise InvalidInput(f"limit must be at least 1, or None for all, got {limit}")
    if instruction is not None and IMAGE_MARKER in instruction:
        raise InvalidInput(
            f"the instruction holds {IMAGE_MARKER}, which marks images in texts; take it out", field="data.instruction"
        )
    if found := _find_control_token(instruction or "", control_tokens):
        raise InvalidInput(
            f"the instruction holds {found!r}, a control token of the model; take it out", field="data.instruction"
        )
    shards = _recognise(read_split(source, split, cache_dir), source)
    num_records = sum(len(rows) for rows, _ in shards)
    if num_records == 0:
        raise InvalidInput(f"{source}: split {split!r} has no records; give a split that has some")
    order = np.arange(num_records)
    if shuffle_seed is not None:
        order = np.random.default_rng(shuffle_seed).permutation(order)
    folder = Path(source) if Path(source).is_dir() else None
    prompts = Prompts(shards=shards, order=order, split=split, folder=folder, instruction=instruction)
    return prompts.checked(bad_records, control_tokens).first(limit)


def load_training_prompts(config: Config) -> Prompts:
    """Loads what a run trains on; `--dry-run` calls it too."""
    data = config.data
    return load_prompts(
        data.source,
        split=data.train_split,
        instruction=data.instruction or None,
        control_tokens=read_control_tokens(config.student.model),
    )


class Prompts(Sequence[Prompt]):
    """The prompts of a split as a sequence; each is made when it is taken."""

    def __init__(
        self,
        *,
        shards: Sequence[tuple[Rows, Schema]],
        order: np.ndarray,
        split: str,
        folder: Path | None,
        instruction: str | None,
    ) -> None:
        self._shards = shards
        self._ends = list(accumulate(len(rows) for rows, _ in shards))
        self._order = order
        self._split = split
        self._folder = folder
        self._instruction = instruction

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> Prompts: ...

    def __getitem__(self, index: int | slice) -> Prompt | Prompts:
        if isinstance(index, slice):
            return self._with_order(self._order[index])
        return self._prompt(int(self._order[index]))

    def first(self, limit: int | None) -> Prompts:
        """Returns the first `limit` prompts, or all."""
        return self if limit is None else self[:limit]

    def checked(self, bad_records: Literal["raise", "skip"], control_tokens: Sequence[str] = ()) -> Prompts:
        """Checks every record's text, answer and number of images (not image bytes); drops or refuses bad ones."""
        faults: dict[int, str] = {}
        for (rows, schema), end in zip(self._shards, self._ends, strict=True):
            has_images = schema.images in rows.columns
            records = zip(
                rows.read_column(schema.text),
                rows.read_column(schema.answer),
                rows.count_images(schema.images) if has_images else [0] * len(rows),
                strict=True,
            )
            for index, record in enumerate(records, end - len(rows)):
                if fault := _find_fault(schema, *record):
                    faults[index] = fault
                elif found := _find_control_token(record[0], control_tokens):
                    faults[index] = f"field {schema.text!r}: the text holds {found!r}, a control token of the model"
        if not faults:
            return self
        first = min(faults)
        message = f"{self._describe_place(first)}, {faults[first]}"
        if len(faults) > 1:
            message += f" ({len(faults)} of {self._ends[-1]} records are bad: {str(sorted(faults)[:10])[1:-1]} …)"
        if bad_records == "raise":
            raise InvalidInput(f"{message}; correct the data, or load it with bad_records='skip'")
        _log.warning("skipping %d of %d records; the first: %s", len(faults), self._ends[-1], message)
        if len(faults) == self._ends[-1]:
            raise InvalidInput(f"{message}; no record is left")
        return self._with_order(self._order[~np.isin(self._order, list(faults))])

    def _with_order(self, order: np.ndarray) -> Prompts:
        other = copy.copy(self)
        other._order = order
        return other

    def _locate(self, index: int) -> tuple[Rows, Schema, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        rows, schema = self._shards[shard]
        return rows, schema, index - self._ends[shard] + len(rows)

    def _describe_place(self, index: int) -> str:
        return f"{self._locate(index)[1].name} split {self._split!r}, record {index}"

    def _prompt(self, index: int) -> Prompt:
        rows, schema, row = self._locate(index)
        record = rows.read(row)
        images = [
            self._read_image(entry, f"{self._describe_place(index)}, field '{schema.images}[{position}]'", rows.file)
            for position, entry in enumerate(as_entries(record.get(schema.images)))
        ]
        text: str = record[schema.text]
        if self._instruction is not None:
            text = f"{text}\n{self._instruction}"
        record_id = record.get(schema.record_id) if schema.record_id else None
        return Prompt(
            prompt_id=f"{self._split}-{index}" if record_id is None else str(record_id),
            messages=(Message(role="user", content=content_parts(text, [image.sha256 for image in images])),),
            images=tuple({image.sha256: image for image in images}.values()),
            answer=_as_answer(record[schema.answer]),
        )

    def _read_image(self, entry: object, where: str, table: Path | None) -> EncodedImage:
        """Reads the encoded bytes, from the record itself or from the file that it names."""
        stored, path = (entry.get("bytes"), entry.get("path")) if isinstance(entry, dict) else (entry, entry)
        if isinstance(stored, bytes) and (stored or not path):
            data = stored
        elif isinstance(path, str) and path:
            data = self._read_file(path, where, table)
        else:
            raise InvalidInput(f"{where}: there are neither image bytes nor a path; correct or drop the record")
        if not data.startswith(_MAGIC):
            raise InvalidInput(f"{where}: not a PNG, JPEG or WEBP image ({len(data)} bytes); convert or drop it")
        return EncodedImage(data=data)

    def _read_file(self, path: str, where: str, table: Path | None) -> bytes:
        if self._folder is None or table is None:
            raise InvalidInput(
                f"{where}: the image {path!r} is a file beside the Parquet file, which the hub's loader "
                "doesn't deliver; download the data set, unpack its images, and give the folder as the source"
            )
        try:
            beside = (table.parent / path).resolve()
            file = beside if beside.is_file() else (self._folder / path).resolve()
            found = file.is_file()
        except (OSError, ValueError):  # a name that no file can have
            raise InvalidInput(f"{where}: {path[:80]!r} is no path; correct or drop the record") from None
        # A record may name files of its own folder only, since the files are sent to other machines.
        if not file.is_relative_to(self._folder.resolve()):
            raise InvalidInput(f"{where}: the path {path!r} leads out of {self._folder}; use paths inside the folder")
        if not found:
            raise InvalidInput(
                f"{where}: there is no file {file}; unpack the data set's images beside its Parquet file"
            )
        return file.read_bytes()


def _recognise(files: Sequence[Rows], source: str) -> list[tuple[Rows, Schema]]:
    """Finds the columns of each file; a file may lack images if another has them."""
    names = {name for rows in files for name in rows.columns}
    shards = []
    for rows in (rows for rows in files if len(rows) or len(files) == 1):
        for needs_images in (True, False):
            fitting = [
                schema
                for schema in SCHEMAS
                if {schema.text, schema.answer} <= set(rows.columns)
                and schema.images in (rows.columns if needs_images else names)
            ]
            if fitting:
                shards.append((rows, fitting[0]))
                break
        else:
            known = "problem or question, answer, and images or image (an empty list where a problem has none)"
            columns = ", ".join(rows.columns)
            raise InvalidInput(f"{rows.file or source} has columns {columns}; needed: {known}; rename them")
    return shards


def _find_fault(schema: Schema, text: object, answer: object, num_images: int) -> str | None:
    if text is not None and not isinstance(text, str):
        return f"field {schema.text!r}: {_describe(text)} where a text belongs"
    if not text or not text.replace(IMAGE_MARKER, "").strip():
        return f"field {schema.text!r}: the text is missing or empty"
    try:
        if not _as_answer(answer):
            return f"field {schema.answer!r}: the answer is missing or empty"
    except InvalidInput as error:
        return f"field {schema.answer!r}: {error}"
    markers = text.count(IMAGE_MARKER)
    if markers not in (0, num_images):
        return (
            f"field {schema.text!r}: the text has {markers} {IMAGE_MARKER} markers and the record "
            f"{num_images} images; give one marker for each image, or none"
        )
    return None


def _find_control_token(text: str, control_tokens: Sequence[str]) -> str | None:
    written = text.replace(IMAGE_MARKER, "")  # the marker itself is a token of some families
    return next((token for token in control_tokens if token in written), None)


def _as_answer(value: object) -> str:
    """Returns an answer as text, "" for none; raises InvalidInput for one that is neither text nor a finite number.

    >>> _as_answer(12), _as_answer(1e-7), _as_answer([" x "])
    ('12', '0.0000001', 'x')
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool) and math.isfinite(value):
        return format(Decimal(str(value)), "f")
    raise InvalidInput(f"the answer is {_describe(value)}; give a text or a number")


def _describe(value: object) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    kinds = {dict: "a struct", bytes: "bytes", bool: "true or false", float: "no finite number"}
    return kinds.get(type(value), f"of type {type(value).__name__}")


def content_parts(text: str, image_sha256: Sequence[str]) -> tuple[TextPart | ImagePart, ...]:
    """Splits a text at its image markers into parts in reading order; without a marker the images come first.

    >>> content_parts("Is <image> like <image>?", ["aa", "bb"])[1]
    ImagePart(sha256='aa')
    """
    pieces = text.split(IMAGE_MARKER)
    if len(pieces) == 1:
        return (*(ImagePart(sha256=sha256) for sha256 in image_sha256), TextPart(text=text))
    parts: list[TextPart | ImagePart] = []
    for piece, sha256 in zip(pieces, [*image_sha256, None], strict=True):
        if piece:
            parts.append(TextPart(text=piece))
        if sha256 is not None:
            parts.append(ImagePart(sha256=sha256))
    return tuple(parts)
