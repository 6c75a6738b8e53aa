"""deploy/setup.sh on hosts with various Pythons: scripts that answer as each of them would, without a network."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCH = re.findall(r'"torch==([\d.]+)"', (ROOT / "pyproject.toml").read_text())[0]
PYTORCH = "https://download.pytorch.org/whl/cpu"

# Called with `-c CODE`, `-m venv --clear FOLDER` and then, as FOLDER/bin/python, with `-m pip …`, which it writes down.
PYTHON = """#!/bin/sh
case "$*" in
  *version_info*) echo {version} ;;
  *ensurepip*) {ensurepip} ;;
  --version) echo Python {version}.0 ;;
  "-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  "-m pip --version") ;;
  "-m pip index versions torch "*)
    echo "Available versions: 99.0, {torch}"
    case "$*" in *{torch_at}*) echo "Available versions: 99.0, {torch}+cpu, {torch}" ;; esac ;;
  "-m pip "*) echo "$*" >>"{log}" ;;
esac
"""
SHIM = "#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n"


class Host:
    """A PATH with chosen programs, and a folder for the environment."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.venv = folder / "venv"
        self.log = folder / "pip.log"
        self.bin.mkdir()
        for name in ("bash", "dirname", "sed", "tr", "grep", "mkdir", "cp", "rm"):
            found = shutil.which(name)
            assert found, name
            self.bin.joinpath(name).symlink_to(found)
        self.program("uname", "#!/bin/sh\necho Linux x86_64\n")
        self.program("cc", SHIM)
        self.program("ldconfig", "#!/bin/sh\necho 'libnuma.so.1 (libc6,x86-64) => /lib/libnuma.so.1'\n")

    def program(self, name: str, text: str) -> None:
        self.bin.joinpath(name).write_text(text)
        self.bin.joinpath(name).chmod(0o755)

    def python(self, version: str, *, torch_at: str = "", ensurepip: str = "true") -> None:
        """`torch_at`: what pip's arguments must contain for it to list torch's CPU build."""
        text = PYTHON.format(version=version, torch=TORCH, torch_at=torch_at, ensurepip=ensurepip, log=self.log)
        self.program(f"python{version}", text)

    def set_up(self, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [str(ROOT / "deploy" / "setup.sh"), str(self.venv)]
        variables = {"PATH": str(self.bin), **environment}
        return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)

    def installed(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if "install" in line]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_the_first_python_that_works_is_taken_and_named(host: Host) -> None:
    host.program("python3.12", SHIM)
    host.python("3.11")
    host.python("3.13")

    run = host.set_up()

    assert run.returncode == 0, run.stdout + run.stderr
    assert "not python3.12: does not run" in run.stdout
    assert "Python: python3.11 (Python 3.11.0)" in run.stdout
    torch, everything = host.installed()[1:3]
    assert f"install --disable-pip-version-check --no-deps torch=={TORCH}+cpu torchvision==" in torch
    assert everything.endswith("install --disable-pip-version-check --editable .[cpu,dev]")
    assert host.installed()[3].endswith("uninstall --quiet --yes torchaudio torchcodec")


def test_torch_comes_from_pytorch_s_index_when_pip_s_own_have_no_cpu_build(host: Host) -> None:
    host.python("3.12", torch_at=PYTORCH)
    run = host.set_up()
    assert "Python: python3.12 " in run.stdout
    assert f"--extra-index-url {PYTORCH} torch=={TORCH}+cpu" in host.installed()[1]
    assert "--extra-index-url" not in host.installed()[2]


def test_a_python_without_torch_s_wheel_or_without_venv_gives_way_to_the_next(host: Host) -> None:
    host.python("3.12", torch_at="nowhere")
    host.python("3.11", ensurepip="exit 1")
    host.python("3.13")
    run = host.set_up()
    assert f"not python3.12: no torch {TORCH}+cpu for it, neither in pip's indexes nor at {PYTORCH}" in run.stdout
    assert "not python3.11: has no venv; apt install python3.11-venv" in run.stdout
    assert "Python: python3.13 (Python 3.13.0)" in run.stdout


def test_without_a_usable_python_it_says_what_to_install(host: Host) -> None:
    run = host.set_up()
    assert run.returncode == 1
    assert "not python3.13: not installed" in run.stdout
    assert "apt install python3 python3-venv" in run.stdout
    assert not host.venv.exists()


def test_a_named_python_is_the_only_one_tried(host: Host) -> None:
    host.python("3.12")
    host.python("3.10")
    run = host.set_up(PYTHON="python3.10")
    assert run.returncode == 1
    assert "not python3.10: is Python 3.10; 3.11 or newer is needed" in run.stdout
    assert "python3.12 (" not in run.stdout


def test_an_environment_that_works_keeps_its_python(host: Host) -> None:
    host.python("3.11")
    assert host.set_up().returncode == 0
    host.python("3.12")
    run = host.set_up()
    assert run.returncode == 0
    assert f"Python: that of {host.venv} (Python 3.11.0)" in run.stdout


def test_missing_libraries_are_named_before_anything_is_installed(host: Host) -> None:
    host.python("3.12")
    host.program("ldconfig", "#!/bin/sh\n")  # lists nothing
    run = host.set_up()
    assert run.returncode == 1
    assert run.stdout.splitlines()[-1].endswith("apt install libnuma1")
    assert not host.venv.exists()


def test_a_missing_compiler_is_a_note(host: Host) -> None:
    host.python("3.12")
    host.bin.joinpath("cc").unlink()
    run = host.set_up()
    assert run.returncode == 0
    assert "no C compiler" in run.stdout
    assert "apt install gcc" in run.stdout
