"""The command line as a user meets it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.data_sets import write_both_splits
from vaopd.cli import main

ROOT = Path(__file__).parents[2]
COMMANDS = ["demo", "up", "train", "teacher", "rollout", "api", "score", "eval", "data", "models", "report"]
COMMANDS += ["ledger", "queue", "keys", "certs", "doctor"]
CONFIG = """
[run]
name = "first"
folder = "{folder}/runs"
[data]
source = "{folder}/data"
[student]
model = "{folder}/tiny-student"
[teacher]
model = "{folder}/tiny-teacher"
address = "127.0.0.1:0"
[api]
address = "127.0.0.1:0"
[trainer]
steps = 10
[queue]
url = "embedded"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(CONFIG.format(folder=tmp_path))
    return path


def make_everything(folder: Path) -> None:
    """What --dry-run looks for: model folders and Parquet files."""
    for model in ("tiny-student", "tiny-teacher"):
        (folder / model).mkdir()
        for name in ("config.json", "tokenizer_config.json"):
            (folder / model / name).write_text("{}")
    write_both_splits(folder / "data")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert [name for name in COMMANDS if not re.search(rf"^  {name} ", shown, re.MULTILINE)] == []


NESTED = ["data handwritten-geometry", "models make", "keys add", "queue retry"]


@pytest.mark.parametrize("command", ["", *COMMANDS, *NESTED])
def test_help_loads_nothing_heavy(command: str) -> None:
    """So it answers at once, and works where torch is not installed."""
    code = (
        "import sys\nfrom vaopd.cli import main\n"
        "try:\n    main(sys.argv[1:] + ['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'grpc', 'numpy', 'pydantic', 'matplotlib', 'fastapi', 'redis'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *command.split()], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("loaded: []\n")


def test_an_error_is_one_clear_line_without_a_traceback(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", str(tmp_path / "nowhere.toml")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("vaopd: configuration ")
    assert "Traceback" not in told
    assert main(["--verbose", "train", str(tmp_path / "nowhere.toml")]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["up", "train", "teacher", "rollout", "api"])
def test_dry_run_prints_the_resolved_configuration(
    command: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_everything(tmp_path)
    redis = ["--set", "queue.url=redis://127.0.0.1:6379/0"] if command in ("train", "rollout") else []
    assert main([command, str(config), "--set", "trainer.steps=99", *redis, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "steps = 99\n" in shown.out
    assert "learning_rate = 1e-06\n" in shown.out  # a default
    assert shown.err == ""
    assert not (tmp_path / "runs").exists()


def test_dry_run_names_all_that_is_missing_with_the_remedy(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny-student").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert main(["up", str(config), "--set", f"api.address={address}", "--dry-run"]) == 1
    port, student, data, teacher = capsys.readouterr().err.splitlines()
    assert re.search(r"student\.model = .*: the folder has no config\.json", student)
    assert re.search(r"data\.source = .*: no such folder", data)
    assert re.search(r"teacher\.model = .*`vaopd models make teacher .*` makes it", teacher)
    assert re.search(rf"api\.address = {address}: Address already in use", port)


def test_a_taken_port_is_named_before_anything_starts(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert main(["up", str(config), "--set", f"teacher.address={address}"]) == 2
        assert "--set teacher.address=127.0.0.1:0 takes a free one" in capsys.readouterr().err
        free = ["--set", "teacher.address=127.0.0.1:0"]
        over_http = ["--set", "weights.transport=http", "--set", f"weights.address={address}"]
        assert main(["up", str(config), *free, *over_http]) == 2
        assert f"weights.address = {address}: Address already in use; --set weights" in capsys.readouterr().err
        first = taken.getsockname()[1] - 1  # the worker's; the teacher's is the next one
        assert main(["up", str(config), *free, "--metrics-port", str(first)]) == 2
        assert "in use; --metrics-port 0 takes a free one" in capsys.readouterr().err
    same = ["--set", f"teacher.address={address}", "--set", f"api.address={address}"]
    assert main(["up", str(config), "--dry-run", *same]) == 1
    assert f"api.address = {address}: teacher.address has it too" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_what_a_process_by_itself_lacks_is_named_before_it_starts(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in ("train", "rollout"):
        assert main([command, str(config), "--dry-run", "--offline"]) == 1
        assert 'queue.url = "embedded" is for `vaopd up`' in capsys.readouterr().err
    monkeypatch.setattr("vaopd.launch.checks.find_version", lambda name: None if name == "bitsandbytes" else "1")
    assert main(["train", str(config), "--dry-run", "--offline", "--set", "trainer.optimizer=adamw_8bit"]) == 1
    assert "needs bitsandbytes; pip install 'vaopd[adamw-8bit]'" in capsys.readouterr().err
    hybrid = ["--set", "trainer.sharding.kind=hybrid", "--set", "trainer.sharding.ranks_per_copy=2"]
    assert main(["up", str(config), "--dry-run", *hybrid, "--set", "trainer.processes=3"]) == 2
    assert "3 ranks are no whole number of copies; set trainer.processes to a multiple of 2" in capsys.readouterr().err


def test_a_run_that_is_there_already_is_not_overwritten(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "metrics.jsonl").touch()
    for command, code in (["up", str(config)], 2), (["up", str(config), "--dry-run"], 1):
        assert main(command) == code
        assert "--resume, or name another one: --set run.name=NAME" in capsys.readouterr().err
    assert main(["up", "--resume", str(tmp_path / "runs" / "frist")]) == 2
    assert "frist: no such folder; RUN is a run's folder" in capsys.readouterr().err


def test_gpus_are_given_by_role(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vaopd.launch.cards import parse_gpus

    assert parse_gpus(["teacher=0,1", "rollout=2", "rollout=3"]) == {"teacher": ("0,1",), "rollout": ("2", "3")}
    assert main(["up", str(config), "--gpus", "student=1"]) == 2
    assert "ROLE out of teacher, rollout, trainer" in capsys.readouterr().err


def test_a_trainer_given_twice_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", str(config), "--gpus", "trainer=0", "--gpus", "trainer=1"]) == 2
    assert "--gpus trainer=0,1, with --set trainer.processes" in capsys.readouterr().err


@pytest.fixture
def four_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An nvidia-smi that shows four cards with a driver that is too old for CUDA 13."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nfor i in 0 1 2 3; do echo "$i, 81559, NVIDIA H100 80GB HBM3, 570.10"; done\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_WORLD_SIZE"):  # accelerate sets the second in the process it is used in
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("four_cards")
def test_auto_places_the_processes_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "configs" / "geometry3k-8b.toml")
    free = ["--set", "teacher.address=127.0.0.1:0", "--set", "api.address=127.0.0.1:0"]
    assert main(["up", recipe, "--gpus", "auto", "--dry-run", *free]) == 0
    printed = capsys.readouterr()
    assert "teacher on card 0: Qwen/Qwen3-VL-8B-Instruct needs 19.6 GiB, 74.1 of a card are usable" in printed.err
    by_hand = "--gpus teacher=0 --gpus rollout=1 --gpus trainer=2,3 --set trainer.processes=2"
    assert f"the same by hand: {by_hand}" in printed.err
    assert tomllib.loads(printed.out)["trainer"]["processes"] == 2
    assert main(["up", recipe, "--gpus", "auto", "--dry-run", *free, "--set", "trainer.processes=1"]) == 0
    assert tomllib.loads(capsys.readouterr().out)["trainer"]["processes"] == 1  # a setting by hand has priority
    assert main(["up", recipe, "--gpus", "auto", "--gpus", "teacher=0"]) == 2
    assert "leave out the other --gpus, or auto" in capsys.readouterr().err


@pytest.mark.usefixtures("four_cards")
def test_a_teacher_of_32b_is_split_over_two_cards(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "configs" / "geometry3k-32b.toml")
    dry = ["--dry-run", "--set", "teacher.address=127.0.0.1:0", "--set", "api.address=127.0.0.1:0"]
    assert main(["up", recipe, "--gpus", "auto", *dry]) == 0
    printed = capsys.readouterr()
    assert "teacher on card 0,1: Qwen/Qwen3-VL-32B-Instruct needs 36.5 GiB of each" in printed.err
    assert "the same by hand: --gpus teacher=0,1 --gpus rollout=2 --gpus trainer=3" in printed.err
    assert tomllib.loads(printed.out)["teacher"]["processes"] == 2
    assert main(["up", recipe, "--gpus", "teacher=0", *dry]) == 2
    assert "teacher.processes = 2 needs a device for each rank, and 1 is given; give 2, or" in capsys.readouterr().err
    smaller = str(ROOT / "configs" / "geometry3k-8b.toml")
    assert main(["up", smaller, "--gpus", "trainer=3", "--set", "trainer.processes=2", *dry]) == 2
    assert "trainer.processes = 2 needs a GPU for each rank, and this process sees 1; give" in capsys.readouterr().err
    assert main(["up", smaller, "--gpus", "teacher=0,1,2", *dry]) == 2
    told = capsys.readouterr().err
    assert "teacher.processes = 3 doesn't divide the 8 key and value heads of Qwen/Qwen3-VL-8B-Instruct" in told
    assert "--set teacher.processes=2, or give the teacher 1, 2, 4, 8 devices" in told


@pytest.mark.parametrize(("options", "message"), [
    ("--gpus teacher=0 --gpus rollout=1 --gpus trainer=2,3", "leaves 1 of 2 devices idle; --set trainer.processes=2"),
    ("--gpus teacher=0 --gpus rollout=1 --gpus rollout=2 --gpus trainer=3", "--set rollout.workers=2, or give fewer"),
    ("--gpus teacher=0 --gpus rollout=1,2 --gpus trainer=3", "engine_options.tensor_parallel_size=2"),
    ("--gpus rollout=1 --gpus trainer=2", "teacher would take card 0, whatever else is on it; add --gpus teacher=DEV"),
    ("--gpus teacher=0 --gpus rollout=1 --gpus trainer=2 --teacher h:1", "--teacher h:1 none; leave out one"),
    ("--gpus teacher=0,0", "'0' is given twice; list each device once"),
    ("--gpus rollout=x", "'x' is neither a number nor GPU-"),
])  # fmt: skip
def test_devices_that_no_process_would_use_are_refused(
    options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["up", str(ROOT / "configs" / "geometry3k-8b.toml"), "--dry-run", "--offline", *options.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("four_cards")
def test_doctor_names_cards_and_what_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    main(["doctor", "configs/geometry3k-8b.toml"])
    told = capsys.readouterr().out
    assert re.search(r"^ok +GPU 3 +NVIDIA H100 80GB HBM3, 79\.6 GiB, driver 570\.10$", told, re.MULTILINE)
    assert re.search(r"^MISS +NVIDIA driver +570\.10: torch for CUDA 13\.0 needs 580$", told, re.MULTILINE)
    placed = r"^ok +geometry3k-8b +teacher on card 0: .*; trainer on card 2,3, the student whole on each: "
    assert re.search(placed, told, re.MULTILINE)
    main(["doctor"])
    assert re.findall(r"^ok +(geometry3k-\w+) ", capsys.readouterr().out, re.MULTILINE) == [
        "geometry3k-4b",
        "geometry3k-8b",
        "geometry3k-32b",
    ]


def test_data_are_made_with_the_sizes_asked_for(tmp_path: Path) -> None:
    sizes = ["--train", "3", "--validation", "2", "--test", "1"]
    assert main(["data", "handwritten-geometry", str(tmp_path / "set"), "--seed", "7", *sizes]) == 0
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [
        "test.parquet",
        "train.parquet",
        "validation.parquet",
    ]


def test_an_unknown_tiny_model_is_answered_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "make", "giant", "unused"]) == 2
    assert "choose one of" in capsys.readouterr().err


def test_doctor_tells_what_is_missing_and_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run where there is no configuration and no model, it says so and how to mend it."""
    monkeypatch.chdir(tmp_path)
    assert main(["doctor"]) == 1
    told = capsys.readouterr().out
    assert re.search(r"^ok +torch +\d", told, re.MULTILINE)
    assert re.search(r"^MISS +demo configuration", told, re.MULTILINE)
    assert "run this in the repository's root" in told
    assert list(tmp_path.iterdir()) == []


def test_doctor_judges_by_the_configuration_that_it_is_given(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_everything(tmp_path)
    main(["doctor", config.name])
    told = capsys.readouterr().out
    assert re.search(r"^ok +models +.*tiny-student, .*tiny-teacher$", told, re.MULTILINE)
    assert f"`vaopd up {config.name}` " in told
    assert "demo" not in told.partition("API port")[0]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        Path("ports.toml").write_text(
            config.read_text().replace('[api]\naddress = "127.0.0.1:0"', f'[api]\naddress = "{address}"')
        )
        main(["doctor", "ports.toml"])
    assert re.search(rf"^note +API port +{address}: Address already in use$", capsys.readouterr().out, re.MULTILINE)
    assert main(["doctor", "none.toml"]) == 1
    assert "`vaopd up none.toml` can't run yet. Missing: configuration" in capsys.readouterr().out
