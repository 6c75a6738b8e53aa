"""Nothing here runs what it was sent: a walk over the syntax tree of all code that users run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path for folder in ("vaopd", "services", "deploy", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)

# Reading these formats can run code that is in the data; writing them asks others to.
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve"}
CALLS = {
    *("torch.load", "torch.save", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load"),
    *("pandas.read_pickle", "pandas.to_pickle"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
}
BUILTINS = {"eval", "exec", "compile", "__import__"}
ARGUMENTS = {"trust_remote_code", "shell", "allow_pickle"}
"""Keywords that may only be False."""
METHODS = {"save_state", "all_gather_object", "gather_object", "broadcast_object_list"}
"""Of accelerate and torch.distributed: they pickle inside."""


def findings(source: str) -> Iterator[str]:
    tree = ast.parse(source)
    names = _imported_names(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=imported):
                yield from (alias.name for alias in imported if alias.name.partition(".")[0] in MODULES)
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in MODULES:
                yield module
            case ast.Attribute(attr=method) if method in METHODS:
                yield method
            case ast.Attribute() | ast.Name() if (full := _full_name(node, names)) in CALLS:
                yield full
            case ast.Call(func=ast.Name(id=name)) if name in BUILTINS:
                yield name
        if isinstance(node, ast.Call):
            yield from (
                f"{keyword.arg}={ast.unparse(keyword.value)}"
                for keyword in node.keywords
                if keyword.arg in ARGUMENTS and not _is_false(keyword.value)
            )
        if isinstance(node, ast.Dict):
            yield from (
                f"{key.value}: {ast.unparse(value)}"
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant) and key.value in ARGUMENTS and not _is_false(value)
            )


def _imported_names(tree: ast.AST) -> dict[str, str]:
    """Local name -> what it stands for: {"np": "numpy", "load": "torch.load"}."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]  # `import torch.nn` binds "torch"
                names[alias.asname or first] = alias.name if alias.asname else first
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _full_name(node: ast.expr, names: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := _full_name(node.value, names)) is not None:
        return f"{owner}.{node.attr}"
    return None


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_there_is_something_to_walk_over() -> None:
    assert len(FILES) > 100


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_reads_code_as_data_or_runs_a_shell(path: Path) -> None:
    assert list(findings(path.read_text())) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("import torch\ntorch.load('x', weights_only=True)", "torch.load"),
        ("import torch as t\nread = t.load", "torch.load"),
        ("from torch import load as read\nread('x')", "torch.load"),
        ("import yaml\nyaml.load(text, Loader=yaml.SafeLoader)", "yaml.load"),
        ("AutoModel.from_pretrained(name, trust_remote_code=True)", "trust_remote_code=True"),
        ("options = {'trust_remote_code': flag}", "trust_remote_code: flag"),
        ("import subprocess\nsubprocess.run(line, shell=True)", "shell=True"),
        ("import os\nos.system(line)", "os.system"),
        ("import numpy as np\nnp.load(path, allow_pickle=True)", "allow_pickle=True"),
        ("eval(text)", "eval"),
        ("accelerator.save_state(folder)", "save_state"),
    ],
)
def test_the_walk_finds(source: str, found: str) -> None:
    assert list(findings(source)) == [found]


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import yaml\nyaml.safe_load(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=False)",
        "import json\njson.load(file)",
        "import re\nre.compile('x')",
    ],
)
def test_the_walk_leaves_alone(source: str) -> None:
    assert list(findings(source)) == []
