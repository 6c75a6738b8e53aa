"""The wheel: its names in site-packages, its data files, and what commands say where an extra is not installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vaopd.process.extras import ROLES, explain_missing_module, find_missing_packages, list_packages

ROOT = Path(__file__).parents[2]
SOURCES = ("vaopd", "services")


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The files of a wheel that is built from the tracked sources."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", *SOURCES], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in (*tracked.stdout.split(), "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    subprocess.run([*command, str(folder / "source")], check=True, capture_output=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        return file.namelist()


@pytest.mark.slow
def test_only_our_own_names_lie_in_site_packages(names: list[str]) -> None:
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"vaopd", "vaopd_api", "vaopd_rollout", "vaopd_teacher", "vaopd_trainer"}


@pytest.mark.slow
def test_every_tracked_file_of_the_packages_is_in_the_wheel(names: list[str]) -> None:
    tracked = subprocess.run(["git", "ls-files", *SOURCES], cwd=ROOT, capture_output=True, text=True, check=True)
    wanted = {name.removeprefix("services/") for name in tracked.stdout.split()}
    assert wanted <= set(names)


SCORE = "score --image services/vaopd_api/page/examples/triangle.png --question q"
COMMANDS = {
    "demo": "services,tiny",
    "up configs/tiny.toml": "services",
    "train configs/tiny.toml": "trainer",
    "teacher configs/tiny.toml": "teacher",
    "api configs/tiny.toml": "api",
    "rollout configs/tiny.toml --set rollout.engine=transformers --set queue.url=redis://127.0.0.1:1": "rollout",
    "eval configs/tiny.toml --set rollout.engine=transformers": "trainer",
    f"{SCORE} --generate --student models/tiny-student": "model",
    "data handwritten-geometry {folder}/data": "tiny",
    "models make student {folder}/model": "tiny",
    "certs {folder}/certs": "certs",
    "queue dead --job j": "queue",
    # Those that the base installation can do; there is nothing in the folder, and no teacher.
    f"{SCORE} --response r --teacher 127.0.0.1:1": None,
    "report {folder}": None,
    "watch {folder} --once": None,
    "ledger {folder}": None,
    "keys list": None,
    "doctor": None,
}
"""Each command with the extra that it names, where the base installation lacks what it needs."""

# A base installation, for a command and for the process that it becomes: what extras bring can't be imported.
SITECUSTOMIZE = """
import importlib.metadata, sys

ABSENT = {absent!r}
MODULES = {{"grpc_health", "grpc_reflection", "multipart", "python_multipart", *(
    name.replace("-", "_") for name in ABSENT
)}}
version = importlib.metadata.version

def version_if_there(name):
    if name in ABSENT:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in MODULES:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

importlib.metadata.version = version_if_there
sys.meta_path.insert(0, Absent())
"""


@pytest.mark.parametrize(("command", "extra"), COMMANDS.items(), ids=[name.split()[0] for name in COMMANDS])
def test_a_command_without_its_extra_says_so_in_a_line(command: str, extra: str | None, tmp_path: Path) -> None:
    absent = sorted({name for extra in ("services", "tiny", "http") for name in list_packages(extra)})
    assert {"torch", "redis", "trustme"} <= set(absent), "the installed metadata is not pyproject.toml's"
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE.format(absent=absent))
    (tmp_path / "empty").mkdir()
    argv = [part.format(folder=tmp_path / "empty") for part in command.split()]
    path = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "services")))
    done = subprocess.run(
        [sys.executable, "-m", "vaopd.cli", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=120,
    )
    assert "Traceback" not in done.stderr
    if extra is not None:
        assert done.returncode == 2
        assert f"pip install 'vaopd[{extra}]'" in done.stderr.splitlines()[-1]


def test_every_role_is_complete_here() -> None:
    assert {role: find_missing_packages(role) for role in ROLES} == dict.fromkeys(ROLES, ())


def test_the_command_s_own_extra_is_named_where_it_has_the_module() -> None:
    error = ModuleNotFoundError("No module named 'torch'", name="torch")
    assert explain_missing_module(error, "teacher") == "torch is not installed; pip install 'vaopd[teacher]'"
    assert explain_missing_module(error, "certs") == "torch is not installed; pip install 'vaopd[model]'"


def test_a_module_of_ours_or_a_part_of_an_installed_package_is_not_explained() -> None:
    for name in ("vaopd.pb", "torch.nn.somewhere", "nothing_of_the_kind"):
        assert explain_missing_module(ModuleNotFoundError(name=name), "teacher") is None
