"""`vaopd score` as a user meets it, in front of a real teacher; and its drawings."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest

from tests.support.models import model_folder
from tests.support.teacher import TeacherInProcess, drawing, teacher_in_process
from vaopd.cli import main
from vaopd.cli.output import wants_colour
from vaopd.http_types import DegradationModel, RolloutScore, ScoreReply, Token
from vaopd.scoring import views
from vaopd.vlm.model import Vlm

QUESTION = "What is the perimeter?"


@pytest.fixture
def arguments(teacher: TeacherInProcess, tmp_path: Path) -> list[str]:
    drawing(1).save(tmp_path / "image.png")
    return ["score", "--teacher", teacher.target, "--image", str(tmp_path / "image.png"), "--question", QUESTION]


def by_hand(texts: list[str], va: list[float], *, degraded: float = -4.0) -> ScoreReply:
    """A score whose numbers are easy to follow: every token has log-prob −1 and a VA of its own."""
    rollout = RolloutScore(
        tokens=[Token(id=index, text=text) for index, text in enumerate(texts)],
        teacher_logprobs=[-1.0] * len(texts),
        degraded_logprobs=[degraded] * len(texts),
        visual_advantage=va,
        high_group=[value == max(va) for value in va],
        mean_visual_advantage=sum(va) / len(va),
        rollout_weight=1.0,
    )
    return ScoreReply(
        model="by hand",
        revision="",
        prompt_tokens=3,
        degradation=DegradationModel(),
        high_fraction=0.2,
        share_of_top_10=0.8,
        share_of_top_20=0.8,
        rollouts=[rollout],
    )


def test_json_is_what_the_api_answers(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--response", "It is 12.", "--response", "It is 7.", "--json"]) == 0
    reply = ScoreReply.model_validate_json(capsys.readouterr().out)
    assert [len(rollout.tokens) for rollout in reply.rollouts] == [
        len(rollout.visual_advantage) for rollout in reply.rollouts
    ]
    assert sum(rollout.rollout_weight for rollout in reply.rollouts) == pytest.approx(1)


def test_without_a_terminal_it_is_a_plain_table_and_a_histogram(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--response", "It is 12."]) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert re.search(r"^'I' +-?\d+\.\d{3} +-?\d+\.\d{3} +\d\.\d{3}", told, re.MULTILINE)
    assert "share of all VA" in told


def test_a_terminal_shows_the_text_coloured() -> None:
    """VA 4 of at most 4 is full colour, and the high group is underlined; 0 is none."""
    (_, text, *_) = views.make_terminal_lines(by_hand(["It", " is", " 7"], [0.0, 0.0, 4.0]), colour=True, table=False)
    assert text == f"It is\x1b[30;48;5;{views.RAMP[-1]};4m 7\x1b[0m"


def test_what_seeing_speaks_against_is_red() -> None:
    (_, text, *_) = views.make_terminal_lines(by_hand(["8", "9"], [0.0, 0.1], degraded=-0.1), colour=True, table=False)
    assert "\x1b[31m8" not in text  # 0.9 nats are not much
    (_, text, *_) = views.make_terminal_lines(by_hand(["8", "9"], [0.0, 0.1], degraded=0.5), colour=True, table=False)
    assert text.startswith("\x1b[31m8\x1b[0m")


def test_a_token_can_t_command_the_terminal() -> None:
    (_, text, *_) = views.make_terminal_lines(by_hand(["\x1b[2J", "a"], [0.0, 0.5]), colour=True, table=False)
    assert "\x1b[2J" not in text


def test_colour_is_for_terminals_and_for_those_who_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert wants_colour(True)
    assert not wants_colour(False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour(True)


def test_the_histogram_by_hand() -> None:
    """Ten tokens: eight without VA, one of 0.5 and one of 2, so a fifth and four fifths of all VA."""
    reply = by_hand(["a"] * 10, [0.0] * 8 + [0.5, 2.0])
    rows = {name: (tokens, share) for name, tokens, share in views.make_histogram(reply)}
    assert rows["0 – 0.01"] == (0.8, 0.0)
    assert rows["0.3 – 1"] == (0.1, 0.2)
    assert rows["1 – 3"] == (0.1, 0.8)
    assert sum(tokens for tokens, _ in rows.values()) == pytest.approx(1)


def test_png_and_html_hold_the_score(arguments: list[str], tmp_path: Path) -> None:
    png, page = tmp_path / "score.png", tmp_path / "score.html"
    assert main([*arguments, "--response", "It is 12.", "--png", str(png), "--html", str(page)]) == 0
    with PIL.Image.open(png) as image:
        assert image.width == 2000
        assert image.getpixel((image.width - 1, image.height - 1)) == (255, 255, 255)
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 2  # both views
    assert not re.search(r"(src|href)=\"?http", text)


def test_the_views_are_those_of_the_teachers_pixel_bounds(tmp_path: Path) -> None:
    """A picture of 30 × 40, scaled to 1024 px, is 27 × 36 and has 2 × 3 cells; as stored it would have 3 × 4."""
    vlm = Vlm.load(model_folder("teacher"), max_pixels=1024)
    assert vlm.pixel_bounds == (1024, 1024)
    drawing(1, (30, 40)).save(tmp_path / "image.png")
    page = tmp_path / "score.html"
    with teacher_in_process(vlm) as teacher:
        asked = ["--image", str(tmp_path / "image.png"), "--question", QUESTION, "--response", "It is 12."]
        assert main(["score", "--teacher", teacher.target, *asked, "--html", str(page)]) == 0
    shown = [base64.b64decode(text) for text in re.findall('data:image/png;base64,([^"]+)', page.read_text())]
    original, degraded = (PIL.Image.open(io.BytesIO(png)) for png in shown)
    assert original.size == degraded.size == (27, 36)
    columns = {degraded.crop((x, 0, x + 1, 36)).tobytes() for x in range(27)}
    rows = {degraded.crop((0, y, 27, y + 1)).tobytes() for y in range(36)}
    assert (len(columns), len(rows)) == (2, 3)


def test_a_column_on_request_is_in_table_and_json(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*arguments, "--response", "It is 12.", "--columns", "teacher_entropy_nats"]
    assert main([*asked, "--json"]) == 0
    (rollout,) = ScoreReply.model_validate_json(capsys.readouterr().out).rollouts
    assert main([*asked, "--table"]) == 0
    heading, first = capsys.readouterr().out.splitlines()[1:3]
    assert heading.split() == ["token", "original", "degraded", "VA", "teacher_entropy_nats"]
    assert first.split()[4] == f"{rollout.columns['teacher_entropy_nats'][0]:.3f}"


def test_a_degraded_view_is_named_with_its_strength_if_it_has_one() -> None:
    reply = by_hand(["a"], [0.1])
    assert "by hand, degraded view: pixelate 0.1." in views.render_html(reply, question="?", views=[])
    black = reply.model_copy(update={"degradation": DegradationModel(kind="black")})
    assert "by hand, degraded view: black." in views.render_html(black, question="?", views=[])


def test_texts_are_no_markup_in_the_html() -> None:
    text = views.render_html(by_hand(["<script>"], [0.1]), question="<img src=x>", views=[])
    assert "<script>" not in text
    assert "<img" not in text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--response", "a", "--degradation", "melt"], "--degradation 'melt' is unknown; use one of pixelate"),
        (["--response", "a", "--image", "nowhere.png"], "image 'nowhere.png' can't be read (No such file"),
        (["--response", "a", "--columns", "warmth"], "column 'warmth' can't be asked for"),
        (["--generate"], "--generate needs --student MODEL"),
        (["--response", "a", "--teacher", "localhost"], "teacher address 'localhost' is not HOST:PORT"),
        (["--response", "a", "--png", "/nowhere/a.png"], "can't be written (No such file"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(
    arguments: list[str], change: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *change]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.slow
def test_the_student_s_own_answers_can_be_scored(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "vaopd.cli", *arguments, "--generate", "2"]
    command += ["--student", str(model_folder("student")), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)["rollouts"]) == 2
