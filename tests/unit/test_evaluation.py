r"""Which answer a response commits to, what can be judged without another process, and avg@n."""

from __future__ import annotations

import pytest

from vaopd.errors import InvalidInput
from vaopd.evaluation import Verdict, avg_at_n, committed_answer, held_out_result, is_correct, judge, judge_version


@pytest.mark.parametrize(
    ("text", "committed"),
    [
        (r"So the answer is \boxed{12}.", "12"),
        (r"\boxed{12} … no, \boxed{13}", "12"),  # the first one counts
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),  # braces inside
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),  # escaped braces don't count
        (r"\boxed{1", None),  # cut at the length limit
        (r"\boxed{1, then \boxed{2}", "2"),  # the first complete one
        (r"\fbox{12}", "12"),
        (r"\boxed{}, then \boxed{ }, then \boxed{\text{ }}, then \boxed{7}", "7"),  # blank ones commit to nothing
        (r"\boxed{\ldots} \boxed{your answer} \boxed{7}", "7"),
        (r"\boxed{}", None),
        (r"The answer is 7, so \boxed{8}", "7"),  # the earliest, whatever its kind
        (r"\boxed{8}. The answer is 7.", "8"),
        (r"The answer is \boxed{8}.", "8"),
        (r"The answer is $x = \boxed{8}$.", "8"),
        (r"The answer is the sum of 3 and 4, \boxed{7}.", "7"),
        ("The answer is as follows:\n\n\\boxed{8}", "8"),
        ("The answer is 3.5. Then the answer is 4.", "3.5"),
        ("The answer is .5", ".5"),
        ("The answer is 12! So that is it", "12!"),
        ("The answer is 12 because 5+7 is 12.", "12"),
        ("The answer is 12, as 5+7 = 12.", "12"),
        ("The answer is the value of x, which is 7.", "the value of x, which is 7"),
        ("The answer is not 5. The answer is 6.", "6"),
        ("The answer is `12`.", "12"),
        ("The answer is $12$ cm.", "12$ cm"),
        ("The answer is\n\\[12\\]", "12"),
        ("Answer: B\nBecause", "B"),
        ("Answer: \\boxed{}\nAnswer: 7", "7"),
        ("**Final Answer:** 12", "12"),
        ("## Final Answer\n\n12", "12"),
        ("the answer is **C**.", "C"),
        ("The correct answer is C because it is green.", "C"),
        ("答案是12。", "12"),
        ("答案为：12", "12"),
        ("答案：B，因为它是绿色的。", "B"),
        ("答案不是12，答案是13", "13"),
        ("故选：C。", "C"),
        (r"<think>Perhaps \boxed{3}? No.</think>It is \boxed{12}.", "12"),
        (r"The answer is 3.</think>It is \boxed{12}.", "12"),  # its beginning stood in the prompt
        (r"<think>It must be \boxed{3}", None),  # never finished
        ("The perimeter is 12.", None),
        ("", None),
    ],
)
def test_the_first_committed_answer(text: str, committed: str | None) -> None:
    assert committed_answer(text) == committed


@pytest.mark.parametrize(
    "text",
    [r"\boxed{" * 20_000, "answer: " * 20_000, "\n" * 100_000, "<think>" * 20_000, "</think>" * 20_000, "#" * 100_000],
)
def test_a_runaway_response_takes_linear_time(text: str) -> None:
    """Each would take minutes if its time grew with the square of its length."""
    assert committed_answer(text) is None


def test_boxes_in_boxes_take_linear_time() -> None:
    text = r"\boxed{" * 20_000 + "}" * 20_000
    assert committed_answer(text) == text[7:-1]


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (r"\boxed{12}", "12", True),
        (r"\boxed{17}", r"\boxed{17}", True),  # ViRL39K's references
        (r"\boxed{1,000 cm}", "10 m", True),
        (r"\boxed{\frac{10}{4}}", "2.5", True),
        (r"\boxed{B. 12}", "B", True),
        (r"\boxed{left}", "felt", False),
        (r"\boxed{6.6\times10^{-34}}", r"6.6\times10^{-30}", False),
        (r"\boxed{2024-05-01}", "2018", False),
        ("", "12", False),
    ],
)
def test_text_letters_words_and_numbers_need_no_other_process(response: str, answer: str, right: bool) -> None:
    """A unit test that starts one fails."""
    assert is_correct(response, answer) is right


def test_a_record_without_a_reference_answer_is_an_error() -> None:
    with pytest.raises(InvalidInput, match="reference answer is empty"):
        is_correct(r"\boxed{}", "  ")


def test_only_right_is_true() -> None:
    assert [bool(verdict) for verdict in Verdict] == [True, False, False]
    assert judge(r"\boxed{B}", "A") is Verdict.WRONG


def test_an_answer_that_was_not_judged_counts_as_wrong_and_is_shown() -> None:
    result = held_out_result({"a": [Verdict.RIGHT, Verdict.NOT_JUDGED], "b": [True, False]})
    assert (result.accuracy, result.not_judged, result.judge) == (0.5, 1, judge_version())
    assert str(result) == f"50.0% ± 0.0% (avg@2, 2 problems, 1 not judged; judge {judge_version()})"


def test_avg_at_n_is_the_mean_over_questions() -> None:
    """(2/2 + 1/2 + 0/2) / 3 = 0.5; neither best-of-n (2/3) nor majority."""
    assert avg_at_n([[True, True], [True, False], [False, False]]) == pytest.approx(0.5)


@pytest.mark.parametrize("correct", [[], [[]], [[True], []]])
def test_avg_at_n_of_nothing_is_an_error(correct: list[list[bool]]) -> None:
    with pytest.raises(InvalidInput):
        avg_at_n(correct)


def test_a_question_that_was_not_asked_counts_neither_as_right_nor_as_wrong() -> None:
    result = held_out_result({"a": [True, False], "b": [True, True]}, not_asked={"picture": 1, "over-long": 0})
    assert (result.accuracy, result.prompts) == (0.75, 2)
    assert result.standard_error == pytest.approx(0.25 / 2**0.5)  # means of 0.5 and 1
    assert "avg@2, 2 problems; 1 of 3 not asked: 1 picture; judge " in str(result)
    assert result.not_asked == {"picture": 1}


def test_without_an_answer_there_is_no_accuracy() -> None:
    result = held_out_result({}, samples=8, not_asked={"picture": 3})
    assert (result.accuracy, result.standard_error, result.prompts, result.samples) == (None, None, 0, 8)
    assert str(result) == "no accuracy: 3 of 3 not asked: 3 picture"
    assert str(held_out_result({})) == "no accuracy: there was no question"
