"""Data sets of a few records."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def write_both_splits(folder: Path) -> None:
    """One question without a picture in each of train and validation."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, problem in (("train", "What is 1+1?"), ("validation", "What is 2+0?")):
        table = pa.Table.from_pylist([{"problem": problem, "answer": "2", "images": []}])
        pq.write_table(table, folder / f"{split}.parquet")
