"""Whole runs: every process real, transformers engine, tiny models."""

from __future__ import annotations

import math
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import torch
from safetensors.torch import load_file, save_file

from tests.support.models import model_folder
from tests.support.system import Job, System
from tests.support.teacher import drawing, encoded
from tests.support.tolerance import assert_within, gamma
from vaopd.grading import judge_version
from vaopd_trainer.prompt_order import PromptOrder

pytestmark = pytest.mark.slow


def weights_of(job: Job) -> dict[str, np.ndarray]:
    return safetensors.numpy.load(job.weights())


def write_data(folder: Path, rows: list[dict[str, Any]], validation: list[dict[str, Any]]) -> None:
    """Geometry3K's schema."""
    images = pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    schema = pa.schema({"problem": pa.string(), "answer": pa.string(), "images": images})
    for split, lines in (("train", rows), ("validation", validation)):
        pq.write_table(pa.Table.from_pylist(lines, schema=schema), folder / f"{split}.parquet")


def picture(seed: int) -> dict[str, Any]:
    return {"bytes": encoded(drawing(seed)).data, "path": None}


def stop_before_the_first_step(job: Job) -> None:
    trainer = job.start_trainer()
    job.until("the first step's requests wait", lambda: job.stream_length("requests") >= 4, trainer)
    trainer.send(signal.SIGTERM)
    assert trainer.exit_code() == 130
    assert "stopped at step 0; continue with --resume" in trainer.text()
    assert [folder.name for folder in (job.folder / "checkpoints").iterdir()] == ["step_000000"]


def test_two_ranks_give_the_losses_and_the_weights_of_one(system: System, tmp_path: Path) -> None:
    """Up to the order in which the groups' gradients are summed, each of which is computed alike.

    SIGTERM reaches the launcher of the ranks, which passes it on; the run is resumed. A prompt is longer
    than the model's context: it will not come, and its step does without.

    AdamW's step is about the learning rate for every weight, however small its gradient and however much of that is
    rounding. Four gradients' sum is off by γ_4 of their magnitudes, and by more than 2 % of itself where it is smaller
    than 50·γ_4 = 1.2e-5 of these: so of 10^4 weights one may be off by more than 2 % of a step, up to two steps.
    """
    sound = [{"problem": "<image>How long?", "answer": "1", "images": [picture(seed)]} for seed in range(8)]
    bad = PromptOrder(prompts=8, seed=0).index(1)
    too_long = {**sound[bad], "problem": "<image>" + "How long? " * 600}  # 1024 positions
    held_out = [{**row, "problem": "<image>How wide?"} for row in sound]
    write_data(tmp_path, [*sound[:bad], too_long, *sound[bad + 1 :]], validation=held_out)
    # Samples are written where evaluation is due: with every step's, the rollouts of both runs can be compared.
    steps, rate = 2, 1e-4
    settings = {
        "data__source": tmp_path,
        "trainer__steps": steps,
        "trainer__learning_rate": rate,
        "evaluation__every": 1,
    }
    one = system.job("one-rank", **settings)
    two = system.job("two-ranks", trainer__processes=2, **settings)
    one.run()
    stop_before_the_first_step(two)
    worker = two.start_worker()
    two.finished(two.start_trainer(resume=True))
    worker.kill()

    # Rank 0 writes the rollouts of its own groups, which are some in each step, and not all.
    shared = two.rollouts()
    assert {name[:12] for name in shared} == {"train-000000", "train-000001"}
    assert len(shared) < len(one.rollouts())
    assert shared.items() <= one.rollouts().items()
    for job in (one, two):
        wanted = {(f"train-{step:06d}-{index:04d}", step) for step in range(2) for index in range(4)}
        trained = [(line["group_id"], line["step"]) for line in job.ledger()]
        assert sorted(trained) == sorted(wanted - {("train-000000-0001", 0)})
        assert job.stream_length("dead") == 1
        assert job.records()[-1]["groups_dead"] == 1
        assert job.pending() == {"requests": 0, "groups": 0}
    expected, found = weights_of(one), weights_of(two)
    # A sum over up to 4 · 2 · 12 tokens; then 2 % of a step in each of n weights, which a gradient g turns into no more
    # than √n·|g| of it.
    (first, second), weights = one.losses(), sum(tensor.size for tensor in expected.values())
    of_step = 0.02 * rate * math.sqrt(weights) * one.records()[1]["grad_norm"]
    assert_within(two.losses(), [first, second], [gamma(96) * first, gamma(96) * second + of_step])
    start = load_file(Path(model_folder("student")) / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        difference = np.abs(tensor - expected[name])
        assert (difference > 0.02 * rate).sum() <= 1 + 1e-4 * tensor.size, name
        assert difference.max() <= 2 * steps * rate, name
        assert (np.abs(start[name].numpy() - expected[name]) > 0.02 * rate).mean() > 0.01, name  # the wrong is noticed
        assert not np.array_equal(tensor, start[name].numpy()), f"{name} has not learned"


def forgetful_student(folder: Path, *, seed: int) -> Path:
    """Half a standard deviation of noise on each weight: 7 nats per token from the teacher, and soon nearer."""
    shutil.copytree(model_folder("student"), folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(seed)
    noisy = {
        name: tensor + 0.5 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tensors.items()
    }
    save_file(noisy, file, metadata={"format": "pt"})
    return folder


def test_two_jobs_with_different_students_share_a_teacher_and_both_learn(system: System, tmp_path: Path) -> None:
    """Their seeds differ, hence their prompts: a group in the wrong job would be refused for its prompt."""
    settings = {
        "trainer__steps": 10,
        "trainer__prompts_per_step": 8,
        "trainer__warmup_fraction": 0.1,
        "rollout__max_new_tokens": 16,
        "rollout__requests_per_batch": 8,
    }
    jobs = [
        system.job(
            f"job-{seed}", run__seed=seed, student=forgetful_student(tmp_path / f"{seed}", seed=seed), **settings
        )
        for seed in (1, 2)
    ]
    workers = [job.start_worker() for job in jobs]
    trainers = [job.start_trainer() for job in jobs]
    jobs[0].until("both are in their runs", lambda: all(0 < len(job.records()) < 10 for job in jobs), *trainers)
    for job, trainer, worker in zip(jobs, trainers, workers, strict=True):
        job.finished(trainer)
        worker.kill()

    for job in jobs:
        for measured in (job.losses(), [record["kl_mean"] for record in job.records()]):
            assert np.mean(measured[-2:]) < 0.7 * np.mean(measured[:2]), measured
        assert len({line["group_id"] for line in job.ledger()}) == len(job.ledger()) == 10 * 8
        assert not {key for record in job.records() for key in record if key.startswith("groups_")}, "groups dropped"
        assert job.pending() == {"requests": 0, "groups": 0}


def test_a_lag_of_one_and_prompts_with_any_number_of_images(system: System, tmp_path: Path) -> None:
    pictures = [picture(seed) for seed in range(4)]
    rows = [
        {"problem": "Find the complement of the angle.", "answer": "30", "images": []},
        {"problem": "<image>Find the perimeter of the triangle.", "answer": "12", "images": pictures[:1]},
        {"problem": "<image><image>Find the area of the rectangle.", "answer": "6", "images": pictures[1:3]},
        {"problem": "Compare <image> and <image>.", "answer": "1", "images": pictures[2:]},
    ]
    write_data(tmp_path, rows, validation=[{**row, "problem": f"{row['problem']} Say why."} for row in rows])

    # One prompt a step: the step without an image leaves the vision tower without a gradient.
    job = system.job(
        "shapes",
        data__source=tmp_path,
        trainer__steps=4,
        trainer__prompts_per_step=1,
        trainer__max_policy_lag=1,
        evaluation__every=1,
        evaluation__prompts=4,
    )
    job.run()
    # Generation runs one version ahead. The first step's group can only be of version 0, and no group is older.
    assert [line["step"] - line["policy_version"] for line in job.ledger()] == [0, 1, 1, 1]
    assert job.pending() == {"requests": 0, "groups": 0}
    assert {" ".join(record["question"].split()) for record in job.samples()} == {
        "Find the complement of the angle.",
        "Find the perimeter of the triangle.",
        "Find the area of the rectangle.",
        "Compare and .",
    }
    assert all(record["prompts"] == 4 for record in job.records("eval"))
    assert all(record["student_va_prompts"] == 3 and record["student_va"] > 0 for record in job.records("eval"))
    for name, step in (("model", 4), ("best", max(job.records("eval"), key=lambda record: record["accuracy"])["step"])):
        card = (job.folder / name / "README.md").read_text()
        assert f"| optimizer steps | {step} of 4 |" in card
        assert f"avg@1, 4 problems; judge {judge_version()})" in card
    assert all(np.isfinite(record["grad_norm"]) and record["grad_norm"] > 0 for record in job.records())


def test_a_run_leaves_out_bad_records_and_resumes_as_it_began(system: System, tmp_path: Path) -> None:
    """Of nine records one has a picture that is cut short: the eight others are one epoch of two steps, in any case.

    Token groups are by the student's expected VA, which both views' hidden states of the teacher give.
    """
    sound = [{"problem": f"<image>How long? {seed}", "answer": "1", "images": [picture(seed)]} for seed in range(8)]
    cut_short = {"bytes": encoded(drawing(8)).data[:-100], "path": None}
    bad = {"problem": "<image>How long? 8", "answer": "1", "images": [cut_short]}
    held_out = [{**row, "problem": row["problem"].replace("long", "wide")} for row in (sound[0], bad, sound[1])]
    write_data(tmp_path, [*sound[:3], bad, *sound[3:]], validation=held_out)
    settings: dict[str, Any] = {
        "data__source": tmp_path,
        "trainer__steps": 2,
        "evaluation__every": 2,
        "evaluation__prompts": 3,
    }
    refused = system.job("strict", **settings).start_trainer()
    assert refused.exit_code() == 2
    assert "1 of 9 records can't be used (1 picture: record 3); the first: split 'train', record 3" in refused.text()

    settings |= {"teacher__payload": "hidden_pair", "objective__token_score": "expected"}
    job = system.job("lenient", data__bad_records="skip", data__max_bad_fraction=0.4, **settings)
    stop_before_the_first_step(job)
    worker = job.start_worker()
    job.finished(job.start_trainer(resume=True))
    worker.kill()
    assert {record["records_left_out"] for record in job.records()} == {1}
    assert [(record["prompts"], record["not_asked"]) for record in job.records("eval")] == [(2, {"picture": 1})] * 2
    asked = {" ".join(record["question"].split()) for record in job.samples()}
    assert asked == {f"How long? {seed}" for seed in range(8)}
    for sample in job.samples():
        assert len(sample["expected_va_nats"]) == len(sample["tokens"])
        assert min(sample["expected_va_nats"]) >= 0 < max(sample["expected_va_nats"])
    assert len(job.ledger()) == 8
