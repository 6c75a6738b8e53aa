"""Data sets of a few records."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def write_both_splits(folder: Path) -> None:
    """One question without a picture in each of train and validation."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([{"problem": "What is 1+1?", "answer": "2", "images": []}])
    for split in ("train", "validation"):
        pq.write_table(table, folder / f"{split}.parquet")
