"""How the command line treats people: results alone on standard output, the nearest word, a file to begin with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prometheus_client import start_http_server

from tests.support.data_sets import write_both_splits
from tests.support.runs import make_run
from vaopd.access.certificates import add_client, make_certificates
from vaopd.cli import GROUPS, build_parser, main
from vaopd.cli.init import make_schema
from vaopd.config import load_config
from vaopd.data.loaders import load_prompts
from vaopd.errors import ConfigError
from vaopd.types import TextPart

ROOT = Path(__file__).parents[2]


def test_what_libraries_print_never_reaches_standard_output() -> None:
    """By whichever way: Python's print, the file descriptor, a child, a stream that was looked up meanwhile."""
    code = """
import logging, os, subprocess, sys
from vaopd.cli import output
with output.reserve_stdout():
    print("noise"); os.write(1, b"noise\\n"); subprocess.run(["echo", "noise"])
    logging.basicConfig(stream=sys.stdout); logging.warning("noise")
    output.emit('{"accuracy": 0.5}')
logging.warning("noise")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == '{"accuracy": 0.5}\n'
    assert done.stderr.count("noise") == 5


def test_a_terminal_without_utf_8_gets_what_it_can_show() -> None:
    code = "from vaopd.cli import output\nwith output.reserve_stdout():\n    output.emit('mean VA \u2588')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=environment) == "mean VA ?\n"


def test_without_a_command_it_shows_all_of_them_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert [line.rstrip(":") for line in shown.splitlines() if line.rstrip(":") in GROUPS] == list(GROUPS)
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(
        build_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr, arg-type]
    )


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["evla"], "'evla' is unknown; did you mean eval?"),
        (["data", "chekc"], "'chekc' is unknown; did you mean check?"),
        (["up", "run.toml", "--offlin"], "unrecognized arguments: --offlin; did you mean --offline?"),
        (["train", "run.toml", "--step=3"], "unrecognized arguments: --step=3"),
        # An option that would have no effect.
        (["up", "run.toml", "--offline"], "--offline has no effect without --dry-run"),
        (["up", "run.toml", "--accept-teacher"], "--accept-teacher has no effect without --resume"),
        (["report", "runs/a", "--out", "a.html"], "--out has no effect without --figures"),
        (["report", "runs/a", "--figures", "--band", "standard-error"], "--band has no effect with --figures"),
        (["report", "runs/a", "--output", "a.html", "--plot", "a.png"], "not allowed with argument"),
        (["score", "--question", "a", "--response", "b", "--seed", "3"], "--seed has no effect without --generate"),
        (["eval", "run.toml", "--samples", "3"], "--samples has no effect without --benchmark"),
        (["eval", "--benchmark", "all", "--judge-model", "m"], "--judge-model has no effect without --judge-url"),
        (["eval", "--benchmark", "all", "--dry-run"], "--dry-run has no effect with --benchmark"),
        (["certs", "folder", "--client", "a", "--host", "b"], "--host has no effect with --client"),
        # A number out of its bounds.
        (["demo", "--steps", "0"], "--steps: '0' is not a whole number from 1 up"),
        (["up", "run.toml", "--metrics-port", "70000"], "'70000' is not a whole number from 0 to 65535"),
        (["watch", "runs/a", "--every", "nan"], "--every: 'nan' is not a number from 0.1 up"),
        (["keys", "add", "job", "--expires", "soon"], "--expires: 'soon' is not a number from 0.0 up"),
    ],
)
def test_a_word_that_is_wrong_or_in_vain_is_named(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    assert hint in capsys.readouterr().err


def test_init_writes_a_file_that_is_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With names of columns that it finds, and no evaluation where there are no answers to compare with."""
    data, file = tmp_path / "own", tmp_path / "first.toml"
    data.mkdir()
    record = {"prompt": "Where?", "picture": [], "label": "here"}
    data.joinpath("train.jsonl").write_text(json.dumps(record) + "\n")
    models = ["--student", str(ROOT / "models/tiny-student"), "--teacher", str(ROOT / "models/tiny-teacher")]
    assert main(["init", str(file), *models, "--data", str(data), "--steps", "7"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{file}\n"
    assert "columns: text = prompt, images = picture, answer = label; please check them" in shown.err
    config = load_config(file)
    assert (config.run.name, config.trainer.steps, config.evaluation.every) == ("first", 7, 0)
    assert config.data.columns.model_dump(exclude_defaults=True) == {
        "text": "prompt", "images": "picture", "answer": "label",
    }  # fmt: skip
    assert config.rollout.max_new_tokens == 512  # half of what the tiny student can read
    lines = file.read_text().splitlines()
    assert lines[0] == "#:schema ./vaopd.schema.json"
    assert "# prompts_per_step = 16   # B (paper: 16)." in lines
    jsonschema.validate(tomllib.loads(file.read_text()), json.loads((tmp_path / "vaopd.schema.json").read_text()))
    assert main(["init", str(file)]) == 2
    assert "already exists" in capsys.readouterr().err


TURNS = [{"role": "user", "content": "Where?"}]


@pytest.mark.parametrize(("split", "record", "columns"), [
    ("validation", {"prompt": TURNS, "images": [], "solution": "3"},
     {"messages": "prompt", "answer": "solution"}),  # TRL
    ("test", {"prompt": TURNS, "images": [], "reward_model": {"style": "rule", "ground_truth": "3"}},
     {"messages": "prompt", "answer": "reward_model.ground_truth"}),  # verl
    ("validation", {"messages": TURNS, "images": [], "solution": "3"}, {"answer": "solution"}),  # ms-swift
])  # fmt: skip
def test_init_reads_the_data_of_other_trainers(
    split: str, record: dict[str, object], columns: dict[str, str], tmp_path: Path
) -> None:
    table = pa.Table.from_pylist([record], schema=pa.Table.from_pylist([{**record, "images": [b""]}]).schema)
    for name in ("train", split):
        pq.write_table(table, tmp_path / f"{name}.parquet")
    models = ["--student", str(ROOT / "models/tiny-student"), "--teacher", str(ROOT / "models/tiny-teacher")]
    assert main(["init", str(tmp_path / "run.toml"), *models, "--data", str(tmp_path)]) == 0
    config = load_config(tmp_path / "run.toml")
    assert config.data.columns.model_dump(exclude_defaults=True) == columns
    assert (config.data.validation_split, config.evaluation.every) == (split, 50)
    prompt = load_prompts(str(tmp_path), split=split, columns=config.data.columns)[0]
    assert (prompt.messages[-1].content[-1], prompt.answer) == (TextPart(text="Where?"), "3")


def test_init_names_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "Übung 1.toml"
    assert main(["init", str(file), "--student", "a/b", "--teacher", "/no/teacher", "--data", "here"]) == 0
    told = capsys.readouterr().err
    assert "teacher.model = /no/teacher: no such folder" in told
    assert f"data.source = here: no such folder in {Path.cwd()}, where the command runs" in told
    assert f"vaopd data check '{file}', then" in told
    assert load_config(file).run.name == "Ubung-1"
    assert main(["init", str(tmp_path / "b.toml"), "--student", "", "--teacher", "c", "--data", "d"]) == 2
    assert "--student is missing" in capsys.readouterr().err


def test_init_plans_for_cards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = ["--student", "Qwen/Qwen3-VL-2B-Instruct", "--teacher", "Qwen/Qwen3-VL-8B-Instruct"]
    file = tmp_path / "run.toml"
    assert main(["init", str(file), *models, "--data", "hiyouga/geometry3k", "--cards", "4"]) == 0
    shown = capsys.readouterr().err
    assert "teacher on card 0: Qwen/Qwen3-VL-8B-Instruct needs" in shown
    assert "estimate for H100s: 4 cards, 1 worker, 2 trainer ranks" in shown
    assert load_config(file).student.dtype == "bfloat16"


def test_the_schema_takes_the_shipped_files_and_refuses_unknown_keys() -> None:
    schema = make_schema()
    for path in ROOT.glob("configs/*.toml"):
        jsonschema.validate(tomllib.loads(path.read_text()), schema)
    values = tomllib.loads((ROOT / "configs/tiny.toml").read_text())
    values["trainer"]["stpes"] = 3
    with pytest.raises(jsonschema.ValidationError, match="stpes"):
        jsonschema.validate(values, schema)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_commands(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="the extra completion")
    assert main(["completion", shell]) == 0
    assert "--keep-authority" in capsys.readouterr().out


def test_push_lists_what_it_would_send(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    command = ["push", str(tmp_path / "run"), "me/mine", "--dry-run"]
    assert main(command) == 2
    assert "has no config.json" in capsys.readouterr().err
    for name, size in (("config.json", 2), ("model.safetensors", 12345), ("tokenizer.json", 2)):
        (model / name).write_bytes(b"x" * size)
    (model / "README.md").write_text("---\ntags:\n- vaopd\n---\n")
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "        12,345  model.safetensors\n" in shown.out
    assert shown.out.endswith("4 files, 12,371 bytes, would go to https://huggingface.co/me/mine; nothing was sent\n")
    assert "names no licence" in shown.err
    assert main(["push", str(tmp_path / "run"), "a/b/c", "--dry-run"]) == 2


def test_usage_adds_up_the_replicas(capsys: pytest.CaptureFixture[str]) -> None:
    from vaopd_teacher.metrics import TeacherMetrics

    servers, addresses = [], []
    for tokens in ({"a": 300.0}, {"a": 300.0, "b": 400.0}):
        metrics = TeacherMetrics()
        for job, count in tokens.items():
            metrics._groups.labels(job).inc()
            metrics._tokens.labels(job).inc(count)
        metrics.count_refused("b", "quota")
        server, _ = start_http_server(0, addr="127.0.0.1", registry=metrics.registry)
        servers.append(server)
        addresses.append(f"127.0.0.1:{server.server_port}")
    assert main(["usage", *addresses]) == 0
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["a", "60.0%", "2", "600", "0", "0", "0"]
    assert second.split() == ["b", "40.0%", "1", "400", "0", "2", "0"]
    for server in servers:
        server.shutdown()
        server.server_close()
    assert main(["usage", addresses[0]]) == 2
    assert f"no metrics at {addresses[0]}" in capsys.readouterr().err


def test_a_further_client_is_signed_by_the_same_authority(tmp_path: Path) -> None:
    from cryptography import x509

    make_certificates(tmp_path / "closed")
    with pytest.raises(ConfigError, match="--keep-authority"):
        add_client(tmp_path / "closed", "team-b")
    folder = tmp_path / "open"
    make_certificates(folder, keep_authority=True)
    certificate, key = add_client(folder, "team-b")
    signed, authority = (x509.load_pem_x509_certificate(path.read_bytes()) for path in (certificate, folder / "ca.pem"))
    signed.verify_directly_issued_by(authority)
    assert [path.stat().st_mode & 0o777 for path in (key, folder / "ca.key")] == [0o600, 0o600]
    for name in ("server", "../x"):
        with pytest.raises(ConfigError, match="use small letters"):
            add_client(folder, name)


def test_a_dry_run_ends_with_an_estimate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As comments: what it prints is still the configuration."""
    write_both_splits(tmp_path)
    settings = [f"data.source={tmp_path}", "teacher.address=127.0.0.1:0", "api.address=127.0.0.1:0"]
    command = ["up", str(ROOT / "configs/geometry3k-8b.toml"), "--dry-run", "--offline"]
    main([*command, *(word for setting in settings for word in ("--set", setting))])
    shown = capsys.readouterr().out
    assert tomllib.loads(shown)["trainer"]["steps"] == 655
    assert "# estimate for H100s: 3 cards" in shown


def test_results_that_find_no_room(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    command = [sys.executable, "-m", "vaopd.cli", "report", str(tmp_path / "run")]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr[:48]) == (2, "vaopd: standard output: No space left on device;")


def test_standard_streams_that_were_closed(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    command = [sys.executable, "-m", "vaopd.cli", "report", str(tmp_path / "run")]
    subprocess.run(["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', *command], check=True)
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_locale_without_utf_8(tmp_path: Path) -> None:
    """Files and paths are in UTF-8 all the same; the terminal gets what it can show."""
    run = make_run(tmp_path / "中")
    assert main(["report", str(run), "--output", str(tmp_path / "report.html")]) == 0
    command = [sys.executable, "-m", "vaopd.cli", "report", str(run)]
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, env=os.environ | locale, stdout=subprocess.PIPE, check=True)
    assert done.stdout == f"{tmp_path}/?/report.html\n".encode()
    assert (run / "report.html").read_bytes() == (tmp_path / "report.html").read_bytes()
