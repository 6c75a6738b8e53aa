"""Finds and reads the files of a data set's split: Parquet, JSON Lines, a folder of pictures with metadata.jsonl.

Every file keeps its own schema, so shards may differ in types, order and further columns; `vaopd.data.loaders` reads
the values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vaopd.errors import InvalidInput, NotFound
from vaopd.files.hub import is_hub_id, no_folder

if TYPE_CHECKING:
    import pyarrow as pa

IN_MEMORY_BYTES = 256 * 2**20
"""Larger local sets are memory-mapped through `datasets`, which keeps an Arrow copy in its cache."""

_SHARD = re.compile(r"(.+)-\d+-of-(\d+)(?:-\w+)?")
_KNOWN_COLUMNS = ("problem", "question", "messages", "conversations", "answer", "images", "image", "qid", "id")
_METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class JsonRows:
    """The records of a JSON Lines file."""

    records: Sequence[dict[str, Any]]
    file: Path

    @property
    def columns(self) -> Sequence[str]:
        """Returns the names of all columns."""
        return list(dict.fromkeys(name for record in self.records for name in record))

    def __len__(self) -> int:
        return len(self.records)

    def read(self, index: int) -> dict[str, Any]:
        """Returns one record as Python values."""
        return self.records[index]

    def read_column(self, name: str) -> list[Any]:
        """Returns one column as Python values."""
        return [record.get(name) for record in self.records]

    def count_images(self, name: str) -> list[int]:
        """Counts each record's images in a column."""
        return [len(as_entries(value)) for value in self.read_column(name)]


class ArrowRows:
    """The records of an Arrow table, in memory or mapped; class labels are read by name."""

    def __init__(self, table: pa.Table, file: Path | None, named: Collection[str] = ()) -> None:
        """file: None for the hub's. named: columns that a configuration names, besides those of known data sets."""
        import pyarrow.compute as pc

        self.file = file
        for name in named:  # a field of a struct, such as verl's reward_model.ground_truth
            outer, _, inner = name.partition(".")
            if inner and name not in table.column_names and _has_field(table.schema, outer, inner):
                table = table.append_column(name, pc.struct_field(table[outer], inner))
        self.columns: Sequence[str] = table.column_names
        known = [name for name in self.columns if name in (*_KNOWN_COLUMNS, *named)]
        if len(known) > len(set(known)):
            raise InvalidInput(f"{file or 'the data set'} has a column twice: {', '.join(known)}; drop one")
        self._table = table.select(known)
        self._labels = _read_label_names(table.schema)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def read(self, index: int) -> dict[str, Any]:
        """Returns one record as Python values."""
        row = self._table.slice(index, 1)
        return {name: self._as_values(name, row[name])[0] for name in self._table.column_names}

    def read_column(self, name: str) -> list[Any]:
        """Returns one column as Python values."""
        return self._as_values(name, self._table[name])

    def _as_values(self, name: str, column: pa.ChunkedArray) -> list[Any]:
        import pyarrow as pa

        values = column.to_pylist()
        if pa.types.is_float16(column.type) or pa.types.is_float32(column.type):  # 0.1, not 0.10000000149011612
            kind = np.float16 if pa.types.is_float16(column.type) else np.float32
            return [value if value is None else float(str(kind(value))) for value in values]
        names = self._labels.get(name)
        return values if names is None else [_name_labels(value, names) for value in values]

    def count_images(self, name: str) -> list[int]:
        """Counts each record's images in a column, without reading them."""
        import pyarrow.compute as pc

        column = self._table[name]
        is_list = _check_image_type(column.type, name, self.file)
        counts = pc.list_value_length(column).to_pylist() if is_list else [1] * len(self)
        return [count if valid else 0 for count, valid in zip(counts, column.is_valid().to_pylist(), strict=True)]


def _has_field(schema: pa.Schema, column: str, field: str) -> bool:
    import pyarrow as pa

    if column not in schema.names:
        return False
    kind = schema.field(column).type
    return bool(pa.types.is_struct(kind) and kind.get_field_index(field) >= 0)


Rows = JsonRows | ArrowRows
"""The records of one file."""


def as_entries(value: object) -> Sequence[object]:
    """Returns the images of one record; its column may hold a list or one image.

    >>> as_entries(None), as_entries("a.png"), as_entries(["a.png", "b.png"])
    ([], ['a.png'], ['a.png', 'b.png'])
    """
    return [] if value is None else value if isinstance(value, list) else [value]


def read_split(
    source: str, split: str, cache_dir: Path | None, *, subset: str = "", named: Collection[str] = ()
) -> list[Rows]:
    """Reads the files of a split of a folder or hub id, in the order of their names.

    subset: the configuration of a hub id. named: columns to read besides those of known data sets.

    Raises NotFound where there are none, InvalidInput for a file that can't be read.
    """
    folder = Path(source)
    if folder.is_dir():
        if subset:
            raise InvalidInput(f"{source} is a folder, and the subset {subset!r} is for hub ids; leave it out")
        return _read_folder(folder, split, cache_dir, named)
    if not is_hub_id(source):
        raise NotFound(f"{source!r}: {no_folder(source)}, and it is not a hub id of the form OWNER/NAME")
    from datasets import load_dataset

    try:
        dataset = load_dataset(source, subset or None, split=split, cache_dir=_format_path(cache_dir))
    except (OSError, ValueError) as error:  # `datasets` raises these for an unknown id or split, or without a network
        raise NotFound(
            f"the hub's data set {source!r}, subset {subset or 'default'!r}, split {split!r}, can't be loaded "
            f"({error}); check id, subset, split and network, or download it and give the folder"
        ) from error
    return [ArrowRows(_with_features(dataset), None, named)]


def _read_folder(folder: Path, split: str, cache_dir: Path | None, named: Collection[str]) -> list[Rows]:
    files = _split_files(folder, split)
    if files[0].name == _METADATA:
        return [_read_pictures(folder, files[0], split)]
    if files[0].suffix != ".parquet":
        return [JsonRows(_read_json_lines(file), file) for file in files]
    in_memory = sum(file.stat().st_size for file in files) <= IN_MEMORY_BYTES
    return list(_read_parquet(files, named) if in_memory else _map_parquet(files, split, cache_dir, named))


def _split_files(folder: Path, split: str) -> list[Path]:
    parents = (folder, folder / "data", folder / "default")  # the last in the hub's own conversions to Parquet
    for suffix in (".parquet", ".jsonl", ".json"):
        for parent in parents:
            patterns = (f"{split}{suffix}", f"{split}-*{suffix}", f"{split}_[0-9]*{suffix}", f"{split}/*{suffix}")
            for pattern in patterns if suffix != ".json" else patterns[:1]:  # others may describe pictures one by one
                if files := [file for file in sorted(parent.glob(pattern)) if file.name != _METADATA]:
                    return _require_all_shards(files)
    for parent in parents:
        if (found := parent / split / _METADATA).is_file():
            return [found]
    if (found := folder / _METADATA).is_file() and (split == "train" or (folder / split).is_dir()):
        return [found]
    lone = next(filter(None, (sorted(folder.glob(f"*.{kind}")) for kind in ("parquet", "jsonl", "json"))), [])
    if split == "train" and len(lone) == 1:  # ViRL39K is published as one file, without splits
        return lone
    raise NotFound(
        f"{folder} has no Parquet file of split {split!r} and no JSON Lines: looked for {split}.parquet, "
        f"{split}-*.parquet and {split}/*.parquet (or .jsonl, .json, or {split}/{_METADATA}), here, in data/ and in "
        f"default/; it has {', '.join(sorted(file.name for file in folder.iterdir())[:20]) or 'no file at all'}"
    )


def _require_all_shards(files: list[Path]) -> list[Path]:
    """Returns the files. Raises InvalidInput where their names say that there are more or fewer of them."""
    totals: dict[str, list[int]] = {}
    for found in filter(None, (_SHARD.fullmatch(file.stem) for file in files)):
        totals.setdefault(found[1], []).append(int(found[2]))
    for name, said in totals.items():
        if set(said) != {len(said)}:
            raise InvalidInput(
                f"{files[0].parent} has {len(said)} shards {name}-…, and their names say "
                f"{' and '.join(map(str, sorted(set(said))))}; download all of them, and of one version only"
            )
    return files


def _read_parquet(files: Sequence[Path], named: Collection[str]) -> Iterator[Rows]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in files:
        try:
            yield ArrowRows(pq.ParquetFile(file).read(), file, named)
        except (pa.ArrowException, OSError) as error:
            raise InvalidInput(f"{file} can't be read as Parquet ({_cut_first_line(error)}); write it again") from None


def _map_parquet(files: Sequence[Path], split: str, cache_dir: Path | None, named: Collection[str]) -> Iterator[Rows]:
    """Maps neighbours of one schema at once, since `datasets` refuses shards that differ."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    def read_schema_and_folder(file: Path) -> tuple[str, Path]:
        schema = pq.read_schema(file)
        return schema.to_string(truncate_metadata=False), file.parent

    try:
        filled = [file for file in files if pq.read_metadata(file).num_rows]  # `datasets` refuses those without rows
        for _, group in groupby(filled, read_schema_and_folder):
            names = [str(file) for file in group]
            mapped = load_dataset("parquet", data_files={split: names}, split=split, cache_dir=_format_path(cache_dir))
            yield ArrowRows(_with_features(mapped), Path(names[0]), named)
    except (pa.ArrowException, OSError, ValueError, DatasetsError) as error:
        raise InvalidInput(f"{files[0].parent}: its Parquet can't be mapped ({_cut_first_line(error)})") from None


def _read_json_lines(file: Path) -> list[dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError:
        raise InvalidInput(f"{file} is not UTF-8 text; write it again") from None
    if file.suffix == ".json" and text.lstrip().startswith("["):
        return _read_json_array(file, text)
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            record = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise InvalidInput(f"{file}, line {number}: not a JSON object; write one record a line")
        if line.strip():
            records.append(record)
    return records


def _read_json_array(file: Path, text: str) -> list[dict[str, Any]]:
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{file} is not JSON ({_cut_first_line(error)}); write it again") from None
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise InvalidInput(f"{file}, record {number}: not a JSON object; write an array of objects")
    return list(records)


def _read_pictures(folder: Path, file: Path, split: str) -> Rows:
    """Reads `metadata.jsonl`, which names a record's pictures by `file_name` or, several, `file_names`."""
    records = []
    for record in _read_json_lines(file):
        names = as_entries(record.get("file_names", record.get("file_name")))
        if file.parent == folder and (folder / split).is_dir():  # one list for all splits
            names = [name for name in names if Path(str(name)).parts[:1] == (split,)]
            if not names:
                continue
        records.append({"images": names} | record)
    return JsonRows(records, file)


def _check_image_type(kind: pa.DataType, name: str, file: Path | None) -> bool:
    """Returns whether a column holds lists of images, not one image each. Raises InvalidInput for neither."""
    import pyarrow as pa

    types = pa.types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    image = kind.value_type if is_list else kind
    binary = types.is_binary(image) or types.is_large_binary(image) or types.is_binary_view(image)
    text = types.is_string(image) or types.is_large_string(image) or types.is_string_view(image)
    fields = {field.name for field in image} if types.is_struct(image) else set()
    if not (binary or text or types.is_null(image) or fields & {"bytes", "path"}):
        where = file or "the data set"
        raise InvalidInput(
            f"{where}: column {name!r} is of type {kind}; give bytes, a path, or a struct with `bytes` and `path`: "
            "one, or a list of them"
        )
    return bool(is_list)


def _with_features(dataset: Any) -> pa.Table:
    return dataset.data.table.replace_schema_metadata(dataset.features.arrow_schema.metadata)


def _read_label_names(schema: pa.Schema) -> dict[str, Sequence[str]]:
    """Reads the names of `datasets.ClassLabel` columns, which store numbers."""
    found: dict[str, Sequence[str]] = {}
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        for column, feature in features.items():
            inner = feature[0] if isinstance(feature, list) else feature.get("feature", feature)
            if isinstance(inner, dict) and inner.get("_type") == "ClassLabel":
                found[column] = inner["names"]
    except (KeyError, ValueError, TypeError, AttributeError, IndexError):  # no metadata of `datasets`, or damaged
        pass
    return found


def _name_labels(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_name_labels(entry, names) for entry in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def _cut_first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def _format_path(path: Path | None) -> str | None:
    return None if path is None else str(path)
