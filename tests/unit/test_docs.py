"""The documentation against the code: its reference pages, commands, imports, settings and links are real."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.data_sets import write_both_splits
from tests.support.documents import PAGES, ROOT, Block, blocks, script
from vaopd.cli import build_parser, main
from vaopd.config import ServiceConfig, validate
from vaopd.launch.cards import Card

STARTS = ("up", "train", "teacher", "rollout", "api")


def commands(block: Block) -> Iterator[list[str]]:
    """The arguments of each `vaopd` in a block, with the shell's own things and placeholders taken out."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(re.sub(r"\$\w+", "0", line), comments=True)
        starts = [index for index, word in enumerate(words) if word.rpartition("/")[2] == "vaopd"]
        for index in starts[:1]:
            ends = [at for at, word in enumerate(words) if at > index and re.match(r"[>|&;]", word)]
            arguments = words[index + 1 : ends[0] if ends else None]
            yield ["configs/tiny.toml" if word in ("CONFIG", "CONFIG.toml") else word for word in arguments]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a clone's root, with the demo's data and a service's configuration in it."""
    for name in ("configs", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_both_splits(tmp_path / "data" / "handwritten-geometry")
    (tmp_path / "service.toml").write_text("[teacher.sharing]\nweights = { main-run = 3.0 }\n")
    monkeypatch.chdir(tmp_path)
    cards = [Card(index=index, gib=79.1) for index in range(4)]
    monkeypatch.setattr("vaopd.launch.cards.list_cards", lambda: cards)
    return tmp_path


@pytest.mark.parametrize("block", blocks("bash"), ids=lambda block: block.name)
def test_every_command_is_one(block: Block, elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All are parsed; what starts processes also looks whether it could, and starts none."""
    for arguments in commands(block):
        parsed = build_parser().parse_args(arguments)
        if arguments[0] in STARTS and parsed.config is not None and Path(parsed.config).exists():
            here = ("teacher.address=127.0.0.1:0", "api.address=127.0.0.1:0", "queue.url=redis://127.0.0.1:6379/0")
            settings = [word for setting in here for word in ("--set", setting)]
            assert main([*arguments, *settings, "--dry-run", "--offline"]) == 0, capsys.readouterr().err


@pytest.mark.usefixtures("elsewhere")
def test_a_plan_on_a_page_is_the_one_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    plan = re.compile(r"^vaopd (up .* --cards .*)\n```\n\n```text\n([^`]*)```", re.M)
    found = [each for page in PAGES for each in plan.findall(page.read_text())]
    for command, text in found:
        assert main([*shlex.split(command), "--offline"]) == 0
        printed = capsys.readouterr().err.replace("vaopd: ", "")
        assert " ".join(text.split()) in " ".join(printed.split())
    assert found


@pytest.mark.parametrize("block", [b for b in blocks("bash") if b.marker], ids=lambda block: block.name)
def test_what_a_block_says_of_its_test_is_true(block: Block) -> None:
    """ "dry-run" and "parse" are the test above; "none" needs a reason; anything else names test files."""
    if block.marker in ("dry-run", "parse"):
        assert list(commands(block)), "there is no vaopd command in it"
    elif not re.match(r"none, .+", block.marker):
        for name in block.marker.split(", "):
            assert (ROOT / name).is_file()


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.name)
def test_python_in_the_docs_imports_what_there_is(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("vaopd", "services")):
            module = importlib.import_module(node.module or "")
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{node.module} has no {', '.join(missing)}"


@pytest.mark.parametrize("block", blocks("toml"), ids=lambda block: block.name)
def test_toml_in_the_docs_is_sound(block: Block) -> None:
    values = tomllib.loads(block.text)
    if block.text.startswith("# service.toml"):
        validate(ServiceConfig, values, origin=block.name)


def read_without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Files exist, and so do the headings that anchors name, by GitHub's rule."""
    for target, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)#?([^)\s]*)", read_without_code(page)):
        place = page.parent / target if target else page
        assert place.exists(), f"{page.relative_to(ROOT)} links to {target}, which is not there"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", read_without_code(place), re.M)
            names = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in names, f"{page.relative_to(ROOT)} links to {target}#{anchor}, a heading that is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_of_the_code_that_a_page_names_are_there(page: Path) -> None:
    for name in re.findall(
        r"`((?:vaopd|services|tests|benchmarks|examples|deploy|docs)/[\w/.-]+\.\w+)`", page.read_text()
    ):
        assert (ROOT / name).exists(), f"{page.relative_to(ROOT)} names {name}, which is not there"


def test_the_reference_is_what_the_code_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make reference` writes it anew."""
    monkeypatch.setenv("COLUMNS", "100")  # the generator sets it; this takes it back afterwards
    for name, text in script("docs/tools/reference.py").pages().items():
        assert (ROOT / "docs" / "reference" / name).read_text() == text, (
            f"docs/reference/{name} is stale: make reference"
        )
