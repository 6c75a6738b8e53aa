"""The paper's figures: their numbers by hand, what is missing by name, and the files that the command writes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.runs import change_settings, jpeg, make_run
from vaopd.cli import main
from vaopd.errors import InvalidInput, NotFound
from vaopd.report import figure_plots, figures, plots
from vaopd.report.groups import Group, group_runs
from vaopd.run.records import read_run


def groups(*folders: Path) -> list[Group]:
    return group_runs([read_run(folder) for folder in folders])


def masked_run(folder: Path, mask: str, accuracies: tuple[float, ...], seed: int = 0) -> Path:
    run = make_run(folder, variant="masked", accuracies=accuracies, seed=seed)
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace("[objective]\n", f'[objective]\nmask = "{mask}"\n'))
    return run


def rewrite(run: Path, change: Any) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(change(line)) + "\n" for line in lines))


def write_scores(run: Path, **scores: tuple[float | None, float | None]) -> None:
    (run / "benchmarks").mkdir()
    entries = {name: {"score": score, "standard_error": error} for name, (score, error) in scores.items()}
    (run / "benchmarks" / "summary.json").write_text(json.dumps({"benchmarks": entries}))


def write_held_out(run: Path, step: int, va: list[float], *, ids: tuple[int, ...] = (5, 7), **more: Any) -> None:
    record = {
        "step": step,
        "problem": 3,
        "question": "How long is $x$?",
        "answer": r"$\frac{1}{2$",
        "response_ids": ids,
    }
    record |= {"tokens": ["1", "2\n"], "student_va": va, "verdict": "wrong", **more}
    with (run / "heldout.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def test_tokens_are_ranked_over_all_rollouts_of_a_group(tmp_path: Path) -> None:
    """Six rollouts with VA 0.5, 0 and 9: the first six tokens carry 54 of 57; ⌈1.8⌉ = 2 of 18 are the top 10 %."""
    [curve] = figures.rank_tokens(groups(make_run(tmp_path / "a")))
    assert curve.xs == pytest.approx([100 * rank / 18 for rank in range(19)])
    assert [curve.ys[rank] for rank in (0, 2, 6, 12, 18)] == pytest.approx([0, 1800 / 57, 5400 / 57, 100, 100])


def test_masked_runs_stand_beside_standard_opd(tmp_path: Path) -> None:
    """Two seeds end at 40 and 50 %; a single run has its standard error of 3 points."""
    runs = [
        make_run(tmp_path / "s", variant="standard", accuracies=(0.3, 0.6)),
        masked_run(tmp_path / "t0", "top", (0.3, 0.4)),
        masked_run(tmp_path / "t1", "top", (0.3, 0.5), seed=1),
        masked_run(tmp_path / "r", "random", (0.3, 0.55)),
    ]
    before, bars = figures.compare_masks(groups(*runs))
    assert before == pytest.approx(30)
    expected = [("Standard OPD", 60, 57, 63), ("top 10 % masked", 45, 40, 50), ("random 10 % masked", 55, 52, 58)]
    assert [(bar.label, *(round(x, 6) for x in bar[2:])) for bar in bars] == expected
    change_settings(runs[1], "[trainer]", "[trainer]\nlearning_rate = 2e-5")
    labels = [bar.label for bar in figures.compare_masks(groups(*runs))[1]]
    assert labels[1:3] == ["top 10 % masked, learning_rate 2e-05", "top 10 % masked"]


@pytest.mark.parametrize("accuracy", [0.0, 0.99])
def test_no_tick_of_a_share_lies_outside_0_to_100_and_no_legend_on_the_data(tmp_path: Path, accuracy: float) -> None:
    runs = [
        make_run(tmp_path / "v", accuracies=(accuracy, accuracy)),
        make_run(tmp_path / "s", variant="standard", accuracies=(accuracy, accuracy)),
        masked_run(tmp_path / "m", "top", (accuracy, accuracy)),
    ]
    for draw in (
        figure_plots.draw_ranks,
        figure_plots.draw_masks,
        figure_plots.draw_trajectories,
        figure_plots.draw_race,
    ):
        figure = draw(groups(*runs))
        plots.finish(figure)
        [axes] = figure.axes
        assert len(axes.get_yticks()) > 1
        assert all(0 <= tick <= 100 for tick in axes.get_yticks())
        figure.draw_without_rendering()
        [legend] = figure.legends
        assert not legend.get_window_extent().overlaps(axes.get_tightbbox())


def test_components_are_compared_by_benchmark(tmp_path: Path) -> None:
    """Standard's two seeds score 40 and 44 with errors 3 and 4: 42 ± 5/2. VA-OPD has 50 ± 6: 8 ± √(36 + 6.25)."""
    runs = [make_run(tmp_path / f"s{seed}", variant="standard", seed=seed) for seed in (0, 1)]
    runs.append(make_run(tmp_path / "v"))
    runs.insert(0, change_settings(make_run(tmp_path / "not-scored", variant="standard"), "steps = 20", "steps = 30"))
    write_scores(runs[1], wemath=(40.0, 3.0), mmmu=(None, None))
    write_scores(runs[2], wemath=(44.0, 4.0))
    write_scores(runs[3], wemath=(50.0, 6.0), mmmu=(30.0, 1.0))
    [(group, differences)] = figures.compare_components(groups(*runs))
    assert (group.label, differences) == ("VA-OPD", {"wemath": pytest.approx((8, 42.25**0.5))})
    (runs[3] / "benchmarks" / "summary.json").write_text("[]")
    with pytest.raises(InvalidInput, match=r"summary\.json is no summary"):
        figures.compare_components(groups(*runs))


def test_a_trajectory_pairs_each_accuracy_with_the_va_of_its_policy(tmp_path: Path) -> None:
    """VA is the step's number: the running mean over nine is 2 at step 0 (of 0 … 4) and 10 at 10; the last policy
    sampled nothing, and has that of step 19 (of 15 … 19)."""
    run = make_run(tmp_path / "v")
    rewrite(run, lambda line: line | ({"mean_va": line["step"]} if line["kind"] == "train" else {}))
    [curve] = figures.trace_trajectories(groups(run))
    points = list(zip(curve.steps, curve.xs, curve.ys, strict=True))
    assert points == [(0, 2, 30), (10, 10, 50), (20, 17, pytest.approx(60))]


def test_a_race_counts_the_seconds_of_the_steps_alone(tmp_path: Path) -> None:
    """A step takes 1.8 s. Standard OPD ends at 40 % after 36 s; VA-OPD passes 40 % halfway from 30 to 50 %, at 9 s."""
    runs = [
        make_run(tmp_path / "v", accuracies=(0.3, 0.5, 0.6)),
        make_run(tmp_path / "s", variant="standard", accuracies=(0.3, 0.35, 0.4)),
    ]
    _, baseline, leader, reached_s = figures.race(groups(*runs))
    assert baseline.xs == pytest.approx([0, 18, 36])
    assert (leader.group.variant, reached_s) == ("va_opd", pytest.approx(9))
    rewrite(runs[0], lambda line: line | {"accuracy": 0.1})
    assert figures.race(groups(*runs))[3] is None
    rewrite(runs[0], lambda line: {k: v for k, v in line.items() if k != "wait_s" or line["step"] != 12})
    assert sorted(figures.measure_elapsed(read_run(runs[0]))) == list(range(13))  # never a time that is too short


def test_one_rollout_is_read_by_three_students(tmp_path: Path) -> None:
    standard, leader = make_run(tmp_path / "s", variant="standard"), make_run(tmp_path / "v")
    other = make_run(tmp_path / "v1", seed=1)
    for run in (standard, leader, other):
        write_held_out(run, 0, [0.5, 0.0], image_base64=jpeg())
    write_held_out(standard, 20, [9.0], ids=(8,), student_va_of_first=[0.25, 0.0])
    write_held_out(leader, 20, [9.0], ids=(9,), student_va_of_first=[2.0, 0.125])
    shared = figures.choose_rollout(groups(standard, leader, other))
    assert shared.record["tokens"] == ["1", "2\n"]
    assert shared.readings == [
        ("base student", [0.5, 0.0]),
        ("Standard OPD, 20 steps", [0.25, 0.0]),
        ("VA-OPD, 20 steps", [2.0, 0.125]),
    ]
    with pytest.raises(NotFound, match="with one seed"):
        figures.choose_rollout(groups(standard, other))


def test_the_command_draws_what_there_is_and_names_what_to_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = make_run(tmp_path / "v"), tmp_path / "out"
    assert main(["report", "--figures", str(run), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    drawn = ["figure-1-right.png", "figure-2a.png", "figure-4b.png"]
    assert printed.out.splitlines() == [str(out / name) for name in drawn]
    assert sorted(path.name for path in out.iterdir()) == drawn
    missing = printed.err.splitlines()
    assert [line.partition(",")[0] for line in missing] == [f"vaopd: figure {name}" for name in ("2b", "4a", "5", "6")]
    assert "vaopd up CONFIG --set objective.variant=masked --set objective.mask=top" in missing[0]
    assert "vaopd eval --benchmark all --model RUN/best" in missing[1]


def test_all_figures_are_drawn(tmp_path: Path) -> None:
    runs = {
        "v": make_run(tmp_path / "v"),
        "s": make_run(tmp_path / "s", variant="standard"),
        "m": masked_run(tmp_path / "m", "top", (0.3, 0.4)),
    }
    for name in ("v", "s"):
        write_scores(runs[name], wemath=(40.0, None), ai2d=(50.0, 1.0))
        write_held_out(runs[name], 0, [0.5, 0.0], image_base64=jpeg())
        write_held_out(runs[name], 20, [0.5, 0.0], student_va_of_first=[2.0, 0.0])
        rewrite(runs[name], lambda line: line | {"student_va": 0.1, "student_va_error": 0.01, "student_va_prompts": 9})
    assert main(["report", "--figures", *map(str, runs.values()), "--out", str(tmp_path / "out")]) == 0
    pictures = sorted((tmp_path / "out").iterdir())
    assert [path.stem for path in pictures] == [
        f"figure-{name}" for name in ("1-right", "2a", "2b", "4a", "4b", "5", "6")
    ]
    for path in pictures:
        Image.open(io.BytesIO(path.read_bytes())).verify()


def test_a_run_without_any_of_the_data_draws_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "v", steps=0, accuracies=())
    (run / "samples.jsonl").unlink()
    assert main(["report", "--figures", str(run), "--out", str(tmp_path / "out")]) == 1
