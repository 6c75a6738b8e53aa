"""The report of several runs: grouped by configuration, with bands over their seeds."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.runs import change_settings, make_run, read_charts
from vaopd.report import write_report
from vaopd.report.charts import COLOURS, SCORE_COLOURS
from vaopd.report.curves import compute_band, seed_band
from vaopd.report.groups import group_runs, keep_finished
from vaopd.run import settings
from vaopd.run.records import read_run


def test_runs_with_another_token_score_are_another_objective(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, variant="token_groups") for name in ("va", "divergence")]
    config = (runs[1] / "config.toml").read_text()
    (runs[1] / "config.toml").write_text(
        config.replace("[objective]\n", '[objective]\ntoken_score = "view_divergence"\n')
    )
    for run in runs:
        (run / "samples.jsonl").unlink()
    page = write_report(runs).read_text()
    names = ["token groups only", "token groups only, by view divergence"]
    assert all(f"<td>{name}</td>" in page for name in names)
    assert [series["name"] for series in read_charts(page)[1]["series"]] == names


# Linear RGB as people with each kind of colour blindness see it (Machado, Oliveira and Fernandes 2009, severity 1).
SEEN = {
    "all colours": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
TO_XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]


def to_lab(colour: str, seen: Any) -> np.ndarray:
    """CIE L*a*b*, in which equal distances look about equal; 2.3 is just noticeable."""
    rgb = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(np.array(TO_XYZ) @ np.clip(np.array(seen) @ linear, 0, 1) / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("name", SEEN)
def test_objectives_differ_in_colour_for_everybody(name: str) -> None:
    labs = [to_lab(colour, SEEN[name]) for colour in (*COLOURS.values(), *SCORE_COLOURS.values())]
    assert min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(labs, 2)) > 15


def test_several_runs_are_compared_by_objective(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"{variant}-{seed}", variant=variant, seed=seed)
        for variant in ("va_opd", "standard")
        for seed in (0, 1)
    ]
    page = write_report(runs, output=tmp_path / "comparison.html").read_text()
    accuracy = read_charts(page)[0]
    assert [series["name"] for series in accuracy["series"]] == ["VA-OPD, 2 seeds", "Standard OPD, 2 seeds"]
    assert accuracy["notes"] == ["line: mean; band: lowest to highest seed"]
    differences = page[page.index("configurations differ") : page.index("<details>")]
    assert re.findall(r"<td>(\w+\.\w+)</td>", differences) == ["run.seed", "objective.variant"]


def test_bands_over_seeds_by_hand(tmp_path: Path) -> None:
    """40, 50 and 60 %: mean 50; standard deviation 10 (divided by n − 1), so a standard error of 10/√3 = 5.7735."""
    runs = [
        read_run(make_run(tmp_path / str(seed), seed=seed, accuracies=(0.3, accuracy)))
        for seed, accuracy in enumerate((0.4, 0.5, 0.6))
    ]
    steps, means, lows, highs = seed_band(runs, band="range")
    assert (steps, means[1], lows[1], highs[1]) == ([0, 10], pytest.approx(50), pytest.approx(40), pytest.approx(60))
    _, _, lows, highs = seed_band(runs, band="standard-error")
    assert (lows[1], highs[1]) == (pytest.approx(50 - 5.7735, abs=1e-4), pytest.approx(50 + 5.7735, abs=1e-4))


def test_a_band_covers_only_the_steps_that_all_seeds_have() -> None:
    assert compute_band([{0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.0, 1: 4.0}], band="range") == (
        [0, 1],
        [1.0, 3.0],
        [1.0, 2.0],
        [1.0, 4.0],
    )


def test_an_unfinished_run_does_not_cut_the_finished_ones_short(tmp_path: Path) -> None:
    done = read_run(make_run(tmp_path / "done"))
    begun = read_run(make_run(tmp_path / "begun", steps=3, accuracies=(0.3,)))
    other = read_run(make_run(tmp_path / "other", variant="standard", steps=3, accuracies=(0.3,)))
    assert (done.finished, begun.finished) == (True, False)
    assert [run.name for run in keep_finished([done, begun, other])] == ["done", "other"]


def list_legends(*runs: Path) -> list[str]:
    return [group.legend for group in group_runs([read_run(run) for run in runs])]


def test_runs_are_grouped_by_configuration_and_labelled_by_what_differs(tmp_path: Path) -> None:
    """Names, seeds and addresses make no difference; the rate does, and the objective's own fields do."""

    def make(name: str, *, rate: str = "", variant: str = "va_opd", seed: int = 0) -> Path:
        run = make_run(tmp_path / name, variant=variant, seed=seed)
        return change_settings(run, "steps = 20\n", f"steps = 20\n{rate}checkpoint_every = {len(name)}\n")

    slow, fast = "learning_rate = 1e-5\n", "learning_rate = 6e-4\n"
    runs = [make("a", rate=slow), make("bb", rate=fast), make("ccc", rate=fast, seed=1)]
    assert list_legends(*runs) == ["VA-OPD, learning_rate 1e-05", "VA-OPD, learning_rate 0.0006, 2 seeds"]
    other = make("dddd", rate=slow, variant="standard")
    assert list_legends(*runs[1:], other) == ["VA-OPD, 2 seeds", "Standard OPD"]
    assert list_legends(*runs, other)[2] == "Standard OPD"
    page = write_report([*runs, other], output=tmp_path / "page.html").read_text()
    assert "VA-OPD, learning_rate 0.0006, 2 seeds" in [series["name"] for series in read_charts(page)[0]["series"]]


def test_the_same_seed_twice_is_said_and_counts_once(tmp_path: Path) -> None:
    """Seed 0 with 40 and 50 %, seed 1 with 60: the mean of 45 and 60 is 52.5, not 50."""
    runs = [
        make_run(tmp_path / str(index), seed=seed, accuracies=(0.3, accuracy))
        for index, (seed, accuracy) in enumerate(((0, 0.4), (0, 0.5), (1, 0.6)))
    ]
    assert list_legends(*runs) == ["VA-OPD, 2 seeds (seed 0 twice)"]
    assert list_legends(*runs[:2]) == ["VA-OPD, 1 seed (seed 0 twice)"]
    _, means, lows, highs = seed_band([read_run(run) for run in runs], band="range")
    assert (means[1], lows[1], highs[1]) == (pytest.approx(52.5), pytest.approx(45), pytest.approx(60))
    page = write_report(runs, output=tmp_path / "page.html").read_text()
    assert "The same seed ran more than once, and counts as one: VA-OPD: seed 0 twice." in page


def test_a_change_on_the_way_and_another_teacher_make_another_configuration(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("plain", "changed", "taught")]
    first, second = {"revision": "a" * 20}, {"revision": "b" * 20}
    for run in runs:
        settings.append(run, {"step": 0, "changes": {}, "teacher": first})
    settings.append(runs[1], {"step": 8, "changes": {"trainer.learning_rate": [0.5, 0.25]}, "teacher": first})
    settings.append(runs[2], {"step": 8, "changes": {}, "teacher": second})
    assert list_legends(*runs) == [
        "VA-OPD",
        "VA-OPD, learning_rate at step 8 0.5 → 0.25",
        "VA-OPD, teacher at step 8 bbbbbbbb",
    ]
    page = write_report(runs, output=tmp_path / "page.html").read_text()
    rows = page[page.index("configurations differ") : page.index("<details>")]
    assert re.findall(r"<td>(.+? at step 8)</td>", rows) == ["trainer.learning_rate at step 8", "teacher at step 8"]
    page = write_report(runs[1:2]).read_text()
    assert "From step 8 on, trainer.learning_rate is 0.25; before, it was 0.5." in page
    page = write_report(runs[2:]).read_text()
    assert f"From step 8 on, another teacher was accepted: revision {'b' * 16}; before, it was {'a' * 16}." in page
