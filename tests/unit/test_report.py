"""The report of a run: what its folder says, as one HTML file; several runs are compared by objective."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from vaopd.cli import main
from vaopd.errors import InvalidInput, NotFound
from vaopd.report import read_run, write_report
from vaopd.report_plots import seed_band


def make_run(
    folder: Path, *, variant: str = "va_opd", seed: int = 0, accuracies: tuple[float, ...] = (0.3, 0.5)
) -> Path:
    """A folder as the trainer leaves it, with an evaluation every 10 steps."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(f'[run]\nname = "x"\nseed = {seed}\n[objective]\nvariant = "{variant}"\n')
    lines: list[dict[str, Any]] = []
    for index, accuracy in enumerate(accuracies):
        evaluation = {"accuracy": accuracy, "standard_error": 0.03, "prompts": 300, "samples": 1}
        lines.append({"kind": "eval", "step": 10 * index, **evaluation})
    for step in range(20):
        numbers = {"loss": 0.5, "kl_mean": 0.4, "kl_high": 0.6, "kl_low": 0.3, "mean_va": 0.2, "va_top10_share": 0.95}
        times = {"wait_s": 1.0, "score_s": 0.3, "forward_backward_s": 0.4, "publish_s": 0.1}
        lines.append({"kind": "train", "step": step, **numbers, **times})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = [
        {
            "step": 0,
            "group_id": "g0",
            "question": "Is 3 < 4?",
            "answer": "yes",
            "tokens": ["3", " <", "\n"],
            "visual_advantage": [0.5, 0.0, 9.0],
            "teacher_logprobs": [-0.1, -0.2, -0.3],
            "rollout_weight": weight,
        }
        for weight in (0.75, 0.25)
    ]
    samples[0]["image_base64"] = "/9j/AAAA"
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    return folder


def test_a_run_is_one_self_contained_page(tmp_path: Path) -> None:
    path = write_report([make_run(tmp_path / "first")])
    assert path == tmp_path / "first" / "report.html"
    page = path.read_text()
    assert page.count("<svg") == 5  # accuracy, loss and KL, mean VA, top-10 % share, times
    assert "<b>30.0 % ± 3.0</b> at step 0, <b>50.0 % ± 3.0</b> at step 10" in page
    assert "variant = &quot;va_opd&quot;" in page
    assert re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page) == []  # nothing is loaded from elsewhere
    assert "currentColor" in page  # the curves follow the page's light or dark


def test_tokens_are_coloured_by_their_visual_advantage(tmp_path: Path) -> None:
    """1 nat and more has the full colour; what a model or a data set wrote is text, never markup."""
    page = write_report([make_run(tmp_path / "first")]).read_text()
    assert re.findall(r"rgb\(255 140 0/([\d.]+)\)", page) == ["0.50", "0.00", "1.00"] * 2
    assert "&lt;</span>" in page
    assert "Is 3 &lt; 4?" in page
    assert page.count("data:image/jpeg;base64,/9j/AAAA") == 1


def test_several_runs_are_compared_by_objective(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"{variant}-{seed}", variant=variant, seed=seed)
        for variant in ("va_opd", "standard")
        for seed in (0, 1)
    ]
    page = write_report(runs, output=tmp_path / "comparison.html").read_text()
    assert "VA-OPD, 2 seeds" in page
    assert "Standard OPD, 2 seeds" in page
    assert "line: mean; band: lowest to highest seed" in page


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


def test_a_band_covers_only_the_steps_that_all_seeds_have(tmp_path: Path) -> None:
    runs = [
        read_run(make_run(tmp_path / "long", accuracies=(0.3, 0.4, 0.5))),
        read_run(make_run(tmp_path / "short", accuracies=(0.3, 0.4))),
    ]
    assert seed_band(runs, band="range")[0] == [0, 10]


def test_the_plot_alone_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(make_run(tmp_path / "first"))
    assert main(["report", run, "--plot", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert main(["report", run]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{run}/report.html"
    assert main(["report", run, "--plot", str(tmp_path / "curves.txt")]) == 2


def test_a_line_that_is_just_being_written_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "eval", "step": 20, "acc')
    assert len(read_run(run).evaluations) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "eval", "step": 20}', r"metrics\.jsonl:23: accuracy is None; it must be a finite number"),
        ('{"kind": "eval", "step": 20, "accuracy": NaN}', r"metrics\.jsonl:23: accuracy is nan"),
        ("{", r"metrics\.jsonl:23 is not a JSON object"),
    ],
)
def test_a_missing_or_broken_number_is_an_error(tmp_path: Path, line: str, message: str) -> None:
    run = make_run(tmp_path / "first")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InvalidInput, match=message):
        read_run(run)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"config\.toml can't be read"):
        read_run(tmp_path)
