"""Writes a data set in the form that needs no settings: one Parquet file a split, pictures inside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vaopd.data.loaders import Prompts
from vaopd.data.records import IMAGE_MARKER
from vaopd.errors import InvalidInput
from vaopd.files.durable import atomic_file
from vaopd.types import Message, Prompt, TextPart, images_in_order

ROWS = 256
"""Records that are in memory at once."""


def write_split(prompts: Prompts, file: Path) -> int:
    """Writes a split with Geometry3K's columns, `messages` in place of `problem` where turns need it -> records.

    Raises InvalidInput for a record that can't be read; nothing is left then.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    has_turns = len(prompts) > 0 and len(prompts[0].messages) > 1
    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    text = ("messages", pa.list_(turn)) if has_turns else ("problem", pa.string())
    schema = pa.schema([("id", pa.string()), text, ("answer", pa.string()), ("images", pa.list_(picture))])
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as handle, pq.ParquetWriter(handle, schema) as writer:
        for start in range(0, len(prompts), ROWS):
            rows = [_make_row(prompt, text[0]) for prompt in _take(prompts, start)]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    return len(prompts)


def _take(prompts: Prompts, start: int) -> Iterator[Prompt]:
    return (prompts[index] for index in range(start, min(start + ROWS, len(prompts))))


def _make_row(prompt: Prompt, text: str) -> dict[str, Any]:
    turns = [{"role": message.role, "content": _write_text(message)} for message in prompt.messages]
    if text == "problem" and len(turns) > 1:
        raise InvalidInput(f"record {prompt.prompt_id} has several turns and the first one has not; split the data set")
    images = images_in_order(prompt.messages, prompt.images)
    return {
        "id": prompt.prompt_id,
        text: turns if text == "messages" else turns[0]["content"],
        "answer": prompt.answer or None,
        "images": [{"bytes": image.data, "path": None} for image in images],
    }


def _write_text(message: Message) -> str:
    return "".join(part.text if isinstance(part, TextPart) else IMAGE_MARKER for part in message.content)
