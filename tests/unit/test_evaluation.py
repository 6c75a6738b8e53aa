r"""Which answer a response commits to, and whether it is right."""

from __future__ import annotations

import threading

import pytest

from vaopd.errors import InvalidInput
from vaopd.evaluation import avg_at_n, committed_answer, is_correct


@pytest.mark.parametrize(
    ("text", "committed"),
    [
        (r"So the answer is \boxed{12}.", "12"),
        (r"\boxed{12} … no, \boxed{13}", "12"),  # the first one counts
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),  # braces inside
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),  # escaped braces don't count
        (r"\boxed{1", None),  # cut at the length limit
        (r"\boxed{1, then \boxed{2}", "2"),  # the first complete one
        (r"The answer is 7, so \boxed{8}", "8"),  # a box is a stronger commitment
        ("The answer is 3.5. Then the answer is 4.", "3.5"),
        ("Answer: B\nBecause", "B"),
        ("the answer is **C**.", "C"),
        ("The perimeter is 12.", None),
        (r"\boxed{}", None),
        ("", None),
    ],
)
def test_the_first_committed_answer(text: str, committed: str | None) -> None:
    assert committed_answer(text) == committed


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{12}", "12"),
        (r"\boxed{0.5}", r"\frac{1}{2}"),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}"),
        (r"\boxed{17}", r"\boxed{17}"),  # ViRL39K's references
        (r"\boxed{D}", r"\boxed{D}"),
        (r"\boxed{1,000}", "1000"),
        (r"\boxed{12.0}", "12"),
    ],
)
def test_equal_answers_are_right(response: str, answer: str) -> None:
    assert is_correct(response, answer)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{13}", "12"),
        (r"\boxed{1}", "12"),
        (r"\boxed{12} or \boxed{13}", "13"),
        ("12", "12"),  # never committed
        ("", "12"),
        (r"\boxed{}", "12"),
        (r"\boxed{-12}", "12"),
        (r"\boxed{A}", "D"),
        (r"\boxed{\frac{1}{0}}", "12"),
        (r"\boxed{}}}{{", "12"),
    ],
)
def test_a_wrong_or_missing_answer_is_never_taken_for_a_right_one(response: str, answer: str) -> None:
    assert not is_correct(response, answer)


def test_a_record_without_a_reference_answer_is_an_error() -> None:
    with pytest.raises(InvalidInput, match="reference answer is empty"):
        is_correct(r"\boxed{}", "  ")


def test_it_works_off_the_main_thread() -> None:
    """math-verify's own timeout is a signal, which only the main thread may set."""
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(is_correct(r"\boxed{\frac{10}{4}}", "2.5")))
    thread.start()
    thread.join()

    assert seen == [True]


@pytest.mark.parametrize("runaway", ["9^{9^{9^{9}}}", "(10!)!", "2^{99999999}", r"\sum_{n=1}^{10^9} n", "1" * 5000])
def test_an_answer_that_would_take_for_ever_to_evaluate_is_compared_as_text(runaway: str) -> None:
    assert not is_correct(rf"\boxed{{{runaway}}}", "12")
    assert is_correct(rf"\boxed{{{runaway}}}", runaway)


def test_avg_at_n_is_the_mean_over_questions() -> None:
    """(2/2 + 1/2 + 0/2) / 3 = 0.5; neither best-of-n (2/3) nor majority."""
    assert avg_at_n([[True, True], [True, False], [False, False]]) == pytest.approx(0.5)


@pytest.mark.parametrize("correct", [[], [[]], [[True], []]])
def test_avg_at_n_of_nothing_is_an_error(correct: list[list[bool]]) -> None:
    with pytest.raises(InvalidInput):
        avg_at_n(correct)
