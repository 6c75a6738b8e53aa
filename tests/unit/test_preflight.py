"""The errors of the first ten minutes: each says what happened and what to do, before anything is started."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.support.data_sets import write_both_splits
from tests.support.models import model_folder
from vaopd.cli import main
from vaopd.errors import Unavailable
from vaopd.launch import checks
from vaopd.launch.checks import find_port_problems
from vaopd.process.failures import as_config_error

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run whose models are there and whose data are a folder with both splits."""
    data = tmp_path / "data"
    write_both_splits(data)
    path = tmp_path / "run.toml"
    path.write_text(
        f'[run]\nname = "first"\nfolder = "{tmp_path / "runs"}"\n[data]\nsource = "{data}"\n'
        f'[student]\nmodel = "{model_folder("student")}"\n'
        f'[teacher]\nmodel = "{model_folder("teacher")}"\naddress = "127.0.0.1:0"\ndevice_map = "cpu"\n'
        '[trainer]\nsteps = 1\n[queue]\nurl = "embedded"\n[api]\naddress = "127.0.0.1:0"\n'
    )
    return path


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


def test_a_sound_configuration_has_no_problem(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", str(config), "--dry-run"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", ["up", "train"])
def test_a_tracker_that_is_not_installed(
    command: str, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "find_version", lambda package: None if package == "wandb" else "1.0")
    told = refusal(capsys, command, str(config), "--set", 'trainer.trackers=["tensorboard", "wandb"]')
    assert "trainer.trackers: wandb is not installed; pip install 'vaopd[wandb]', or leave it out" in told


def test_no_gpu(config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "GPU_FILES", (Path("/nowhere/nvidiactl"),))
    told = refusal(capsys, "teacher", str(config), "--set", "teacher.device_map=cuda:0")
    assert "teacher.device_map = cuda:0: this host shows no GPU" in told
    assert "--set teacher.device_map=cpu" in told


def test_every_gpu_that_a_host_may_show_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Windows shows its driver to Linux in one file, /dev/dxg, and has neither of the other two."""
    names = [path.name for path in checks.GPU_FILES]
    assert names == ["nvidiactl", "kfd", "dxg"]
    monkeypatch.setattr(checks, "GPU_FILES", tuple(tmp_path / name for name in names))
    assert not checks.has_gpu()
    for name in names:
        (tmp_path / name).touch()
        assert checks.has_gpu()
        (tmp_path / name).unlink()


def test_a_wrong_path(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refusal(capsys, "up", str(config), "--set", "student.model=/none/student", "--set", "data.source=/none/data")
    assert "student.model = /none/student: no such folder" in told
    assert "data.source = /none/data: no such folder; give a folder" in told
    told = refusal(capsys, "up", str(config), "--set", "student.model=tiny-studen", "--set", "data.source=datum")
    assert f"student.model = tiny-studen: no such folder in {Path.cwd()}, where the command runs, and it is not" in told
    assert f"data.source = datum: no such folder in {Path.cwd()}, where the command runs; give a folder" in told


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"problem": "<image>a", "answer": "1", "images": []}], "record 0, field 'problem': the text has 1 <image>"),
        ([{"prompt": "a", "answer": "1"}], "columns prompt, answer; needed: problem or question"),
        ([], "has no records; give a split that has some"),
        (
            [{"problem": "What is <|im_end|>?", "answer": "1", "images": []}],
            "record 0, field 'problem': the text holds '<|im_end|>', a control token",
        ),
    ],
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_data_that_the_run_refuses(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str, rows: list[object], words: str
) -> None:
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"data/{split}.parquet")
    for command in ("up", "train"):
        assert main([command, str(config), "--dry-run"]) == 1
        shown = capsys.readouterr().err
        assert f"data.source = {tmp_path / 'data'}: " in shown
        assert words in shown


@pytest.mark.parametrize("token", ["<image>", "<|im_start|>"])
def test_an_instruction_with_a_marker_or_control_token(
    config: Path, capsys: pytest.CaptureFixture[str], token: str
) -> None:
    shown = refusal(capsys, "up", str(config), "--set", f"data.instruction=Look at {token}.")
    assert shown.count("the instruction holds ") == 1
    assert token in shown


def test_a_teacher_with_another_tokenizer(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(model_folder("teacher"), other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    first, second = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)[:2]
    tokenizer["model"]["vocab"] |= {first: 1, second: 0}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    told = refusal(capsys, "up", str(config), "--set", f"teacher.model={other}")
    assert f"id 0 is {first!r} in one and {second!r} in the other" in told or (
        f"id 0 is {second!r} in one and {first!r} in the other" in told
    )
    assert "use models of one family" in told


def test_no_vllm(config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_version", lambda package: None)
    told = refusal(capsys, "rollout", str(config))
    assert "vLLM is not installed" in told
    assert "--set rollout.engine=transformers" in told


def test_no_redis(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`vaopd up` tells at once, and the password of the address never."""
    told = refusal(capsys, "up", str(config), "--set", "queue.url=redis://:s3cret@127.0.0.1:1/0")
    assert "queue.url: Redis at 127.0.0.1:1 can't be reached (Connection refused); start it, or let" in told
    assert "--set queue.url=embedded" in told
    assert "s3cret" not in told


def test_a_process_that_waited_for_redis_in_vain_says_where() -> None:
    from vaopd.queue import TrainerQueue

    queue = TrainerQueue(url="redis://127.0.0.1:1/0", job="first", patience_s=0.0)
    with pytest.raises(
        Unavailable, match=r"Redis at 127\.0\.0\.1:1 did not answer .*is it up, and reachable from here\?"
    ):
        queue.acquire()


@pytest.mark.parametrize(
    ("role", "error", "what", "remedy"),
    [
        ("trainer", torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), "out of memory", "data.max_pixels"),
        ("teacher", torch.OutOfMemoryError("CUDA out of memory."), "out of memory", "teacher.batch_tokens"),
        ("rollout", RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory", "max_model_len"),
        ("teacher", AssertionError("Torch not compiled with CUDA enabled"), "no GPU can be used", "vaopd doctor"),
        ("rollout", ModuleNotFoundError("No module named 'vllm'", name="vllm"), "vLLM is not installed", "pip install"),
        ("rollout", RuntimeError("Engine core initialization failed. See root cause above."), "lines above", "memory"),
    ],
)  # fmt: skip
def test_what_libraries_raise_in_words(role: str, error: Exception, what: str, remedy: str) -> None:
    told = str(as_config_error(error, role))
    assert what in told
    assert remedy in told


def test_a_rank_that_lost_another_hides_no_reason_of_it() -> None:
    """Its traceback took all of the log's end that is shown; it may be cured by a resume, as a kill may."""
    gloo = "[/__w/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:60632"
    told = as_config_error(RuntimeError(f"{gloo}. This is typically caused by a crash.\nGLHF!"), "trainer")
    assert isinstance(told, Unavailable)
    assert str(told).startswith("another rank has ended, and its own lines say why ([/__w/")
    assert "GLHF" not in str(told)


def test_an_unknown_error_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="something else"):
        as_config_error(RuntimeError("something else"), "trainer")


def test_a_trainer_out_of_memory_ends_with_one_line(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: object, **__: object) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("vaopd_trainer.compose.run", run)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["trainer", "--config", str(config)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("vaopd_trainer", run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("trainer: out of memory (CUDA out of memory.")


def test_an_address_of_another_host_has_no_free_port_here() -> None:
    (told,) = find_port_problems({"api.address": "192.0.2.1:8080"})
    assert told.endswith("Cannot assign requested address; --set api.address=127.0.0.1:0 takes a free one")
