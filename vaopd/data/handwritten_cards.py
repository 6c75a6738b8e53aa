r"""Generates handwritten cards: five handwritten digits in a picture, and a long answer about them.

The task of `make claims`: an answer has 88 tokens, of which the five digits that it reads off the picture are 6 %; the
rest are words that the picture has nothing to do with, and the last card's digit once more, the answer. The next word
depends on the last two. Two writers, the teacher's and the student's, use the same words and have other habits, so a
student has a language to learn beside its reading.

>>> Question(digits=(3, 4, 5, 6, 7)).write_reading()
' A3 B4 C5 D6 E7 \\boxed{7}'
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import numpy as np
from PIL import Image

from vaopd.data.handwritten_geometry import SIZE_PX, Scans, Split, load_scans, make_row, write_number, write_problems

Habit = Literal["teacher", "student"]

CARDS = "ABCDE"
WORDS = (
    *("moss", "lamp", "river", "stone", "bread", "cloud", "horn", "field"),
    *("glass", "winter", "rope", "salt", "bird", "smoke", "garden", "iron"),
)
ASKED = "Which number is on the last card?"
READ_QUESTION = "Read the cards."
"""The auxiliary question of pre-training; the data sets that `write` makes don't contain it."""
BEFORE_A_CARD = 12
"""Words before each card, and before the answer."""
NUM_WORDS = BEFORE_A_CARD * (len(CARDS) + 1)
_SECOND_ORDER, _SUCCESSORS, _FLOOR = 0.6, 5, 0.02
_PLACES = ((16, 16), (80, 16), (48, 48), (16, 80), (80, 80))
"""The centre of each card, in pixels: that of the 32×32 px which become one image token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """The digits of five cards."""

    digits: tuple[int, ...]

    @property
    def answer(self) -> str:
        """The last digit, which answers the question."""
        return str(self.digits[-1])

    def write_reading(self) -> str:
        """Returns the answer to READ_QUESTION: the long answer without its words."""
        read = "".join(f" {card}{digit}" for card, digit in zip(CARDS, self.digits, strict=True))
        return rf"{read} \boxed{{{self.answer}}}"

    def write_solution(self, words: np.ndarray) -> str:
        """Returns the long answer: `words` (72,) are places in `WORDS`."""
        blocks = ["".join(f" {WORDS[word]}" for word in block) for block in words.reshape(-1, BEFORE_A_CARD)]
        read = "".join(f"{block} {card}{digit}" for block, card, digit in zip(blocks, CARDS, self.digits, strict=False))
        return rf"{read}{blocks[-1]} \boxed{{{self.answer}}}"


@cache
def load_habit(habit: Habit) -> np.ndarray:
    """Returns the probability of each next word after any last two, (W, W, W); the first words follow word 0."""
    rng = np.random.default_rng({"teacher": 100, "student": 999}[habit])
    pairs, triples = _draw_table(rng, 1), _draw_table(rng, len(WORDS))
    mixed = (1 - _SECOND_ORDER) * pairs + _SECOND_ORDER * triples
    return (1 - _FLOOR) * mixed + _FLOOR / len(WORDS)


def draw_words(rng: np.random.Generator, habit: Habit) -> tuple[np.ndarray, np.ndarray]:
    """Draws the words of an answer: -> places in `WORDS` (72,), and what was expected of each, (72, W)."""
    table = load_habit(habit)
    cumulated = _cumulate(habit)
    before = last = 0
    words, expected = [], []
    for uniform in rng.random(NUM_WORDS):
        expected.append(table[before, last])
        drawn = int(np.searchsorted(cumulated[before, last], uniform * cumulated[before, last, -1], side="right"))
        before, last = last, drawn
        words.append(drawn)
    return np.array(words), np.stack(expected)


def draw_question(rng: np.random.Generator) -> Question:
    """Draws five digits, each equally often."""
    return Question(digits=tuple(map(int, rng.integers(0, 10, size=len(CARDS)))))


def draw(question: Question, scans_by_digit: Scans, rng: np.random.Generator) -> Image.Image:
    """Draws the five cards: an RGB image of 96×96 px, dark on white."""
    page = np.full((SIZE_PX, SIZE_PX), 255, dtype=np.float32)
    for digit, place in zip(question.digits, _PLACES, strict=True):
        write_number(page, str(digit), place, scans_by_digit, rng)
    return Image.fromarray(page.round().astype(np.uint8)).convert("RGB")


def _make_row(split: Split, rng: np.random.Generator) -> dict[str, object]:
    question = draw_question(rng)
    image = draw(question, load_scans(split), rng)
    solution = question.write_solution(draw_words(rng, "teacher")[0])
    return make_row(ASKED, question.answer, image, solution)


write = partial(write_problems, _make_row)
"""Writes folder/{train,validation,test}.parquet as `handwritten_geometry.write` does, with the same arguments."""


@cache
def _cumulate(habit: Habit) -> np.ndarray:
    return load_habit(habit).cumsum(-1)


def _draw_table(rng: np.random.Generator, contexts: int) -> np.ndarray:
    """Returns five successors of each word in so many contexts, weighed as 1, 1/2, … 1/5: (contexts, W, W)."""
    weights = 1 / np.arange(1, _SUCCESSORS + 1)
    table = np.zeros((contexts * len(WORDS), len(WORDS)))
    for row in table:
        row[rng.choice(len(WORDS), _SUCCESSORS, replace=False)] = weights / weights.sum()
    return table.reshape(contexts, len(WORDS), len(WORDS))
