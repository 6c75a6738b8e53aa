"""Writes docs/reference/ from the code: configuration, metrics, command line, HTTP API, memory. `make reference`.

`tests/unit/test_docs.py` fails when a page is stale: nothing in that folder is edited by hand.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import annotated_types
import pydantic
from prometheus_client import CollectorRegistry
from pydantic.fields import FieldInfo

if TYPE_CHECKING:
    from vaopd.config.toml import Variants

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "reference"
COLUMNS = 100
NOTE = "<!-- Made by `make reference`; don't edit. -->\n"


def pages() -> dict[str, str]:
    """Returns the text of each page of the folder, by file name."""
    from vaopd.cli.init import make_schema
    from vaopd.config import Config, ServiceConfig

    return {
        "configuration.md": configuration(
            "Configuration of a run",
            "One TOML file per run; `--set section.key=value` overrides a field, and `vaopd up CONFIG --dry-run` "
            "prints the result and checks it.",
            Config,
        ),
        "service.md": configuration(
            "Configuration of the services",
            "`vaopd teacher CONFIG --service FILE`, and so `rollout`, `api` and `up`: settings of the processes, "
            "whatever the job. Each process reads its own section; the trainer has none. Paths are from the file's "
            "folder.",
            ServiceConfig,
        ),
        "metrics.md": metrics(),
        "cli.md": command_line(),
        "http.md": http_api(),
        "memory.md": memory(),
        "run.schema.json": json.dumps(make_schema(), indent=1) + "\n",
    }


# -- configuration -----------------------------------------------------------------------------------------------------


def configuration(title: str, text: str, model: type[pydantic.BaseModel]) -> str:
    """Renders a file's page: a table for each section, and one for each variant of a section."""
    return "\n".join([f"{NOTE}# {title}\n\n{text}\n", *section("", model, dict(model.model_fields))])


def section(
    name: str, model: type[pydantic.BaseModel], fields: dict[str, FieldInfo], *, heading: str = "", words: str = ""
) -> Iterator[str]:
    """Yields a section's own keys, then the sections in it."""
    from vaopd.config.toml import find_section, find_variants

    below = {key: field for key, field in fields.items() if find_section(field) or find_variants(field)}
    rows = [row(f"{name}.{key}".lstrip("."), field) for key, field in fields.items() if key not in below]
    if rows or words:
        yield heading or (f"## [{name}]\n" if name else "## At the top\n")
        yield from [f"{words}\n"] if words else []
        yield from [table(rows)] if rows else []
    for key, field in below.items():
        inner = f"{name}.{key}".lstrip(".")
        if kind := find_section(field):
            yield from section(inner, kind, dict(kind.model_fields), words=first_paragraph(kind))
        elif variants := find_variants(field):
            yield from union(inner, variants)


def union(name: str, variants: Variants) -> Iterator[str]:
    """Yields the keys that all variants have, then each variant with its other keys."""
    tag, members = variants.tag, variants.members
    common = [key for key in members[0].model_fields if all(key in member.model_fields for member in members)]
    values = ", ".join(code(value) for member in members for value in variants.list_tags(member))
    words = " ".join((members[0].model_fields[tag].description or "").split())
    shared = [row(f"{name}.{key}", members[0].model_fields[key]) for key in common if key != tag]
    yield f"## [{name}]\n"
    yield table([(code(f"{name}.{tag}"), values, code(f'"{variants.default}"'), words), *shared])
    for member in members:
        chosen = " or ".join(code(f'{tag} = "{value}"') for value in variants.list_tags(member))
        own = {key: field for key, field in member.model_fields.items() if key not in common}
        words = first_paragraph(member) + ("" if own else " It has no keys of its own.")
        yield from section(name, member, own, heading=f"### With {chosen}\n", words=words.strip())


def first_paragraph(model: type[pydantic.BaseModel]) -> str:
    """Returns the first paragraph of a class's own docstring."""
    return " ".join((vars(model).get("__doc__") or "").partition("\n\n")[0].split())


def row(name: str, field: FieldInfo) -> tuple[str, str, str, str]:
    """Returns the cells of a key: name, type, default and description."""
    if field.is_required():
        default = "required"
    else:
        value = field.get_default(call_default_factory=True)
        default = "–" if value is None or value in ("", {}) else code(toml(value))
    description = " ".join((field.description or "").split())
    return code(name), kind(field.annotation, field.metadata), default, description.replace("|", "\\|")


def toml(value: Any) -> str:
    """Writes a default as TOML does."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str | Path) else str(value)


def kind(annotation: Any, metadata: list[Any]) -> str:
    """Describes a type in words, with its bounds."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind(arguments[0], [*arguments[1:], *metadata])
    if origin is typing.Literal:
        return ", ".join(code(str(value)) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kind(part, metadata) for part in arguments if part is not type(None))
    if origin is tuple:
        distinct = list(dict.fromkeys(kind(part, []) for part in arguments if part is not Ellipsis))
        return "list of " + " and ".join(distinct)
    if origin is dict:
        return "table"
    names = {int: "integer", float: "number", str: "text", bool: "true or false", Path: "path"}
    return " ".join([names.get(annotation, getattr(annotation, "__name__", str(annotation))), *bounds(metadata)])


def bounds(metadata: list[Any]) -> Iterator[str]:
    """Yields the bounds of a number in words."""
    for part in metadata:
        for item in part.metadata if isinstance(part, FieldInfo) else [part]:
            match item:
                case annotated_types.Ge(ge=bound):
                    yield f"≥ {bound}"
                case annotated_types.Gt(gt=bound):
                    yield f"> {bound}"
                case annotated_types.Le(le=bound):
                    yield f"≤ {bound}"


# -- metrics -----------------------------------------------------------------------------------------------------------


def metrics() -> str:
    """Renders the page of the metrics: RUN/metrics.jsonl and Prometheus."""
    from vaopd_trainer import step_numbers as trainer

    def rows(descriptions: dict[str, str]) -> str:
        lines = ["| key | meaning |", "| --- | --- |"]
        return "\n".join([*lines, *(f"| `{key}` | {text} |" for key, text in descriptions.items())]) + "\n"

    parts = [
        f"{NOTE}# Metrics\n",
        "## RUN/metrics.jsonl\n",
        "One JSON object per line. A missing or non-finite number is left out, never 0. The same numbers go to "
        "TensorBoard and the other trackers as `train/KEY`.\n",
        '### `"kind": "train"`, after each step\n',
        "Beside `step`, which counts from 0, and `time_s`, seconds since 1970:\n",
        rows(trainer.DESCRIPTIONS),
        '### `"kind": "eval"`, on the held-out problems\n',
        "`step` is the policy version: the number of steps that had been taken.\n",
        rows(trainer.EVALUATION_DESCRIPTIONS),
        "## Prometheus\n",
        "With `--metrics-address HOST:PORT` each process serves `/metrics`, the API on its own port too: "
        "[Monitoring in production](../monitoring.md). Beside these, each has `process_…`: memory, CPU time, open "
        "files, start time.\n",
    ]
    for name, registry in registries().items():
        parts += [f"### {name}\n", prometheus(registry)]
    return "\n".join(parts)


def registries() -> dict[str, CollectorRegistry]:
    """Returns one registry for each kind of process."""
    from vaopd_api.metrics import Metrics
    from vaopd_rollout.metrics import WorkerMetrics
    from vaopd_teacher.metrics import TeacherMetrics
    from vaopd_trainer.metrics import TrainerMetrics

    return {
        "Teacher": TeacherMetrics().registry,
        "Rollout worker": WorkerMetrics(job="").registry,
        "Trainer": TrainerMetrics(job="", steps=1).registry,
        "API": Metrics().registry,
    }


def prometheus(registry: CollectorRegistry) -> str:
    """Renders a table of a registry's metrics."""
    lines = ["| metric | type | labels | meaning |", "| --- | --- | --- | --- |"]
    for collector in list(registry._collector_to_names):  # the registry has no public list of what was registered
        for metric in collector.describe():  # type: ignore[attr-defined]
            suffix = "_total" if metric.type == "counter" else ""
            names = getattr(metric, "_labelnames", None) or getattr(collector, "_labelnames", ())
            labels = ", ".join(map(code, names))
            lines.append(f"| `{metric.name}{suffix}` | {metric.type} | {labels or '–'} | {metric.documentation} |")
    return "\n".join(lines) + "\n"


# -- command line ------------------------------------------------------------------------------------------------------


def command_line() -> str:
    """Renders the page of the commands, with the help of each."""
    from vaopd.cli import build_parser
    from vaopd.cli.parser import walk

    os.environ["COLUMNS"] = str(COLUMNS)  # argparse breaks its lines there
    parts = [
        f"{NOTE}# Command line\n",
        "The `--help` of every command. Exit codes and conventions: [The command line](../cli.md).\n",
    ]
    for parser in walk(build_parser()):
        help_text = re.sub(r"[ \t]+$", "", parser.format_help(), flags=re.MULTILINE).rstrip()
        parts.append(f"## {parser.prog}\n\n```text\n{help_text}\n```\n")
    return "\n".join(parts)


# -- HTTP --------------------------------------------------------------------------------------------------------------


def http_api() -> str:
    """Renders the page of the HTTP API from its OpenAPI document."""
    from vaopd_api.app import create_app
    from vaopd_api.teachers import Teachers

    document = create_app(
        teachers=Teachers(["127.0.0.1:1"], options={})
    ).openapi()  # makes no call before its first request
    parts = [
        f"{NOTE}# HTTP API\n",
        "How to use it: [the API](../api.md). The running API has the same as OpenAPI, at `/openapi.json`, and a page "
        "at `/docs`.\n",
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(f"## {method.upper()} {path}\n")
            parts.append((operation.get("description") or operation.get("summary", "")).strip() + "\n")
            parts += list(parameters(operation))
            for media, content in operation.get("requestBody", {}).get("content", {}).items():
                parts.append(f"Body, `{media}`: {schema_name(content.get('schema', {}))}.\n")
            answers = (f"{status} {answer['description']}" for status, answer in operation["responses"].items())
            parts.append("Answers: " + "; ".join(answers) + ".\n")
    parts.append("## Objects\n")
    for name, schema in document.get("components", {}).get("schemas", {}).items():
        parts += list(schema_table(name, schema))
    return "\n".join(parts)


def parameters(operation: dict[str, Any]) -> Iterator[str]:
    """Yields a table of a route's parameters."""
    found = operation.get("parameters", [])
    if found:
        rows = [
            f"| `{p['name']}` | {p['in']} | {schema_name(p['schema'])} | {p.get('description', '')} |" for p in found
        ]
        yield "\n".join(["| parameter | in | type | |", "| --- | --- | --- | --- |", *rows]) + "\n"


def schema_table(name: str, schema: dict[str, Any]) -> Iterator[str]:
    """Yields a table of an object's fields."""
    yield f"### {name}\n"
    if text := schema.get("description"):
        yield " ".join(text.split()) + "\n"
    if fields := schema.get("properties"):
        required = schema.get("required", [])
        lines = ["| field | type | | |", "| --- | --- | --- | --- |"]
        for key, value in fields.items():
            text = " ".join(value.get("description", "").split()).replace("|", "\\|")
            lines.append(f"| `{key}` | {schema_name(value)} | {'required' if key in required else ''} | {text} |")
        yield "\n".join(lines) + "\n"


def schema_name(schema: dict[str, Any]) -> str:
    """Describes a type of the OpenAPI document in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for union in ("anyOf", "oneOf", "allOf"):
        if union in schema:
            return " or ".join(dict.fromkeys(schema_name(part) for part in schema[union]))
    if "enum" in schema:
        return ", ".join(code(str(value)) for value in schema["enum"])
    if "const" in schema:
        return code(str(schema["const"]))
    if schema.get("type") == "array":
        return f"list of {schema_name(schema.get('items', {}))}"
    return str(schema.get("type", "any"))


# -- memory ------------------------------------------------------------------------------------------------------------


def memory() -> str:
    """Renders the page of the memory that each process needs."""
    spec = importlib.util.spec_from_file_location("memory_table", ROOT / "benchmarks" / "memory_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return NOTE + str(module.page())


# -- Markdown ----------------------------------------------------------------------------------------------------------


def code(text: str) -> str:
    """Sets a text in backquotes."""
    return f"`{text}`"


def table(rows: list[tuple[str, str, str, str]]) -> str:
    """A table of keys."""
    head = ["| key | type | default | |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *("| " + " | ".join(cells) + " |" for cells in rows)]) + "\n"


def main() -> int:
    """Writes every page."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text)
        print((FOLDER / name).relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
