"""`vaopd eval`: the accuracy of a shipped model, beside a plain greedy forward over the same problems."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.support.models import model_folder
from tests.support.rollouts import MAX_PIXELS, PlainStudent
from vaopd.cli import main
from vaopd.config import load_config
from vaopd.data import handwritten_geometry
from vaopd.evaluation import held_out_prompts, held_out_requests, is_correct, judge_version
from vaopd.run.snapshots import make_snapshot
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
    digest = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
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
    prompts = held_out_prompts(config)
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


def test_a_model_in_several_files_becomes_one_snapshot(tmp_path: Path) -> None:
    whole = model_folder("student")
    tensors = load_file(whole / "model.safetensors")
    names = sorted(tensors)
    parted = tmp_path / "parted"
    parted.mkdir()
    (parted / "config.json").write_bytes((whole / "config.json").read_bytes())
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, parted / f"model-{number}.safetensors")
    policy = make_snapshot(parted, tmp_path / "scratch")
    joined = load_file(Path(policy.path) / "model.safetensors")
    assert sorted(joined) == names
    assert all((joined[name] == tensors[name]).all() for name in names)


def test_a_model_that_is_not_there_is_named(config_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(config_path), "--model", "runs/nowhere/model"]) == 2
    assert "runs/nowhere/model" in capsys.readouterr().err
