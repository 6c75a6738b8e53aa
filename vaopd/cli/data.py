"""`vaopd data`: makes the demo's data set, checks a data set as a run would read it, and converts one."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaopd.cli.common import Subparsers, add_set_argument, make_progress
from vaopd.cli.output import emit
from vaopd.errors import ConfigError, InvalidInput, NotFound
from vaopd.files.hub import read_control_tokens

if TYPE_CHECKING:
    from vaopd.data.loaders import Prompts
    from vaopd.data.problems import CheckedSplit

SHOWN = 20
"""So many bad records of a split are printed; --json has all."""
SPLITS = ("train", "validation", "test")
OTHER_SPLITS = ("val", "dev")
"""Names that data sets also give their validation split; a run needs `data.validation_split` for these."""


def add_parsers(subparsers: Subparsers) -> None:
    """Adds `vaopd data`."""
    data = subparsers.add_parser("data", help="make, check or convert a data set").add_subparsers(
        required=True, metavar="ACTION"
    )
    for name, drawn in (
        ("handwritten-geometry", "geometry problems with scans of handwritten digits"),
        ("handwritten-cards", "five handwritten digits with long answers about one of them"),
    ):
        problems = data.add_parser(name, help=f"draw {drawn}; Parquet in Geometry3K's schema")
        problems.add_argument("folder", metavar="FOLDER", type=Path, help="the folder to write to")
        problems.add_argument("--seed", type=int, default=0, help="seed of the drawing (default 0)")
        for split, number in (("train", 4000), ("validation", 300), ("test", 600)):
            what = {"train": "training"}.get(split, split)
            problems.add_argument(
                f"--{split}", type=int, default=number, metavar="N", help=f"{what} problems (default {number})"
            )
        problems.set_defaults(command=_make_problems, data_set=name, extra="tiny")

    check = data.add_parser("check", help="read every record as a run would, and name those that can't be used")
    check.add_argument(
        "source", metavar="CONFIG|DATASET", help="a run's TOML file, or a folder or hub id of a data set"
    )
    add_set_argument(check)
    check.add_argument(
        "--model", metavar="MODEL", help="for DATASET: count tokens and find control tokens as this model does"
    )
    check.add_argument("--json", action="store_true", help="print JSON, with every bad record")
    check.set_defaults(command=_check, extra="trainer")

    convert = data.add_parser("convert", help="write a data set as Parquet with its pictures, which needs no settings")
    convert.add_argument("source", metavar="DATASET", help="a folder or hub id")
    convert.add_argument("folder", metavar="FOLDER", type=Path, help="the folder to write to")
    convert.set_defaults(command=_convert, extra="trainer")
    for parser in (check, convert):
        parser.add_argument(
            "--split",
            action="append",
            metavar="SPLIT",
            help="a split of DATASET (repeatable; default: those of train, validation, test, val and dev that it has)",
        )
        parser.add_argument("--subset", default="", metavar="NAME", help="the configuration of a hub id")
        parser.add_argument(
            "--column",
            action="append",
            default=[],
            metavar="KEY=NAME",
            help="a column of DATASET: text, images, answer, id, system or messages, e.g. --column text=prompt "
            "(repeatable)",
        )


def _make_problems(arguments: argparse.Namespace) -> int:
    from vaopd.data import handwritten_cards, handwritten_geometry

    write = {"handwritten-geometry": handwritten_geometry.write, "handwritten-cards": handwritten_cards.write}
    sizes = {split: getattr(arguments, split) for split in SPLITS}
    write[arguments.data_set](arguments.folder, seed=arguments.seed, **sizes)
    emit(arguments.folder)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    is_config = arguments.source.endswith(".toml")
    for name in ("split", "subset", "column", "model") if is_config else ("overrides",):
        if getattr(arguments, name):
            option, kind = ("--set", "CONFIG") if name == "overrides" else (f"--{name}", "DATASET")
            raise ConfigError(f"{option} is for a {kind}, and {arguments.source} is none; leave {option} out")
    splits = list(_check_config(arguments) if is_config else _check_data_set(arguments))
    if arguments.json:
        emit(json.dumps({"splits": [_describe(split) for split in splits]}, indent=2))
    else:
        emit("\n\n".join("\n".join(_format(split)) for split in splits))
    return 1 if any(split.faults for split in splits) else 0


def _check_config(arguments: argparse.Namespace) -> Iterator[CheckedSplit]:
    """Yields a run's training problems, with those that are held out as faults, and its held-out problems."""
    from vaopd.config import load_config
    from vaopd.data.problems import check_held_out, check_training

    config = load_config(arguments.source, arguments.overrides)
    training = check_training(config, make_report=make_progress)
    if config.evaluation.every == 0:
        yield training
        return
    held_out = check_held_out(config, make_report=make_progress)
    yield training.without_problems_of(held_out)
    yield held_out


def _check_data_set(arguments: argparse.Namespace) -> Iterator[CheckedSplit]:
    from vaopd.data.measures import Meter
    from vaopd.data.problems import check_split

    control_tokens = read_control_tokens(arguments.model) if arguments.model else []
    meter = Meter(arguments.model) if arguments.model else None
    for prompts in _open_splits(arguments, control_tokens):
        yield check_split(prompts, control_tokens=control_tokens, meter=meter, make_report=make_progress)


def _open_splits(arguments: argparse.Namespace, control_tokens: Sequence[str]) -> Iterator[Prompts]:
    """Yields the splits that are asked for, or all that there are; only those for evaluation need answers."""
    from vaopd.config import ColumnsConfig, validate
    from vaopd.data.loaders import open_split

    if wrong := [column for column in arguments.column if "=" not in column]:
        raise ConfigError(f"--column {wrong[0]!r} is not of the form KEY=NAME, e.g. text=prompt")
    names = dict(column.partition("=")[::2] for column in arguments.column)
    found, reason = False, ""
    for name in arguments.split or (*SPLITS, *OTHER_SPLITS):
        try:
            yield open_split(
                arguments.source,
                split=name,
                control_tokens=control_tokens,
                subset=arguments.subset,
                columns=validate(ColumnsConfig, dict(names), origin="--column"),
                needs_answer=name != "train",
            )
            found = True
        except NotFound as error:
            if arguments.split:
                raise
            reason = reason or str(error)
    if not found and not arguments.split:
        raise NotFound(f"none of the splits {', '.join((*SPLITS, *OTHER_SPLITS))}: {reason}")


def _convert(arguments: argparse.Namespace) -> int:
    from vaopd.data.convert import write_split

    for prompts in _open_splits(arguments, ()):
        if faults := prompts.find_faults():
            raise InvalidInput(f"{prompts.describe_faults(faults)}; `vaopd data check` lists all")
        file = arguments.folder / f"{prompts.split}.parquet"
        if file.exists():
            raise ConfigError(f"{file} already exists; name another FOLDER, or remove the file first")
        answers = _count_answers(len(prompts), prompts.count_without_answer())
        emit(f"{file}: {write_split(prompts, file)} records{answers}")
    return 0


def _count_answers(records: int, missing: int) -> str:
    return f", {missing} of {records} without an answer that can be compared with" if missing else ""


def _describe(split: CheckedSplit) -> dict[str, Any]:
    """Returns a split's check as JSON has it."""
    tokens = [found.tokens for found in split.measured.values() if found.tokens is not None]
    sizes = [size for found in split.measured.values() for size in found.sizes]
    return {
        "source": split.prompts.source,
        "split": split.prompts.split,
        "records": split.total,
        "usable": len(split.prompts),
        "without_answer": split.prompts.count_without_answer(),
        "pictures": len(sizes),
        "prompt_tokens": _spread(tokens),
        "pixels": _spread([width * height for width, height in sizes]),
        "duplicates": [{"record": index, "same_as": earlier} for index, earlier in split.list_duplicates()],
        "bad_by_kind": split.count_faults(),
        "bad": [
            {"record": fault.index, "kind": fault.kind, "field": fault.field, "message": fault.message}
            for fault in split.faults
        ],
    }


def _spread(values: Sequence[int]) -> dict[str, float] | None:
    """Returns lowest, median and highest; None where there is no value."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)} if values else None


def _format(split: CheckedSplit) -> Iterator[str]:
    """Yields the lines on a split."""
    shown = _describe(split)
    yield f"{shown['source']}, {split.prompts.name}: {split.total} records, {len(split.faults)} of them bad"
    if answers := _count_answers(shown["usable"], shown["without_answer"]):
        yield f"  answers        {answers[2:]}; the report has no verdict on these"
    if lengths := shown["prompt_tokens"]:
        yield "  prompt tokens  min {min}, median {median:g}, max {max}; image tokens included".format(**lengths)
    by_area = sorted(
        (size for found in split.measured.values() for size in found.sizes), key=lambda size: size[0] * size[1]
    )
    if by_area:
        low, middle, high = (f"{w}×{h}" for w, h in (by_area[0], by_area[len(by_area) // 2], by_area[-1]))
        yield f"  pictures       {len(by_area)}: smallest {low}, median {middle}, largest {high} px"
    if duplicates := split.list_duplicates():
        pairs = ", ".join(f"{index} = {earlier}" for index, earlier in duplicates[:10])
        yield f"  duplicates     {len(duplicates)}: records {pairs}{' …' if len(duplicates) > 10 else ''}"
    for kind, count in split.count_faults().items():
        yield f"  bad: {kind:<14} {count:>6}   {split.list_first(kind)}"
    for fault in split.faults[:SHOWN]:
        yield f"  {split.prompts.split}, {fault}"
    if len(split.faults) > SHOWN:
        yield f"  … and {len(split.faults) - SHOWN} more; --json prints all"
