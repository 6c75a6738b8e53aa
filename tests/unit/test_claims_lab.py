"""The laboratory of benchmarks/claims/lab: its pictures, its teacher, its batches, and the page of its results."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.support.tolerance import assert_within, gamma
from vaopd import degradation, objective

pytestmark = pytest.mark.numeric
ROOT = Path(__file__).parents[2]
MODULES = ("worlds", "student", "run", "summary")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lab() -> Any:
    """The laboratory's modules, which import each other by their own names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks" / "claims" / "lab"))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture
def float64() -> Iterator[None]:
    """The laboratory in float64, for runs that shall be equal whatever stands beside them in their batch.

    In float32 a rounded logit samples another token now and then, and Adam, by which every parameter's first step is
    equally large, turns the step of a parameter that has next to no gradient.
    """
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def draw(lab: Any, seeds: list[int], *, digits: int, count: int = 4) -> tuple[Tensor, Tensor]:
    pictures = lab.worlds.Pictures("test", CPU)
    return pictures.draw(lab.worlds.Draws(seeds, 1, CPU).uniform(count, digits, 2), pictures.pool(seeds, None))


def test_a_picture_is_pixelated_as_the_teacher_does_it(lab: Any) -> None:
    """Five cells of 10×10 px become five pixels; Pillow rounds to 1/255 when it shrinks, and before that."""
    cells, _ = draw(lab, [0], digits=5, count=3)
    found = lab.worlds.pixelate(cells)[0]
    for picture, pixelated in zip(cells[0], found, strict=True):
        row = np.concatenate(list(picture.numpy()), 1)
        whole = Image.fromarray((255 * row).round().astype(np.uint8))
        expected = np.asarray(degradation.pixelate(whole.convert("RGB"), 0.1))[..., 0] / 255
        assert_within(np.concatenate(list(pixelated.numpy()), 1), expected, 1.01 / 255)
    assert found.std() > 4 / 255  # more than the tolerance


@pytest.mark.parametrize("world", ["same habits", "phrases"])
def test_the_teacher_expects_what_follows_from_its_process(lab: Any, world: str) -> None:
    """Of answers that it would write itself, the fixed places are nearly certain and the digits are what it sees."""
    language = lab.worlds.make_language([lab.worlds.WORLDS[world]], CPU)
    _, digits = draw(lab, [0], digits=language.digits, count=32)
    text = lab.worlds.Draws([0], 2, CPU).uniform(32, language.length)
    tokens = language.write(digits, text, torch.zeros(1, dtype=torch.long))
    seen = torch.nn.functional.one_hot(digits, 10) * 0.9 + 0.01
    logprobs = language.predict(tokens, seen, torch.zeros(1, dtype=torch.long))
    assert_within(logprobs.exp().sum(-1), torch.ones(tokens.shape), gamma(language.vocabulary + 4, exps=2) * 2)
    p = logprobs.gather(-1, tokens[..., None])[..., 0].exp()
    slots, valid = language.slots(tokens), language.valid(tokens)
    assert ((slots >= 0).sum(-1) == language.digits).all()
    assert p[slots >= 0].min() > 0.85
    assert (language.answers(tokens) == digits.amax(-1)).all()
    uncertain = valid & (slots < 0) & (p < 0.99)
    # Words are drawn, one of 64 at each place; of phrases only the first word is, four times in an answer.
    expected = 72 if world == "same habits" else 4
    assert (uncertain.sum(-1) == expected).all()
    # A digit that was read otherwise changes what it expects of the answer.
    wrong = torch.where(slots >= 0, language.zero + 9, tokens)
    after = language.predict(wrong, seen, torch.zeros(1, dtype=torch.long)).argmax(-1)
    if world == "same habits":
        assert (language.answers(after) == 9).all()


def test_a_run_does_not_depend_on_the_runs_beside_it(lab: Any, float64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds and objectives in one batch, and one of them alone: the same numbers after two steps."""
    for name, value in {
        "STEPS": 2,
        "WINDOW": 1,
        "BEFORE_PICTURES": 2,
        "VALIDATION_PICTURES": 2,
        "TEST_PICTURES": 6,
    }.items():
        monkeypatch.setattr(lab.run, name, value)
    runs = [
        lab.run.Run(world="short", objective=name, rate=rate, prompts=2, siblings=2, seed=seed)
        for name, rate, seed in (("standard", 1e-3, 3), ("mask_random", 3e-3, 3), ("va_opd", 3e-3, 5))
    ]
    torch.manual_seed(0)
    eye = lab.worlds.Eye().eval()

    def distil(some: list[Any]) -> list[dict[str, Any]]:
        batch = lab.run.Batch(some, eye, CPU)
        return list(lab.run.distil(batch, batch.architecture.initialise([run.seed for run in some])))

    together, alone = distil(runs), distil(runs[1:2])[0]
    for part in ("before", "test", "during"):
        for name, value in alone[part].items():
            # Shares of tokens are counted in float32: a quotient, and a mean over two steps.
            assert together[1][part][name] == pytest.approx(value, rel=4 * 2**-24, nan_ok=True), name
    assert together[0]["during"]["gradient_norm"] != pytest.approx(alone["during"]["gradient_norm"], rel=1e-3)
    standard, masked, va = (each["during"] for each in together)
    assert standard["effective_siblings"] == pytest.approx(2)
    assert va["weight_read"] > masked["weight_read"] * 0.5


def test_a_student_that_has_had_its_steps_waits_for_the_others(lab: Any, float64: None) -> None:
    """Of two worlds with 3 and 5 steps: the first one's student is the same beside the second and alone."""
    short = lab.worlds.WORLDS["short"]
    worlds = [
        replace(short, name="3 steps", reading_steps=1, neglecting_steps=2, scans_per_digit=2),
        replace(short, name="5 steps", reading_steps=5, neglecting_steps=0),
    ]
    school = lab.student.School(worlds, lab.worlds.Eye().eval(), CPU)
    together = school.teach_students([(worlds[0], 4), (worlds[1], 4)])
    alone = school.teach_students([(worlds[0], 4)])
    start = school.architecture.initialise([4])
    assert (alone - start).abs().max() > 1e-4
    # Rounding of 1e-16 in a gradient weighs 1e-8 at the most where Adam adds its epsilon to the gradient's size.
    assert (together[:1] - alone).norm() < 1e-7 * (alone - start).norm()
    assert (together[1] - together[0]).norm() > 0.1 * (alone - start).norm()


def test_a_learned_teacher_scores_both_views(lab: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Teacher and student are made once, and kept."""
    monkeypatch.setattr(lab.student, "TEACHER_STEPS", 2)
    world = replace(lab.worlds.WORLDS["learned teacher"], reading_steps=1, neglecting_steps=1)
    monkeypatch.setitem(lab.run.WORLDS, "learned teacher", world)
    runs = [lab.run.Run(world="learned teacher", objective="view_divergence", rate=1e-3, prompts=2, siblings=2, seed=0)]
    lab.student.keep(tmp_path / "eye.safetensors", lambda: lab.worlds.Eye().state_dict())
    batch, students = lab.run.prepare(runs, tmp_path, CPU)
    kept, same = lab.run.prepare(runs, tmp_path, CPU)
    assert torch.equal(batch.learned, kept.learned)
    assert torch.equal(students, same)
    cells, _ = draw(lab, [0], digits=5, count=2)
    tokens = torch.zeros(1, 4, batch.language.length, dtype=torch.long)
    clear, pixelated = batch.predict(tokens, cells), batch.predict(tokens, lab.worlds.pixelate(cells))
    assert_within(clear.exp().sum(-1), torch.ones(1), gamma(batch.language.vocabulary + 4, exps=2) * 2)
    assert objective.view_divergence(clear, pixelated).max() > 0


def test_its_objectives_are_the_library_s(lab: Any) -> None:
    """A batch's weights, group by group, are those of `group_weights`."""
    generator = torch.Generator().manual_seed(0)
    teacher, degraded, student = (torch.randn(8, 12, 7, generator=generator).log_softmax(-1) for _ in range(3))
    tokens = torch.randint(7, (8, 12), generator=generator)
    valid = torch.arange(12) < torch.tensor([12, 3, 7, 12, 1, 9, 12, 5])[:, None]
    scores = lab.run.Scores(tokens=tokens, valid=valid, student=student, teacher=teacher, degraded=degraded, siblings=4)
    views = scores.both_views
    va, divergence = objective.visual_advantage(*views, valid), objective.view_divergence(teacher, degraded)
    for name, settings in {
        "standard": {"variant": "standard"},
        "va_opd": {"variant": "va_opd"},
        "token_groups": {"variant": "token_groups"},
        "rollout_weights": {"variant": "rollout_weights"},
        "rollout_weights_floor": {"variant": "rollout_weights", "rollout_deviation_floor": 0.02},
        "view_divergence_and_rollouts": {"variant": "va_opd", "token_score_KT": divergence},
        "view_divergence": {"variant": "token_groups", "token_score_KT": divergence},
        "mask_top": {"variant": "masked", "mask": "top"},
    }.items():
        found = lab.run.OBJECTIVES[name](scores)
        for k in (slice(0, 4), slice(4, 8)):
            group = {key: v[k] if isinstance(v, Tensor) else v for key, v in settings.items()}
            expected = objective.group_weights(va[k], valid[k], **group).token_weights  # type: ignore[arg-type]
            # Means in float32 in place of float64, of log-probs up to 5, over deviations of 0.1 and more.
            assert_within(found[k], expected, 5 * gamma(20) / 0.1)


def test_every_run_can_be_found_and_batches_hold_runs_of_one_form(lab: Any) -> None:
    runs = list(lab.run.list_runs())
    assert len(set(runs)) == len(runs)
    assert all(e.seeds >= lab.summary.MIN_SEEDS for e in lab.run.EXPERIMENTS)
    batches = lab.run.split_batches(runs, 100)
    assert sorted(run for batch in batches for run in batch) == sorted(runs)
    assert all(len({lab.worlds.WORLDS[run.world].words for run in batch}) == 1 for batch in batches)


def test_the_differences_are_paired_by_seed(lab: Any) -> None:
    """Differences 0.1, 0.2, 0.3, 0.2 and −0.1: mean 0.14, deviation √0.023, t of 4 degrees of freedom 2.776."""
    baseline = {seed: {"test": {"p_right": 0.5 + seed}} for seed in range(5)}
    gains = (0.1, 0.2, 0.3, 0.2, -0.1)
    runs = {seed: {"test": {"p_right": 0.5 + seed + gain}} for seed, gain in enumerate(gains)}
    mean, half, above, seeds = lab.summary.compare(runs, baseline, "p_right")
    assert mean == pytest.approx(0.14)
    assert half == pytest.approx(2.776 * 0.023**0.5 / 5**0.5)
    assert (above, seeds) == (4, 5)


def test_the_page_has_the_results_tables(lab: Any) -> None:
    """`make claims-lab` writes them."""
    tables = lab.summary.make_tables(json.loads(lab.run.RESULTS.read_text())["runs"])
    written = (ROOT / "docs" / "when_va_opd_helps.md").read_text().split(lab.summary.BEGIN)[1].split(lab.summary.END)[0]
    assert written.strip() == tables
