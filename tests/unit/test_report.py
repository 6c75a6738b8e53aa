"""The report of a run: what its folder says, as one HTML file; several runs are compared by objective."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from tests.support.runs import change_settings, jpeg, make_run, read_charts
from vaopd.cli import main
from vaopd.errors import InvalidInput, NotFound
from vaopd.pb import teacher_pb2
from vaopd.report import report_html, write_report
from vaopd.report.charts import make_charts
from vaopd.report.curves import smooth
from vaopd.report.rollouts import select_samples
from vaopd.run import settings
from vaopd.run.records import read_run
from vaopd.run.status import StatusWriter
from vaopd.types import Degradation, EncodedImage, TeacherLimits
from vaopd.vlm.families import PreparedImage
from vaopd_teacher.intake.image_stores import ImageStore, PreparedImages
from vaopd_teacher.intake.prepare import CallSettings, Preparer


def test_a_run_is_one_self_contained_page(tmp_path: Path) -> None:
    path = write_report([make_run(tmp_path / "first")])
    assert path == tmp_path / "first" / "report.html"
    page = path.read_text()
    charts = read_charts(page)
    assert [chart["title"] for chart in charts] == [
        "Held-out accuracy",
        "Reverse KL by token group",
        "Loss",
        "Mean visual advantage",
        "Share of all VA in the top 10 % of tokens",
        "Entropy of the rollout weights",
        "Where a step's time goes",
    ]
    (accuracy,) = charts[0]["series"]
    assert (accuracy["x"], accuracy["y"], accuracy["error"]) == ([0, 10, 20], [30, 50, 60], [3, 3, 3])
    assert "30.0 % ± 3.0" in page
    assert "60.0 % ± 3.0<small>+30.0 points" in page
    assert "<td>objective.variant</td><td>va_opd</td>" in page
    assert re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page) == []  # nothing is loaded from elsewhere


def read_samples(page: str) -> dict[str, Any]:
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', page, re.S)
    samples: dict[str, Any] = json.loads(data)
    return samples


def list_rollouts(page: str) -> list[dict[str, Any]]:
    return [rollout for group in read_samples(page)["groups"] for rollout in group["rollouts"]]


def test_questions_that_were_not_asked_and_records_left_out_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first", accuracies=(0.3, 0.5))
    line = {"kind": "eval", "step": 20, "prompts": 150, "samples": 8, "not_asked": {"picture": 30, "over-long": 20}}
    last_step = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**last_step, "step": 20, "records_left_out": 3.0}) + "\n")
        file.write(json.dumps({**line, "accuracy": 0.9, "standard_error": 0.03}) + "\n")
    page = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", write_report([run]).read_text()))
    assert "90.0 % ± 3.0 (50 of 200 not asked)" in page
    assert "50 problems 30 picture, 20 over-long" in page
    assert "bad records left out 3 of the training split" in page


def test_an_evaluation_in_which_nothing_was_asked_has_no_accuracy(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first", accuracies=(0.3,))
    line = {"kind": "eval", "step": 20, "prompts": 0, "samples": 8, "not_asked": {"picture": 200}}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**line, "accuracy": None, "standard_error": None}) + "\n")
    run = read_run(folder)
    assert [evaluation.step for evaluation in run.evaluations] == [0]
    assert run.finished
    page = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", report_html([run])))
    assert "held-out accuracy, step 20 none no question could be asked: 200 picture" in page


def test_judge_and_answers_it_did_not_judge_stand_beside_the_accuracy(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first")
    line = {"kind": "eval", "step": 20, "accuracy": 0.9, "standard_error": 0.03, "prompts": 300, "samples": 1}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**line, "judge": "2, math-verify 0.9.0", "not_judged": 4}) + "\n")
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    for sample, verdict in zip(samples, ("right", "not judged", "wrong"), strict=False):
        sample["verdict"] = verdict
    (run / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    page = write_report([run]).read_text()
    assert "90.0 % ± 3.0 (4 not judged)" in page
    assert "1 and 2, math-verify 0.9.0" in page  # the earlier ones were judged before versions were recorded
    assert [rollout["verdict"] for rollout in list_rollouts(page)[:3]] == ["right", "not judged", "wrong"]


def test_the_student_s_own_va_is_shown_where_it_was_measured(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first", accuracies=(0.3, 0.5))
    assert "own VA" not in write_report([run]).read_text()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line, va in zip(lines[:2], (0.125, 0.25), strict=True):
        line |= {"student_va": va, "student_va_error": 0.01, "student_va_prompts": 9}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report([run]).read_text()
    assert "0.250 nats<small>first 0.125, ± 0.010; on its answers to 9 held-out problems" in page
    (chart,) = (each for each in read_charts(page) if "own VA" in each["title"])
    (series,) = chart["series"]
    assert (series["x"], series["y"], series["error"]) == ([0, 10], [0.125, 0.25], [0.01, 0.01])
    lines[1].pop("student_va_error")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InvalidInput, match="student_va_error is None"):
        read_run(run)


def test_what_a_run_did_not_record_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "old")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("weights_entropy", None)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "samples.jsonl").unlink()
    page = write_report([run]).read_text()
    assert "Entropy" not in page
    assert "Rollouts" not in page


def test_the_rollouts_of_every_recorded_step_are_in_the_page(tmp_path: Path) -> None:
    """In thousandths of a nat. What a model or a data set wrote is text, never markup."""
    page = write_report([make_run(tmp_path / "first")]).read_text()
    samples = read_samples(page)
    assert samples["totals"] == {"0": 1, "5": 1, "10": 1}
    assert [group["step"] for group in samples["groups"]] == [0, 5, 10]
    first = samples["groups"][0]["rollouts"][0]
    assert (first["tokens"], first["weight"], first["high"]) == (["3", " <", "\n"], 0.75, [2])
    assert first["numbers"] == {"VA": [500, 0, 9000], "teacher": [-100, -200, -300]}
    assert samples["groups"][0]["question"] == "Is 3 < 4?"
    assert "Is 3 <" not in page


def test_long_rollouts_leave_room_for_fewer_groups_of_each_step(tmp_path: Path) -> None:
    """Three groups of two rollouts of three tokens, so that 36 tokens are two groups of each of three steps."""
    folder = make_run(tmp_path / "first")
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    lines = [{**line, "group_id": f"{line['group_id']}-{copy}"} for copy in range(3) for line in lines]
    lines.sort(key=lambda line: line["step"])
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = select_samples(read_run(folder), tokens=36)
    assert samples is not None
    assert samples["totals"] == {0: 3, 5: 3, 10: 3}
    assert [group["step"] for group in samples["groups"]] == [0, 0, 5, 5, 10, 10]


def test_without_any_visual_advantage_there_is_no_high_group(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first")
    text = (folder / "samples.jsonl").read_text().replace("[0.5, 0.0, 9.0]", "[0.0, 0.0, 0.0]")
    (folder / "samples.jsonl").write_text(text)
    assert [rollout["high"] for rollout in list_rollouts(report_html([read_run(folder)]))] == [[]] * 6


def test_the_image_stands_beside_its_degraded_view(tmp_path: Path) -> None:
    page = write_report([make_run(tmp_path / "first")]).read_text()
    pictures = read_samples(page)["groups"][0]["pictures"]
    assert [picture["name"] for picture in pictures] == ["the image", "degraded: pixelate"]


def test_the_noise_shown_is_the_noise_that_the_teacher_saw(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first")
    with (run / "config.toml").open("a") as file:
        file.write('[degradation]\nkind = "noise"\n')
    _, shown = read_samples(write_report([run]).read_text())["groups"][0]["pictures"]
    assert shown["name"] == "degraded: noise"
    image = EncodedImage(data=base64.b64decode(jpeg()))
    data = base64.b64decode(shown["url"].partition(",")[2])
    assert Image.open(io.BytesIO(data)).convert("RGB").tobytes() == teacher_s_noise(image).tobytes()


def teacher_s_noise(image: EncodedImage) -> Image.Image:
    """The degraded view as the teacher's intake hands it to its image processor."""
    seen: list[Image.Image] = []

    def prepare_image(pixels: Image.Image) -> PreparedImage:
        seen.append(pixels)
        return PreparedImage(pixel_values=torch.zeros(1), grid=(1, 1, 1), num_tokens=1)

    reader: Any = SimpleNamespace(
        max_tokens=9,
        scale_image=lambda image: image,
        prepare_image=prepare_image,
        read_token_ids=lambda *_: None,
        check_response=lambda *_, **__: None,
    )
    store = ImageStore(10_000)
    store.put(image)
    preparer = Preparer(reader, store=store, views=PreparedImages(10_000), limits=TeacherLimits())
    group = teacher_pb2.PromptGroup(
        group_id="g",
        tokens=teacher_pb2.TokenPrompt(token_ids=[1], image_sha256=[image.sha256]),
        rollouts=[teacher_pb2.RolloutTokens(rollout_id="0", response_ids=[2])],
    )
    preparer.prepare(group, CallSettings(payload="none", top_k=0, degradation=Degradation(kind="noise")))
    _original, degraded = seen
    return degraded


def test_the_run_s_own_fraction_of_tokens_is_marked(tmp_path: Path) -> None:
    """⌈0.5 · 3⌉ = 2 of the VA 0.5, 0 and 9."""
    run = make_run(tmp_path / "first")
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace("[objective]\n", "[objective]\nhigh_fraction = 0.5\n"))
    assert [rollout["high"] for rollout in list_rollouts(write_report([run]).read_text())] == [[0, 2]] * 6


@pytest.mark.parametrize(
    ("token_score", "key", "name"),
    [
        ("view_divergence", "view_divergence_nats", "view divergence"),
        ("expected", "expected_va_nats", "expected VA"),
    ],
)
def test_the_high_group_is_that_of_the_run_s_own_token_score(
    tmp_path: Path, token_score: str, key: str, name: str
) -> None:
    """By view divergence the second token of VA 0, which the student misread, is the high one."""
    run = make_run(tmp_path / "first")
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace("[objective]\n", f'[objective]\ntoken_score = "{token_score}"\n'))
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    for sample in samples:
        sample[key] = [0.5, 2.0, 1.0]
    (run / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    rollouts = list_rollouts(write_report([run]).read_text())
    assert [rollout["high"] for rollout in rollouts] == [[1]] * 6
    assert rollouts[0]["numbers"][name] == [500, 2000, 1000]


def test_the_running_mean_by_hand() -> None:
    assert smooth([1.0, 2.0, 6.0, 3.0], width=3) == pytest.approx([1.5, 3.0, 11 / 3, 4.5])


def test_the_time_left_by_hand(tmp_path: Path) -> None:
    """5 of 20 steps done, 2 s apart: 30 s."""
    run = read_run(make_run(tmp_path / "begun", steps=5))
    assert run.time_left == timedelta(seconds=30)
    assert read_run(make_run(tmp_path / "one", steps=1)).time_left is None


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
    assert len(read_run(run).evaluations) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "eval", "step": 20}', r"metrics\.jsonl:24: accuracy is None; it must be a finite number"),
        ('{"kind": "eval", "step": 20, "accuracy": NaN}', r"metrics\.jsonl:24: accuracy is nan"),
        ("{", r"metrics\.jsonl:24 is not a JSON object"),
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


def test_a_run_that_has_just_been_started_has_a_page_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first")
    (run / "metrics.jsonl").unlink()
    (run / "samples.jsonl").unlink()
    page = write_report([run]).read_text()
    assert "No step has been taken yet." in page
    assert "0 of 20<small>not finished" in page


def test_a_password_in_an_address_is_not_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first")
    with (run / "config.toml").open("a") as file:
        file.write('[queue]\nurl = "rediss://trainer:s3cret@redis:6379/0"\n')
    page = write_report([run]).read_text()
    assert "rediss://…@redis:6379/0" in page
    assert "s3cret" not in page


def test_only_a_live_page_asks_for_itself_again(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "first"))
    kept, live = report_html([run]), report_html([run], again_s=15)
    assert "connect-src" not in re.sub(r"<script>.*", "", kept, flags=re.S)
    assert '<body data-again="15">' in live
    assert "connect-src 'self'" in live


def test_the_script_that_runs_is_the_page_s_own(tmp_path: Path) -> None:
    """Its hash stands in the page's policy: markup that slipped in could run nothing."""
    page = report_html([read_run(make_run(tmp_path / "first"))])
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in page


def test_a_run_that_failed_says_so_at_the_top(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first", steps=5)
    with StatusWriter(run, role="trainer") as status:
        status.write("failed", step=5, reason="no room on <the disk>")
    page = write_report([run]).read_text()
    assert "The run failed at step 5: no room on &lt;the disk&gt;" in page
    assert '<p class="state failed">' in page
    assert "5 of 20<small>failed" in page


def test_models_data_and_dates_stand_at_the_top(tmp_path: Path) -> None:
    """Two starts, ten minutes apart; stopped an hour and a half after the first."""
    run = make_run(tmp_path / "first", steps=5)
    change_settings(run, "[objective]", '[student]\nmodel = "small"\n[data]\nsource = "figures"\n[objective]')
    teacher = {"model": "large", "revision": "0123456789abcdef"}
    for time_s in (1_000_000_000.0, 1_000_000_600.0):
        settings.append(run, {"step": 0, "time_s": time_s, "changes": {}, "teacher": teacher})
    with StatusWriter(run, role="trainer", clock=lambda: 1_000_005_400.0) as status:
        status.write("stopped", step=5)
    page = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", write_report([run]).read_text()))
    assert "The run was stopped at step 5. student small teacher large, revision 0123456789ab data figures" in page
    assert "started 2001-09-09 01:46 UTC, 2 times; last 2001-09-09 01:56 UTC" in page
    assert "ended 2001-09-09 03:16 UTC, after 1:30:00" in page


def test_long_curves_are_averaged_over_equal_stretches(tmp_path: Path) -> None:
    """1200 steps become 600 points: the means of two neighbours each."""
    run = make_run(tmp_path / "first", steps=1200)
    faint = next(chart for chart in make_charts(read_run(run)) if chart["title"] == "Loss")["series"][0]
    assert (len(faint["x"]), faint["x"][:3], faint["x"][-1]) == (600, [0.5, 2.5, 4.5], 1198.5)
