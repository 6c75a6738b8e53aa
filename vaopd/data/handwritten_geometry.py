r"""Generates handwritten geometry: small figures with numbers that are real scans of handwritten digits.

A figure of 96×96 px (a triangle, a rectangle or an angle) has handwritten numbers beside its sides. With the numbers
read, the rest is easy arithmetic; pixelated to 10 % the figure stays visible and the numbers do not. The scans
are the 1797 of `digits.csv.gz`, 8×8 px each: the test set of E. Alpaydin and C. Kaynak, Optical Recognition of
Handwritten Digits (UCI Machine Learning Repository, 1998, CC BY 4.0), as scikit-learn ships it. scikit-learn itself is
not installed: transformers would import it in every process, for a second. Each scan belongs to one split, for every
seed: a model that was trained on any training split has never seen a scan of a validation or test split.

>>> question = Question(kind="triangle_perimeter", numbers=(3, 4, 5))
>>> question.answer
'12'
>>> question.write_solution(phrasing=(0, 0, 0))
'The sides are 3, 4 and 5. The perimeter is 3+4+5=12. So the answer is \\boxed{12}.'
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageDraw

from vaopd.errors import InvalidInput
from vaopd.files.durable import atomic_file
from vaopd.telemetry.progress_line import Progress

if TYPE_CHECKING:
    import pyarrow as pa

Kind = Literal["triangle_perimeter", "triangle_longest", "rectangle_perimeter", "rectangle_area", "angle_complement"]
Split = Literal["train", "validation", "test"]
Scans = Mapping[int, np.ndarray]
"""Digit → its scans, (n, 8, 8) float, 0 (paper) to 1 (ink)."""

SIZE_PX = 96
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
HELD_OUT_PER_DIGIT = 20
"""Scans of each digit in the validation split, and as many in the test split; all others are for training."""
PHRASINGS = 4
COMMON_FIRST = (0.55, 0.25, 0.15, 0.05)
"""The probability of each phrasing, for each of the three sentences: the teacher's habit and that of `write`."""
COMMON_LAST = COMMON_FIRST[::-1]
"""The student's habit: it says the same in other words."""

_ASKED: dict[Kind, str] = {
    "triangle_perimeter": "Find the perimeter of the triangle.",
    "triangle_longest": "How long is the longest side of the triangle?",
    "rectangle_perimeter": "Find the perimeter of the rectangle.",
    "rectangle_area": "Find the area of the rectangle.",
    "angle_complement": "Find the complement of the angle.",
}
KINDS: tuple[Kind, ...] = tuple(_ASKED)
READ_QUESTION = "Read the numbers."
"""The auxiliary question of pre-training; the data sets that `write` makes don't contain it."""

_READ_SIDES = ("The sides are {}.", "The figure shows {}.", "I can read {} here.", "We are given {}.")
_READ_ANGLE = ("The angle is {}.", "The figure shows {}.", "I can read {} here.", "We are given {}.")
_WORKED = {
    "perimeter": (
        "The perimeter is {}.",
        "Adding the sides gives {}.",
        "All sides together make {}.",
        "Their sum is {}.",
    ),
    "longest": (
        "The longest side is {}.",
        "The greatest of them is {}.",
        "No side is longer than {}.",
        "Their maximum is {}.",
    ),
    "area": (
        "The area is {}.",
        "Multiplying the sides gives {}.",
        "Length times width makes {}.",
        "Their product is {}.",
    ),
    "complement": (
        "The complement is {}.",
        "Subtracting from 90 gives {}.",
        "What is left of 90 makes {}.",
        "The difference is {}.",
    ),
}
_ANSWERED = (
    r"So the answer is \boxed{{{}}}.",
    r"The answer is \boxed{{{}}}.",
    r"Therefore we get \boxed{{{}}}.",
    r"Hence it is \boxed{{{}}}.",
)

# The centre of each number, in pixels. The figures are not drawn to scale, so that no shape gives its numbers away.
_PLACES: dict[str, tuple[tuple[int, int], ...]] = {
    "triangle": ((17, 28), (79, 28), (48, 81)),
    "rectangle": ((17, 35), (60, 79)),
    "angle": ((63, 64),),
}
_DIGIT_PX = (24, 26)
_JITTER_PX = 2
_DIGIT_PITCH_PX = 20
"""From one digit of a number to the next: a scan has blank columns at both edges."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question about a figure, and the numbers written on it."""

    kind: Kind
    numbers: tuple[int, ...]

    @property
    def asked(self) -> str:
        """The question as text."""
        return _ASKED[self.kind]

    @property
    def figure(self) -> str:
        """The figure's name: triangle, rectangle or angle."""
        return self.kind.split("_")[0]

    @property
    def answer(self) -> str:
        """The number that answers the question."""
        return self._write_working().rpartition("=")[2]

    def write_reading(self, phrasing: int) -> str:
        """Returns the sentence that reads the numbers off the figure."""
        *first, last = (str(number) for number in self.numbers)
        listed = f"{', '.join(first)} and {last}" if first else last
        return (_READ_ANGLE if self.figure == "angle" else _READ_SIDES)[phrasing].format(listed)

    def write_solution(self, phrasing: tuple[int, int, int]) -> str:
        """Returns the chain of thought: the reading, the working, the answer."""
        worked = _WORKED[self.kind.split("_")[1]][phrasing[1]].format(self._write_working())
        return f"{self.write_reading(phrasing[0])} {worked} {_ANSWERED[phrasing[2]].format(self.answer)}"

    def _write_working(self) -> str:
        numbers = self.numbers
        if self.kind == "triangle_longest":
            return str(max(numbers))
        if self.kind == "rectangle_area":
            return f"{numbers[0]}*{numbers[1]}={numbers[0] * numbers[1]}"
        if self.kind == "angle_complement":
            return f"90-{numbers[0]}={90 - numbers[0]}"
        sides = numbers * 2 if self.figure == "rectangle" else numbers
        return f"{'+'.join(map(str, sides))}={sum(sides)}"


@cache
def load_scans(split: Split) -> Scans:
    """Loads the scans of one split; no two splits share one."""
    packed = resources.files("vaopd.data").joinpath("digits.csv.gz").read_bytes()
    lines = gzip.decompress(packed).decode().splitlines()
    table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)  # 64 pixels of 0 to 16, then the digit
    images, labels = table[:, :-1].reshape(-1, 8, 8), table[:, -1]
    order = np.random.default_rng(0).permutation(len(labels))
    parts = {
        "test": slice(0, HELD_OUT_PER_DIGIT),
        "validation": slice(HELD_OUT_PER_DIGIT, 2 * HELD_OUT_PER_DIGIT),
        "train": slice(2 * HELD_OUT_PER_DIGIT, None),
    }
    return {digit: images[order[labels[order] == digit][parts[split]]].astype(np.float32) / 16.0 for digit in range(10)}


def write_problems(
    make: Callable[[Split, np.random.Generator], Mapping[str, object]],
    folder: Path,
    *,
    seed: int,
    train: int,
    validation: int,
    test: int,
) -> None:
    """Writes folder/{train,validation,test}.parquet in Geometry3K's schema, with so many problems each.

    Columns: problem (the question after one "<image>" marker), answer (the number), images (one PNG), and, which
    Geometry3K lacks, solution (the chain of thought; for pre-training only). The same seed gives the same files.
    make: draws a row (`make_row`) with scans of a split.
    """
    import pyarrow.parquet as pq

    sizes = {"train": train, "validation": validation, "test": test}
    for name, number in {"seed": seed, **sizes}.items():
        if number < 0:
            raise InvalidInput(f"{name} must be 0 or more, got {number}")
    folder.mkdir(parents=True, exist_ok=True)
    for number, split in enumerate(SPLITS):
        rows = []
        progress = Progress(f"drawing {split}", total=sizes[split], unit="problems")
        for index in range(sizes[split]):
            # A generator of its own for each problem: the first n problems don't depend on how many follow.
            rows.append(make(split, np.random.default_rng([seed, number, index])))
            progress.report(index + 1)
        with atomic_file(folder / f"{split}.parquet") as file:
            pq.write_table(_make_table(rows), file, row_group_size=256)


def make_row(asked: str, answer: str, image: Image.Image, solution: str) -> dict[str, object]:
    """Makes a row of a data set."""
    png = io.BytesIO()
    image.save(png, format="PNG")
    return {
        "problem": f"<image>{asked}",
        "answer": answer,
        "images": [{"bytes": png.getvalue(), "path": None}],
        "solution": solution,
    }


def _make_row(split: Split, rng: np.random.Generator) -> dict[str, object]:
    question = draw_question(rng)
    image = draw(question, load_scans(split), rng)
    return make_row(question.asked, question.answer, image, question.write_solution(draw_phrasing(rng)))


write = partial(write_problems, _make_row)
"""Writes a data set of this task."""


def _make_table(rows: list[Mapping[str, object]]) -> pa.Table:
    import pyarrow as pa

    text = {"dtype": "string", "_type": "Value"}
    features = {
        "problem": text,
        "answer": text,
        "images": {"feature": {"_type": "Image"}, "_type": "List"},
        "solution": text,
    }
    schema = pa.schema(
        [
            ("problem", pa.string()),
            ("answer", pa.string()),
            ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
            ("solution", pa.string()),
        ],
        # How `datasets` knows that the bytes are images.
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    return pa.Table.from_pylist(rows, schema=schema)


def draw_question(rng: np.random.Generator) -> Question:
    """Draws a question, each kind equally often.

    Sides are from 1 to 9, three of them always a possible triangle; angles from 10 to 89.
    """
    kind = KINDS[rng.integers(len(KINDS))]
    if kind == "angle_complement":
        return Question(kind=kind, numbers=(int(rng.integers(10, 90)),))
    if kind.startswith("rectangle"):
        return Question(kind=kind, numbers=tuple(map(int, rng.integers(1, 10, size=2))))
    while True:
        sides = tuple(map(int, rng.integers(1, 10, size=3)))
        if 2 * max(sides) < sum(sides):
            return Question(kind=kind, numbers=sides)


def draw_phrasing(rng: np.random.Generator, habit: tuple[float, ...] = COMMON_FIRST) -> tuple[int, int, int]:
    """Draws a phrasing for each of the three sentences, independently."""
    first, second, third = rng.choice(PHRASINGS, size=3, p=habit)
    return int(first), int(second), int(third)


def draw(question: Question, scans_by_digit: Scans, rng: np.random.Generator) -> Image.Image:
    """Draws the figure with its handwritten numbers: an RGB image of 96×96 px, dark on white."""
    image = Image.new("L", (SIZE_PX, SIZE_PX), 255)
    _draw_figure(ImageDraw.Draw(image), question.figure, rng)
    page = np.asarray(image, dtype=np.float32).copy()
    for number, place in zip(question.numbers, _PLACES[question.figure], strict=True):
        write_number(page, str(number), place, scans_by_digit, rng)
    return Image.fromarray(page.round().astype(np.uint8)).convert("RGB")


def _draw_figure(pen: ImageDraw.ImageDraw, figure: str, rng: np.random.Generator) -> None:
    shift = rng.integers(-2, 3, size=4).tolist()
    if figure == "triangle":
        corners = [(48 + shift[0], 8), (20 + shift[1], 64), (76 + shift[2], 64), (48 + shift[0], 8)]
        pen.line(corners, fill=0, width=2, joint="curve")
    elif figure == "rectangle":
        pen.rectangle((36 + shift[0], 10 + shift[1], 86 + shift[2], 60 + shift[3]), outline=0, width=2)
    else:
        corner, tip = (10, 84 + shift[0]), (56 + shift[1], 12)
        pen.line([tip, corner, (88, corner[1])], fill=0, width=2, joint="curve")
        pen.arc((corner[0] - 22, corner[1] - 22, corner[0] + 22, corner[1] + 22), -57, 0, fill=0, width=1)


def write_number(
    page: np.ndarray, number: str, place: tuple[int, int], scans_by_digit: Scans, rng: np.random.Generator
) -> None:
    """Puts the digits on the page (96, 96), in place; ink only darkens."""
    for position, digit in enumerate(number):
        choices = scans_by_digit[int(digit)]
        scan = Image.fromarray((choices[rng.integers(len(choices))] * 255).astype(np.uint8))
        size = int(rng.choice(_DIGIT_PX))
        ink = np.asarray(scan.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
        dx, dy = rng.integers(-_JITTER_PX, _JITTER_PX + 1, size=2).tolist()
        centre_x = place[0] + dx + round((position - (len(number) - 1) / 2) * _DIGIT_PITCH_PX)
        left = min(max(centre_x - size // 2, 0), SIZE_PX - size)
        top = min(max(place[1] + dy - size // 2, 0), SIZE_PX - size)
        patch = page[top : top + size, left : left + size]
        np.minimum(patch, 255 - ink, out=patch)
