"""The documentation's pages and their fenced blocks."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
# Decisions tell how things were on their day.
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "models" / "README.md")
    if "decisions" not in path.parts and ("reference" not in path.parts or path.name == "memory.md")
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block; `marker` is what `<!-- test: … -->` before it says."""

    page: Path
    line: int
    language: str
    text: str
    marker: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(language: str) -> list[Block]:
    pattern = re.compile(r"(?:<!-- test: (?P<marker>.*?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```", re.M | re.S)
    return [
        Block(
            page=page,
            line=page.read_text()[: match.start("text")].count("\n") + 1,
            language=match["language"],
            text=match["text"],
            marker=match["marker"] or "",
        )
        for page in PAGES
        for match in pattern.finditer(page.read_text())
        if match["language"] == language
    ]


def shell_commands(block: Block) -> Iterator[str]:
    """Each command of a bash block, as a shell takes it: with its here-document, and loops whole."""
    lines: list[str] = []
    end = ""
    for line in block.text.replace("\\\n", " ").splitlines():
        lines.append(line)
        if not end and (document := re.search(r"<<(\w+)$", line)):
            end = document[1]
        elif not end and line.startswith("for "):
            end = "done"
        elif line.strip() == end:
            end = ""
        command = "\n".join(lines)
        if not end:
            lines = []
            if command.strip() and not command.startswith("#"):
                yield command


def script(path: str) -> ModuleType:
    """A script that is in no package, loaded as a module; `path` from the project's folder."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
