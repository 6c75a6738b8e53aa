r"""Decides whether a response's committed answer equals the reference.

>>> judge(r"So it is \boxed{\frac{1}{2}}.", "0.5")
<Verdict.RIGHT: 'right'>
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from enum import Enum
from fractions import Fraction
from functools import lru_cache
from importlib import metadata
from typing import Literal

from vaopd.errors import InvalidInput
from vaopd.grading import pool
from vaopd.grading.choices import find_chosen, find_option, find_options
from vaopd.grading.commitment import cut_reason, drop_reasoning, find_commitment
from vaopd.grading.forms import clean, take_apart, text_key
from vaopd.grading.pool import Question
from vaopd.grading.quantities import equal_lists, join_units, read_numbers, split_units
from vaopd.grading.relations import align_relations, read_degrees_of_angles, split_signs

VERSION = 4
"""Counts changes of a verdict. 1 was judged in the calling process, and by text where that could take for ever; 2
lacked compound units, unions of inequalities, systems, matrices with spaces, and options chosen in a sentence; 3
took "a-b" for "ab", "3 1/2" for 31/2, a set for an interval, `A'` for A, and lacked many units."""

MAX_ANSWER_CHARS = 1000
"""A longer answer goes to math-verify as it is; a longer reference is compared as text only."""
MAX_RESPONSE_CHARS = 20_000
"""Of a longer response without a committed answer the end is judged; a longer committed answer is not judged."""

# Dates, telephone and version numbers: no differences, quotients or decimals.
_DATE = re.compile(
    r"(?<![\d.,/-])(?:\d{4}([-/.])\d{1,2}\1\d{1,2}|\d{1,2}([-/.])\d{1,2}\2\d{4}|\d{4}年\d{1,2}月(?:\d{1,2}[日号])?"
    r"|\d+-\d+-\d+|\d+\.\d+\.\d+|\d{4}-\d{1,2}|\d{4}-\d{4}|\d{3}-\d{4})(?![\d/-]|\.\d)"
)
_MAYBE_A_LIST = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")  # "(115,187)" is a point, though 115,187 is a number
_NOT_MEANT = re.compile(r"(?:\bnot\b|n't\b|\bcannot\b(?: be)?|不是)\W{0,3}[\d.,]+")
_AFTER_HAN = re.compile(r"(?<=[\u4e00-\u9fff])(?=-?[\d\\$])")
_APPROXIMATELY = re.compile(r"\\approx|\\simeq")
_EQUALS = re.compile(r"(?<![<>!\\])=(?![=>])(?![^{]*\})")  # outside braces
_COMPUTED = re.compile(r"[-+*/^]|\\(?:frac|sqrt|times|cdot)|^\s*\d")
# math-verify would add, divide or drop these.
_SEPARATE_NUMBERS = re.compile(r"(?<!_)\d [\d.]|\d ?: ?\d+ ?:|\d ?'|\\[lc]?dots|\.\.\.")


_SET = re.compile(r"\\\{[^()\[\]]+,[^()\[\]]+\\\}")
_TUPLE = re.compile(r"[(\[][^()\[\]]+,[^()\[\]]+[)\]]")


class Verdict(Enum):
    """What became of an answer. Only RIGHT is true in a condition."""

    RIGHT = "right"
    WRONG = "wrong"
    NOT_JUDGED = "not judged"
    """The comparison was cut off by its limit of time or memory, and the texts differ."""

    def __bool__(self) -> bool:
        return self is Verdict.RIGHT


def judge(response: str, answer: str) -> Verdict:
    """Compares the response's committed answer, or all of it if it commits to none, with the reference.

    For any expression, an answer takes at most two seconds and 512 MB, from any thread. The first call that
    needs math-verify also starts its process. Raises InvalidInput when the reference is empty.
    """
    if not answer.strip():
        raise InvalidInput("the reference answer is empty, so no answer can be compared with it; drop or correct it")
    boxed = find_commitment(answer) if "box" in answer else None  # ViRL39K writes its references as \boxed{…}
    reference = boxed.answer if boxed and boxed.boxed else answer.strip()
    commitment = find_commitment(response)
    if commitment is not None:
        return _judge(commitment.answer, reference, "boxed" if commitment.boxed else "said")
    return _judge(drop_reasoning(response).strip(), reference, "whole")


def judge_version() -> str:
    """Returns the judge's version and math-verify's, for the record beside an accuracy."""
    return f"{VERSION}, math-verify {metadata.version('math-verify')}"


@lru_cache(maxsize=8192)
def _judge(answer: str, reference: str, form: Literal["boxed", "said", "whole"]) -> Verdict:
    """Looks for a reading of the answer that equals the reference; asks math-verify once, for what is left open."""
    began = time.monotonic()
    readings = [answer, cut_reason(answer)] if len(answer) <= MAX_ANSWER_CHARS else [answer]
    if form != "boxed" and answer.endswith("!"):  # a factorial or an exclamation
        readings.append(answer.rstrip("! "))
    pairs = [(reading, reference) for reading in readings]
    pairs.append((_MAYBE_A_LIST.sub(", ", answer), _MAYBE_A_LIST.sub(", ", reference)))
    questions: dict[Question, None] = {}  # a set in order
    for pair in dict.fromkeys(pairs):
        for finding in _compare(*pair):
            if finding is Verdict.RIGHT:
                return finding
            if isinstance(finding, Question):
                questions[finding] = None
    if form == "whole":
        option = find_option(clean(reference), strict=True)
        if option and find_chosen(answer) == option.letter:
            return Verdict.RIGHT
        questions |= dict.fromkeys(_ask_for_all(answer, reference))
    if not questions:
        return Verdict.WRONG
    if any(len(one.given) > MAX_RESPONSE_CHARS or len(one.wanted) > MAX_ANSWER_CHARS for one in questions):
        return Verdict.NOT_JUDGED
    equal = pool.ask(list(questions), began=began)
    return Verdict.NOT_JUDGED if equal is None else Verdict.RIGHT if equal else Verdict.WRONG


def _ask_for_all(response: str, reference: str) -> Iterator[Question]:
    """Yields the question whether a response that commits to nothing holds the reference, if that is mathematics."""
    wanted, _ = split_units(clean(reference))
    parts = take_apart(wanted)
    if parts and not find_option(wanted, strict=True) and not _DATE.search(wanted) and re.search(r"[\d\\$]", response):
        end = _AFTER_HAN.sub(" ", response[-MAX_RESPONSE_CHARS:])  # math-verify wants a space before a number
        yield Question(_NOT_MEANT.sub(" ", _DATE.sub(" ", end)), parts.core, extract=True)


def _compare(answer: str, reference: str) -> Iterator[Verdict | Question]:
    """Yields what is found out about an answer, reading by reading: a verdict, or a question to math-verify."""
    if answer == reference:
        yield Verdict.RIGHT
    if max(len(answer), len(reference)) > MAX_ANSWER_CHARS:
        yield Question(answer, reference)
        return
    given, wanted = clean(answer), clean(reference)
    yield _compare_texts(given, wanted)
    if not given:
        return
    named, option = find_option(given), find_option(wanted, strict=True)
    if option and (named or not option.text):
        yield Verdict.RIGHT if named and named.letter == option.letter else Verdict.WRONG
        return
    letters, options = find_options(given), find_options(wanted)
    if letters and options and not (given.isalpha() and wanted.isalpha()):
        yield Verdict.RIGHT if letters == options else Verdict.WRONG
        return
    wanted = option.text if option else wanted
    for reading in [given, named.text] if named and named.text else [given]:
        for pair in _pair_right_sides(*align_relations(reading, wanted)):
            yield _compare_values(*pair)


def _pair_right_sides(given: str, wanted: str) -> Iterator[tuple[str, str]]:
    """Yields the pairs to compare: "x = 5" with "5" as 5 with 5, each side of an approximation by itself."""
    for one, other in itertools.product(_APPROXIMATELY.split(given), _APPROXIMATELY.split(wanted)):
        left, right = _EQUALS.split(one), _EQUALS.split(other)
        named = len(right) == 1 or not _COMPUTED.search(right[0])  # what the reference's left side is: a name
        keys = [re.sub(r"^f\(x\)$", "y", text_key(side[0])) for side in (left, right)]
        same = len(left) == 1 or len(right) == 1 or keys[0] == keys[1]
        if named and same and not re.search(r"[,;]|\b(?:and|or)\b", one + other):
            one, other = left[-1], right[-1]
        yield one.strip(), other.strip()


def _compare_values(given: str, wanted: str) -> Verdict | Question:
    """Compares two cleaned answers that name no option."""
    if _DATE.search(given) or _DATE.search(wanted):
        return _compare_texts(*(_DATE.sub(_normalise_date, text) for text in (given, wanted)))
    (given, units), (wanted, wanted_units) = (
        split_units(join_units(read_degrees_of_angles(text))) for text in (given, wanted)
    )
    parts, wanted_parts = take_apart(given), take_apart(wanted)
    if parts is None or wanted_parts is None:
        return _compare_texts(given, wanted)
    given, wanted = (split_signs(part.core) for part in (parts, wanted_parts))
    if given.count("'") != wanted.count("'"):  # math-verify drops primes
        return _compare_texts(given, wanted)
    pair = {bool(_SET.fullmatch(text)): text for text in (given, wanted)}
    if len(pair) == 2 and _TUPLE.fullmatch(pair[False]):  # it takes an interval or a point for a set
        return Verdict.WRONG
    if _TUPLE.fullmatch(given) and not re.search(r"[()\[\]{]", wanted) and "," in wanted:
        wanted = f"({wanted})"
    if _TUPLE.fullmatch(wanted) and not re.search(r"[()\[\]{]", given) and "," in given:
        given = f"({given})"
    names, wanted_names = (
        {unit.name for unit in found} | set(re.findall(r"\\%", text))
        for found, text in ((units, given), (wanted_units, wanted))
    )
    if (names, wanted_names) == ({"rad"}, {"deg"}):
        given, names = rf"\frac{{180({given})}}{{\pi}}", wanted_names
    if (names, wanted_names) == ({"deg"}, {"rad"}):
        wanted, wanted_names = rf"\frac{{180({wanted})}}{{\pi}}", names
    if (names and wanted_names and names != wanted_names) or not _match_nouns(parts.words, wanted_parts.words):
        return Verdict.WRONG
    # Units count where both have them: 1 m is 100 cm, and 1 m is 1.
    factors = [
        {unit.factor for unit in found if names and wanted_names} or {Fraction(1)} for found in (units, wanted_units)
    ]
    lists = [read_numbers(text) for text in (given, wanted)]
    if lists[0] and lists[1] and max(map(len, factors)) == 1:
        scaled = (
            [replace(number, value=number.value * min(of)) for number in numbers]
            for numbers, of in zip(lists, factors, strict=True)
            if numbers
        )
        return Verdict.RIGHT if equal_lists(*scaled) else Verdict.WRONG
    if factors[0] != factors[1] or _SEPARATE_NUMBERS.search(given) or _SEPARATE_NUMBERS.search(wanted):
        return _compare_texts(given, wanted)
    if (names, wanted_names) == ({"deg"}, set()) and r"\pi" in wanted:
        given = rf"\frac{{({given})\pi}}{{180}}"
    if (names, wanted_names) == (set(), {"deg"}) and r"\pi" in given:
        wanted = rf"\frac{{({wanted})\pi}}{{180}}"
    same_but_for_case = "".join(given.split()).casefold() == "".join(wanted.split()).casefold()  # so does math-verify
    return _compare_texts(given, wanted) if same_but_for_case else Question(given, wanted)


def _compare_texts(given: str, wanted: str) -> Verdict:
    return Verdict.RIGHT if given and text_key(given) == text_key(wanted) else Verdict.WRONG


def _match_nouns(one: str, other: str) -> bool:
    """Whether the words after two numbers may name the same: one says more, or none at all."""
    return one.rstrip("s") in other or other.rstrip("s") in one


def _normalise_date(found: re.Match[str]) -> str:
    return "-".join(str(int(part)) for part in re.findall(r"\d+", found[0]))
