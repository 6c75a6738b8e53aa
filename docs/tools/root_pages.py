"""A mkdocs hook: adds the root's pages and the decisions to the site, and turns links to code into plain text."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = ("SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md")
LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Adds the decisions and the existing root pages at the end of the navigation."""
    decisions = sorted((ROOT / "docs" / "decisions").glob("*.md"), reverse=True)
    config.nav += [
        {"Decisions": [f"decisions/{path.name}" for path in decisions]},
        {"Project": [name for name in PAGES if (ROOT / name).exists()]},
    ]
    return config


def on_files(files: Files, *, config: Any) -> Files:
    for name in PAGES:
        if (ROOT / name).exists():
            files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    name = page.file.src_uri
    # Where the page's links start from: a page from the root stands one folder higher than in the site.
    folder = "" if name in PAGES else os.path.join("docs", os.path.dirname(name))

    def inside(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        path = os.path.normpath(os.path.join(folder, target))
        in_site = path if path in PAGES else path.removeprefix("docs/") if path.startswith("docs/") else None
        if in_site is None or (in_site.endswith(".md") and files.get_file_from_path(in_site) is None):
            return str(text)
        return f"[{text}]({os.path.relpath(in_site, os.path.dirname(name) or '.')}{anchor or ''})"

    return LINK.sub(inside, markdown)
