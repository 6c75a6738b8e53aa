"""The generated geometry problems: right answers, splits that share no scan, files that are the same every time."""

from __future__ import annotations

import io
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vaopd.data.handwritten_geometry import (
    COMMON_FIRST,
    COMMON_LAST,
    KINDS,
    SPLITS,
    Question,
    draw,
    draw_phrasing,
    draw_question,
    load_scans,
    write,
)
from vaopd.degradation import pixelate
from vaopd.errors import InvalidInput
from vaopd.evaluation import is_correct


@pytest.mark.parametrize(
    ("kind", "numbers", "solution", "answer"),
    [
        (
            "triangle_perimeter",
            (3, 4, 5),
            r"The sides are 3, 4 and 5. The perimeter is 3+4+5=12. So the answer is \boxed{12}.",
            "12",
        ),
        (
            "triangle_longest",
            (3, 5, 4),
            r"The sides are 3, 5 and 4. The longest side is 5. So the answer is \boxed{5}.",
            "5",
        ),
        (
            "rectangle_perimeter",
            (2, 7),
            r"The sides are 2 and 7. The perimeter is 2+7+2+7=18. So the answer is \boxed{18}.",
            "18",
        ),
        ("rectangle_area", (2, 7), r"The sides are 2 and 7. The area is 2*7=14. So the answer is \boxed{14}.", "14"),
        ("angle_complement", (37,), r"The angle is 37. The complement is 90-37=53. So the answer is \boxed{53}.", "53"),
    ],
)
def test_each_kind_of_question_with_its_chain_of_thought(
    kind: str, numbers: tuple[int, ...], solution: str, answer: str
) -> None:
    question = Question(kind=kind, numbers=numbers)  # type: ignore[arg-type]

    assert question.write_solution((0, 0, 0)) == solution
    assert question.answer == answer
    assert is_correct(solution, answer)


def test_random_questions_cover_every_kind_and_are_possible_figures() -> None:
    questions = [draw_question(np.random.default_rng(i)) for i in range(500)]

    assert {question.kind for question in questions} == set(KINDS)
    for question in questions:
        if question.figure == "triangle":
            a, b, c = sorted(question.numbers)
            assert a + b > c
        if question.figure == "angle":
            assert 10 <= question.numbers[0] <= 89


def test_teacher_and_student_habits_are_opposite() -> None:
    assert tuple(reversed(COMMON_LAST)) == COMMON_FIRST
    rng = np.random.default_rng(0)
    drawn = np.array([draw_phrasing(rng, COMMON_LAST) for _ in range(2000)])

    assert np.abs(np.bincount(drawn.ravel(), minlength=4) / drawn.size - COMMON_LAST).max() < 0.02


def test_no_two_splits_share_a_scan() -> None:
    seen = {split: {scan.tobytes() for images in load_scans(split).values() for scan in images} for split in SPLITS}

    for one, other in combinations(SPLITS, 2):
        assert not seen[one] & seen[other]
    assert [len(images) for images in load_scans("test").values()] == [20] * 10


def test_pixelation_hides_the_number_and_keeps_the_figure() -> None:
    """Two figures that differ in one digit are far apart when sharp, and nearly the same pixelated."""

    def drawn(numbers: tuple[int, int, int]) -> Image.Image:
        return draw(Question(kind="triangle_perimeter", numbers=numbers), load_scans("train"), np.random.default_rng(0))

    def distance(one: Image.Image, other: Image.Image) -> float:
        return float(np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).max())

    one, other = drawn((3, 4, 5)), drawn((8, 4, 5))

    assert (one.size, one.mode) == ((96, 96), "RGB")
    assert distance(one, other) > 200
    assert distance(pixelate(one), pixelate(other)) < 100
    # The apex of the triangle, at the top in the middle, is still darker than the paper beside it.
    top = np.asarray(pixelate(one).convert("L"))[:20]
    assert top[:, 43:53].min() < top[:, :10].min()


def test_the_files_have_geometry3ks_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, seed=3, train=4, validation=2, test=3)

    assert "drawing train: 4/4 problems" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.parquet", "train.parquet", "validation.parquet"]
    rows = pq.read_table(tmp_path / "test.parquet").to_pylist()
    assert len(rows) == 3
    for row in rows:
        assert row["problem"].startswith("<image>")
        assert row["problem"].count("<image>") == len(row["images"]) == 1
        assert row["answer"].isdigit()
        assert row["solution"].endswith(rf"\boxed{{{row['answer']}}}.")
        assert Image.open(io.BytesIO(row["images"][0]["bytes"])).size == (96, 96)


def test_a_seed_gives_the_same_problems_however_many_follow(tmp_path: Path) -> None:
    write(tmp_path / "few", seed=3, train=2, validation=0, test=0)
    write(tmp_path / "more", seed=3, train=5, validation=0, test=0)
    write(tmp_path / "other", seed=4, train=2, validation=0, test=0)
    few, more, other = (
        pq.read_table(tmp_path / name / "train.parquet").to_pylist() for name in ("few", "more", "other")
    )

    assert few == more[:2]
    assert few != other


def test_datasets_sees_images_in_the_files(tmp_path: Path) -> None:
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    write(tmp_path / "set", seed=3, train=2, validation=0, test=0)
    loaded = load_dataset(
        "parquet", data_files=str(tmp_path / "set/train.parquet"), split="train", cache_dir=str(tmp_path)
    )

    assert isinstance(loaded.features["images"].feature, ImageFeature)
    assert loaded[0]["images"][0].size == (96, 96)


@pytest.mark.parametrize("wrong", [{"train": -1}, {"seed": -1}])
def test_negative_numbers_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidInput, match="must be 0 or more, got -1"):
        write(tmp_path, **{"seed": 0, "train": 1, "validation": 1, "test": 1, **wrong})
