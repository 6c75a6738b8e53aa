"""`vaopd init`: writes the configuration of a run, with a comment at each key, from options or questions."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import shlex
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaopd.cli.common import Subparsers, find_problems
from vaopd.cli.output import emit, say
from vaopd.cli.parser import bounded
from vaopd.errors import ConfigError, InvalidInput, NotFound, VaopdError
from vaopd.files.durable import write_atomic

if TYPE_CHECKING:
    from vaopd.config import Config

SCHEMA = "vaopd.schema.json"
QUESTIONS = {
    "student": "student, a folder or hub id",
    "teacher": "teacher, a larger model of the same family",
    "data": "data set, a folder or hub id",
}
EXAMPLES = {"data.columns": '{ text = "prompt" }', "data.max_pixels": "1048576"}
SHOWN = (
    "run.name", "run.seed", "data.source", "data.columns", "data.validation_source", "data.validation_split",
    "data.instruction", "data.max_pixels", "student.model", "student.dtype", "teacher.model", "teacher.dtype",
    "teacher.device_map", "objective.variant", "rollout.engine", "rollout.max_new_tokens", "trainer.steps",
    "trainer.prompts_per_step", "trainer.rollouts_per_prompt", "trainer.learning_rate", "trainer.checkpoint_every",
    "trainer.trackers", "evaluation.every", "evaluation.prompts", "queue.url",
)  # fmt: skip
"""The keys that a new file has; those that have their defaults are commented out."""
ROOM = 8192 + 4096
"""The paper's longest prompt and response; a model that can't read so many gets shorter responses."""
LIKELY = {
    "text": ("prompt", "query", "instruction", "input"),
    "images": ("picture", "pictures", "img", "photo", "image_path", "file"),
    "answer": ("label", "solution", "target", "reference", "gt", "reward_model.ground_truth"),
}
"""Names of columns that a data set may have in place of the known ones."""
SPLITS = ("validation", "val", "test")
"""Names that the held-out split may have; verl's is test."""


def add_parsers(subparsers: Subparsers) -> None:
    """Adds `vaopd init`."""
    init = subparsers.add_parser("init", help="write the configuration of a run of your own")
    init.add_argument("file", metavar="FILE", type=Path, nargs="?", default=Path("run.toml"), help="default: run.toml")
    for name, question in QUESTIONS.items():
        init.add_argument(f"--{name}", metavar="MODEL" if name != "data" else "DATASET", help=question)
    init.add_argument("--name", help="the run's name (default: that of FILE)")
    init.add_argument("--steps", type=bounded(int, 1), default=200, help="optimizer steps (default %(default)s)")
    init.add_argument(
        "--cards", metavar="NUMBER[xGIB]", help="cards to plan for, e.g. 8 (of 80 GB) or 2x23.6 (default: this host's)"
    )
    init.add_argument("--force", action="store_true", help="overwrite FILE")
    init.set_defaults(command=_init, extra="trainer")


def _init(arguments: argparse.Namespace) -> int:
    from vaopd.config import Config, validate
    from vaopd.launch.cards import assume_cards, list_cards

    if arguments.file.exists() and not arguments.force:
        raise ConfigError(f"{arguments.file} already exists; name another file, or --force overwrites it")
    for name, question in QUESTIONS.items():
        if getattr(arguments, name) is None and sys.stdin.isatty():
            print(f"{question}: ", end="", file=sys.stderr, flush=True)
            with contextlib.suppress(EOFError):
                setattr(arguments, name, input().strip())
        if not getattr(arguments, name):
            raise ConfigError(f"--{name} is missing: the {question}")
    data, has_answers = _read_data(arguments.data)
    values: dict[str, Any] = {
        "run": {"name": arguments.name or _make_name(arguments.file.stem)},
        "data": {"source": arguments.data, **data},
        "student": {"model": arguments.student},
        "teacher": {"model": arguments.teacher},
        "trainer": {"steps": arguments.steps},
        "queue": {"url": "embedded"},
    }
    if not has_answers:
        values["evaluation"] = {"every": 0}
    if (context := _read_context(arguments.student)) < ROOM:
        values["rollout"] = {"max_new_tokens": int(context // 2)}
    cards = list_cards() if arguments.cards is None else assume_cards(arguments.cards)
    if not cards:
        values["student"]["dtype"] = values["teacher"]["dtype"] = "float32"
        values["teacher"]["device_map"] = "cpu"
    config = validate(Config, values, origin="vaopd init")
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    # Last, since a file that exists is not written again without --force.
    write_atomic(arguments.file.parent / SCHEMA, json.dumps(make_schema(), indent=1) + "\n")
    write_atomic(arguments.file, "\n".join(write_commented(config, values)) + "\n")
    emit(arguments.file)
    for problem in find_problems(config, ("student", "teacher", "data folders")):
        say(problem)
    for line in _describe_fit(arguments.file, cards):
        say(line)
    auto = " --gpus auto" if cards else ""
    file = shlex.quote(str(arguments.file))
    say(f"next: vaopd data check {file}, then vaopd up {file}{auto} --dry-run")
    return 0


def write_commented(config: Config, values: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yields a TOML file's lines: `values` as they are, the other keys of SHOWN as comments, each with its meaning."""
    yield f"#:schema ./{SCHEMA}"
    yield "# Keys that are commented out have their defaults; docs/reference/configuration.md lists all."
    section = ""
    for place in SHOWN:
        name, _, key = place.partition(".")
        if name != section:
            yield f"\n[{name}]"
            section = name
        part = getattr(config, name)
        meaning = " ".join((type(part).model_fields[key].description or "").split())
        given = key in values.get(name, {})
        value = part.model_dump(mode="json", exclude_none=True, exclude_defaults=key == "columns").get(key)
        text = EXAMPLES.get(place, "") if value is None else _to_toml(value)
        yield f"{'' if given else '# '}{key} = {text}".rstrip() + (f"   # {meaning}" if meaning else "")


def _to_toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + "".join(f" {key} = {_to_toml(item)}," for key, item in value.items()).rstrip(",") + " }"
    return json.dumps(value, ensure_ascii=False)


def make_schema() -> dict[str, Any]:
    """Returns the JSON schema of a run's file, for editors: a section that is a union may lack its tag."""
    from vaopd.config import Config

    def relax(node: Any) -> Any:
        if isinstance(node, list):
            return [relax(item) for item in node]
        if not isinstance(node, dict):
            return node
        # A section without its tag fits several variants, and `oneOf` would refuse that.
        return {"anyOf" if key == "oneOf" else key: relax(item) for key, item in node.items() if key != "discriminator"}

    return {"$schema": "http://json-schema.org/draft-07/schema#", **relax(Config.model_json_schema())}


def _make_name(text: str) -> str:
    """Returns a text with only such characters as a run's name may have.

    >>> _make_name("Übung 1")
    'Ubung-1'
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("._-") or "run"


def _read_data(source: str) -> tuple[dict[str, Any], bool]:
    """Reads a folder -> the settings that it needs, and whether it can be evaluated on; a hub id isn't downloaded."""
    from vaopd.config import ColumnsConfig
    from vaopd.data.loaders import open_split
    from vaopd.data.records import recognise
    from vaopd.data.tables import read_split

    if not Path(source).is_dir():
        return {}, True
    named = [name for names in LIKELY.values() for name in names]
    files = read_split(source, "train", None, named=named)
    present = {name for rows in files for name in rows.columns}
    found = {key: name for key, names in LIKELY.items() if (name := next((n for n in names if n in present), None))}
    try:
        recognise(files, source, needs_answer=False)
        found = {key: name for key, name in found.items() if key == "answer" and "answer" not in present}
    except InvalidInput:
        if isinstance(files[0].read(0).get(found.get("text", "")), list):
            found["messages"] = found.pop("text")
        recognise(files, source, columns=ColumnsConfig(**found), needs_answer=False)
    if found:
        say(f"columns: {', '.join(f'{key} = {name}' for key, name in found.items())}; please check them")
    settings: dict[str, Any] = {"columns": found} if found else {}
    problem: VaopdError | None = None
    for split in SPLITS:
        try:
            open_split(source, split=split, columns=ColumnsConfig(**found))
        except NotFound as error:
            problem = problem or error
        except InvalidInput as error:
            problem = error
            break
        else:
            return settings if split == SPLITS[0] else {**settings, "validation_split": split}, True
    say(f"evaluation.every = 0, since there is no validation split with answers ({problem})")
    return settings, False


def _read_context(student: str) -> float:
    """Returns how many tokens a model in a folder can read; infinity for one that isn't here."""
    try:
        config = json.loads((Path(student) / "config.json").read_text())
    except (OSError, ValueError):
        return math.inf
    return float(config.get("text_config", config).get("max_position_embeddings") or math.inf)


def _describe_fit(file: Path, cards: Sequence[Any]) -> Iterator[str]:
    """Yields where the processes would run and what a step would take."""
    from vaopd.config import load_config
    from vaopd.launch.estimate import describe_cost
    from vaopd.launch.placement import place_run

    gpus: dict[str, tuple[str, ...]] = {}
    config = load_config(file)
    if cards:
        try:
            placement = place_run(cards, file)
        except VaopdError as error:
            yield str(error)
        else:
            yield from placement.reasons
            gpus, config = placement.gpus, load_config(file, placement.overrides)
    else:
        yield "this host shows no GPU, so the file is for the CPU; --cards NUMBERxGIB plans for cards"
    yield from describe_cost(config, gpus)
