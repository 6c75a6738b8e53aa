"""`vaopd eval`: the accuracy of a shipped model, beside a plain greedy forward over the same problems."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.models import model_folder
from tests.support.rollouts import MAX_PIXELS, PlainStudent
from vaopd.cli import main
from vaopd.config import load_config
from vaopd.data import handwritten_geometry
from vaopd.data.problems import check_held_out
from vaopd.evaluation import held_out_requests, is_correct, judge_version
from vaopd.run.tensor_files import compute_digest
from vaopd.types import PolicyVersion

CONFIG = """
[run]
name = "unused"
[data]
source = "{folder}"
max_pixels = {max_pixels}
[student]
model = "{model}"
dtype = "float32"
[teacher]
model = "unused"
[rollout]
engine = "transformers"
max_new_tokens = 64
requests_per_batch = 3
[trainer]
steps = 1
[evaluation]
prompts = 8
samples = 1
temperature = 0.0
"""


def as_snapshot(model: Path) -> PolicyVersion:
    digest = compute_digest(model / "model.safetensors")
    return PolicyVersion(version=0, path=str(model), sha256=digest)


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    handwritten_geometry.write(folder / "data", seed=3, train=1, validation=8, test=1)
    path = folder / "run.toml"
    path.write_text(CONFIG.format(folder=folder / "data", model=model_folder("student"), max_pixels=MAX_PIXELS))
    return path


@pytest.mark.slow
def test_the_accuracy_is_that_of_plain_greedy_answers(config_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(config_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)

    config = load_config(config_path)
    prompts = check_held_out(config).prompts
    plain = PlainStudent(as_snapshot(model_folder("student")))
    tokenizer = plain.processor.tokenizer
    answers = [
        plain.greedy(request, banned=[], eos_ids=[tokenizer.eos_token_id])
        for request in held_out_requests(prompts, version=0, config=config)
    ]
    right = [
        is_correct(tokenizer.decode(ids, skip_special_tokens=True), prompt.answer)
        for ids, prompt in zip(answers, prompts, strict=True)
    ]
    assert told["accuracy"] == pytest.approx(np.mean(right))
    assert (told["prompts"], told["samples"]) == (8, 1)
    assert (told["judge"], told["not_judged"]) == (judge_version(), 0)


def cut_pictures(source: Path, target: Path, *, cut: set[int]) -> Path:
    """Copies a data set; the pictures of these validation records are cut in the middle."""
    target.mkdir()
    for split in ("train", "validation"):
        rows = pq.read_table(source / f"{split}.parquet").to_pylist()
        for index, row in enumerate(rows):
            if split == "validation" and index in cut:
                row["images"] = [{**image, "bytes": image["bytes"][:200]} for image in row["images"]]
        pq.write_table(pa.Table.from_pylist(rows), target / f"{split}.parquet")
    return target


@pytest.mark.slow
def test_a_question_that_cannot_be_asked_is_never_wrong(
    config_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With half of the pictures cut, the accuracy is that of the other half; it is 1 only if allowed."""
    source = cut_pictures(config_path.parent / "data", tmp_path / "half", cut={0, 2, 4, 6})
    whole = [row["answer"] for row in pq.read_table(source / "validation.parquet").to_pylist()]
    assert len(whole) == 8
    arguments = ["eval", str(config_path), "--set", f"data.source={source}", "--json"]
    assert main(arguments) == 1
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert (told["prompts"], told["not_asked"]) == (4, {"picture": 4})
    assert "not asked: split 'validation', record 2, field 'images[0]': image " in shown.err
    assert "4 of 8 not asked: 4 picture; --allow-unasked accepts that" in shown.err

    rows = pq.read_table(source / "validation.parquet").slice(0, 8).to_pylist()
    (tmp_path / "good").mkdir()
    pq.write_table(pa.Table.from_pylist(rows[1::2]), tmp_path / "good/validation.parquet")
    assert main(["eval", str(config_path), "--set", f"data.source={tmp_path / 'good'}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == told["accuracy"]

    assert main([*arguments, "--allow-unasked"]) == 0


def test_with_no_readable_picture_there_is_no_accuracy(
    config_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = cut_pictures(config_path.parent / "data", tmp_path / "none", cut=set(range(8)))
    assert main(["eval", str(config_path), "--set", f"data.source={source}", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["accuracy"], told["standard_error"], told["prompts"]) == (None, None, 0)
    assert told["not_asked"] == {"picture": 8}
    assert main(["eval", str(config_path), "--set", f"data.source={source}"]) == 1
    assert "no accuracy: 8 of 8 not asked: 8 picture" in capsys.readouterr().out


@pytest.mark.slow
def test_a_question_that_the_engine_refuses_was_not_asked(
    config_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An engine whose context is shorter than every prompt."""
    from vaopd.vlm.model import Vlm

    monkeypatch.setattr(Vlm, "max_tokens", 8)
    assert main(["eval", str(config_path), "--json"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["not_asked"] == {"refused by the engine": 8}
    assert json.loads(shown.out)["accuracy"] is None
    assert shown.err.count("vaopd: not asked: validation-") == 8


def test_a_model_that_is_not_there_is_named(config_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(config_path), "--model", "runs/nowhere/model"]) == 2
    assert "runs/nowhere/model" in capsys.readouterr().err
