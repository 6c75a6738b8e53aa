"""Loads prompts from a local folder of Parquet or a data set of the hub, as `vaopd.types.Prompt`s.

Two schemas are recognised by their columns: Geometry3K's (problem, answer, images; the generator's too) and ViRL39K's
(question, answer, image: paths beside the Parquet file, qid). "<image>" in the text marks the place of an image; images
without any marker come first. A bad record is an `InvalidInput` that names its index and field: text and counts are
checked at once for all records, image bytes when a prompt is taken. Images stay encoded.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from vaopd.errors import InvalidInput, NotFound
from vaopd.types import EncodedImage, ImagePart, Message, Prompt, TextPart

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_MARKER = "<image>"
IN_MEMORY_BYTES = 256 * 2**20
"""Larger local sets are memory-mapped through `datasets`, which keeps an Arrow copy in its cache."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Schema:
    """The columns of a data set's text, answer, images and record id."""

    name: str
    text: str
    answer: str
    images: str
    record_id: str | None


SCHEMAS = (
    Schema(name="Geometry3K", text="problem", answer="answer", images="images", record_id=None),
    Schema(name="ViRL39K", text="question", answer="answer", images="image", record_id="qid"),
)


def load_prompts(
    source: str,
    *,
    split: str,
    limit: int | None = None,
    shuffle_seed: int | None = None,
    instruction: str | None = None,
    bad_records: Literal["raise", "skip"] = "raise",
    cache_dir: Path | None = None,
) -> Prompts:
    r"""Loads the prompts of one split, in order or shuffled; at most `limit` of them (taken after shuffling).

    source: a folder with `{split}.parquet`, `{split}-*.parquet`, the same in `data/`, or, for "train", one Parquet file
    of any name; else a hub id like "hiyouga/geometry3k". instruction: appended to the text on a line of its own, e.g.
    "Put the final answer in \boxed{}." bad_records: "skip" leaves out, with a warning, records whose text, answer or
    number of images is wrong. cache_dir: where `datasets` keeps what it downloads or maps.
    """
    if limit is not None and limit < 1:
        raise InvalidInput(f"limit must be at least 1, or None for all, got {limit}")
    folder = Path(source) if Path(source).is_dir() else None
    if folder is not None:
        table = _load_local_table(folder, split, cache_dir)
    elif _HUB_ID.fullmatch(source):
        table = _load_hub_table(source, split, cache_dir)
    else:
        raise NotFound(f"{source!r} is neither a folder nor a hub id (owner/name); check the path")
    schema = _detect_schema(table, source)
    order = np.arange(table.num_rows)
    if shuffle_seed is not None:
        order = np.random.default_rng(shuffle_seed).permutation(order)
    prompts = Prompts(table=table, schema=schema, order=order, split=split, folder=folder, instruction=instruction)
    return prompts.checked(bad_records).first(limit)


class Prompts(Sequence[Prompt]):
    """The prompts of a split as a sequence; each is made when it is taken."""

    def __init__(
        self,
        *,
        table: pa.Table,
        schema: Schema,
        order: np.ndarray,
        split: str,
        folder: Path | None,
        instruction: str | None,
    ) -> None:
        columns = [schema.text, schema.answer, schema.images, schema.record_id]
        self._table = table.select([name for name in columns if name in table.column_names])
        self._schema = schema
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

    def checked(self, bad_records: Literal["raise", "skip"]) -> Prompts:
        """Checks every record's text, answer and number of images (not image bytes); drops or refuses bad ones."""
        import pyarrow.compute as pc

        texts = self._table[self._schema.text].to_pylist()
        answers = self._table[self._schema.answer].to_pylist()
        counts = pc.fill_null(pc.list_value_length(self._table[self._schema.images]), 0).to_pylist()
        faults = {
            index: fault
            for index, record in enumerate(zip(texts, answers, counts, strict=True))
            if (fault := self._find_fault(*record)) is not None
        }
        if not faults:
            return self
        first = min(faults)
        message = f"{self._locate(first)}, {faults[first]}"
        if len(faults) > 1:
            message += f" ({len(faults)} of {len(texts)} records are bad: {str(sorted(faults)[:10])[1:-1]} …)"
        if bad_records == "raise":
            raise InvalidInput(f"{message}; correct the data, or load it with bad_records='skip'")
        _log.warning("skipping %d of %d records; the first: %s", len(faults), len(texts), message)
        return self._with_order(self._order[~np.isin(self._order, list(faults))])

    def _with_order(self, order: np.ndarray) -> Prompts:
        other = copy.copy(self)
        other._order = order
        return other

    def _find_fault(self, text: object, answer: object, num_images: int) -> str | None:
        if not isinstance(text, str) or not text.replace(IMAGE_MARKER, "").strip():
            return f"field {self._schema.text!r}: the text is missing or empty"
        if answer is None or not str(answer).strip():
            return f"field {self._schema.answer!r}: the answer is missing or empty"
        markers = text.count(IMAGE_MARKER)
        if markers not in (0, num_images):
            return (
                f"field {self._schema.text!r}: the text has {markers} {IMAGE_MARKER} markers and the record "
                f"{num_images} images; give one marker for each image, or none"
            )
        return None

    def _locate(self, index: int) -> str:
        return f"{self._schema.name} split {self._split!r}, record {index}"

    def _prompt(self, index: int) -> Prompt:
        record: dict[str, Any] = self._table.slice(index, 1).to_pylist()[0]
        images = [
            self._read_image(entry, index, position) for position, entry in enumerate(record[self._schema.images] or [])
        ]
        text: str = record[self._schema.text]
        if self._instruction is not None:
            text = f"{text}\n{self._instruction}"
        record_id = record.get(self._schema.record_id) if self._schema.record_id else None
        return Prompt(
            prompt_id=f"{self._split}-{index}" if record_id is None else str(record_id),
            messages=(Message(role="user", content=content_parts(text, [image.sha256 for image in images])),),
            images=tuple({image.sha256: image for image in images}.values()),
            answer=str(record[self._schema.answer]).strip(),
        )

    def _read_image(self, entry: object, index: int, position: int) -> EncodedImage:
        """Reads the encoded bytes, from the record itself or from the file that it names."""
        where = f"{self._locate(index)}, field '{self._schema.images}[{position}]'"
        data = entry.get("bytes") if isinstance(entry, dict) else None
        if data is None:
            path = entry.get("path") if isinstance(entry, dict) else entry
            if not isinstance(path, str) or not path:
                raise InvalidInput(f"{where}: there are neither image bytes nor a path; correct or drop the record")
            data = self._read_file(path, where)
        if not data.startswith(_MAGIC):
            raise InvalidInput(f"{where}: not a PNG, JPEG or WEBP image ({len(data)} bytes); convert or drop it")
        return EncodedImage(data=data)

    def _read_file(self, path: str, where: str) -> bytes:
        if self._folder is None:
            raise InvalidInput(
                f"{where}: the image {path!r} is a file beside the Parquet file, which the hub's loader "
                "doesn't deliver; download the data set, unpack its images, and give the folder as the source"
            )
        file = (self._folder / path).resolve()
        # A record may name files of its own folder only, since the files are sent to other machines.
        if not file.is_relative_to(self._folder.resolve()):
            raise InvalidInput(f"{where}: the path {path!r} leads out of {self._folder}; use paths inside the folder")
        if not file.is_file():
            raise InvalidInput(
                f"{where}: there is no file {file}; unpack the data set's images beside its Parquet file"
            )
        return file.read_bytes()


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


def _load_local_table(folder: Path, split: str, cache_dir: Path | None) -> pa.Table:
    files = _split_files(folder, split)
    if sum(file.stat().st_size for file in files) <= IN_MEMORY_BYTES:
        import pyarrow as pa
        import pyarrow.parquet as pq

        return pa.concat_tables([pq.read_table(file) for file in files])
    from datasets import load_dataset

    names = [str(file) for file in files]
    mapped = load_dataset("parquet", data_files={split: names}, split=split, cache_dir=_read_text(cache_dir))
    return mapped.data.table


def _split_files(folder: Path, split: str) -> list[Path]:
    for parent in (folder, folder / "data"):
        for pattern in (f"{split}.parquet", f"{split}-*.parquet"):
            if files := sorted(parent.glob(pattern)):
                return files
    lone = sorted(folder.glob("*.parquet"))
    if split == "train" and len(lone) == 1:  # ViRL39K is published as one file, without splits
        return lone
    raise NotFound(
        f"{folder} has no Parquet file of split {split!r}: looked for {split}.parquet and {split}-*.parquet, here and "
        f"in data/; it has {', '.join(file.name for file in lone) or 'none at all'}"
    )


def _load_hub_table(source: str, split: str, cache_dir: Path | None) -> pa.Table:
    from datasets import load_dataset

    try:
        return load_dataset(source, split=split, cache_dir=_read_text(cache_dir)).data.table
    except (OSError, ValueError) as error:  # `datasets` raises these for an unknown id or split, or without a network
        raise NotFound(
            f"the hub's data set {source!r}, split {split!r}, can't be loaded ({error}); check id, split and network, "
            "or download it and give the folder"
        ) from error


def _detect_schema(table: pa.Table, source: str) -> Schema:
    import pyarrow as pa

    for schema in SCHEMAS:
        if not {schema.text, schema.answer, schema.images} <= set(table.column_names):
            continue
        kind = table.schema.field(schema.images).type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            raise InvalidInput(f"{source}: column {schema.images!r} is of type {kind}; make it a list, one per image")
        return schema
    known = " or ".join(f"{s.text}, {s.answer}, {s.images} ({s.name})" for s in SCHEMAS)
    raise InvalidInput(f"{source} has columns {', '.join(table.column_names)}; needed: {known}; rename them")


def _read_text(path: Path | None) -> str | None:
    return None if path is None else str(path)
