r"""Finds the first answer that a response commits to.

>>> find_commitment(r"Either \boxed{12} or the answer is 13.")
Commitment(answer='12', boxed=True)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

_BOX = re.compile(r"\\f?box(?:ed)?\s*(?=\{)")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
# "The answer is", "Answer:", a heading "Final Answer", "答案是", "故选", <answer>.
_MARKER = re.compile(
    r"\banswers?\b(?: to (?:the|this) \w+)?[*_`]*\s*(?:[:：]|(?:is|are|(?:should|would|must|will)\s+be)\b"
    r"(?!\s+not\b)|(?:is|are)(?:\s+not|n't)\b[^.;\n]{1,40}?\bbut\b(?:\s+(?:rather|is))?)"
    r"|^[#*_ \t]*(?:final[ ]+)?answer[*_ \t]*$"
    r"|答案\s*(?:应该|应当|应|就|便)?\s*(?:[为是选]|[:：])|【\s*答案\s*】|故选|<answer>",
    re.IGNORECASE | re.MULTILINE,
)
_OPENING = re.compile(r"(?:[\s*_`:：$]|\\\(|\\\[)*")
# A point ends a sentence unless a digit follows: "3.5", ".5". A "!" may be a factorial and stays.
_SENTENCE_END = re.compile(r"\.(?!\d)|[\n;。；]|(?<=[!?])\s+(?=[A-Z])|</answer>|$")
_REASON = re.compile(
    r"[ ,;，(-]*[ (](?:because|since|as|due to|given that|when|where|for the|and that"
    r"|rather than|instead of|I (?:think|believe)) ?.*"
    r"| ?[,;，] ?(?:so|which|hence|therefore|thus|but|not)(?: .*|$)"
    r"| [—–] (?=[a-z]{2}).*| ?,? or (?:about|approximately) .*"
    r"| ?\((?:i(?:\.?e\b.*)?$|approx.*|about .*"
    r"|(?:rounded|correct) to .*|to (?:the nearest|\w+ (?:decimal|significant)) .*)"
    r"| ?,? (?:rounded to|correct to|to the nearest|to \w+ (?:decimal|significant)) .*"
    r"| ?[,;，]? ?(?:因为|由于|理由|所以|因此|故选).*",
    re.IGNORECASE,
)
_THINKING = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
_THINKING_END = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
# Nothing, or a place to fill in: \boxed{}, \boxed{\text{ }}, \boxed{\ldots}, \boxed{your answer}.
_BLANK = re.compile(
    r"(?:[\s.…_?~$*{}<>[\]]|\\[,;:! ]|\\(?:f?box(?:ed)?|text\w*|mathrm|math[bs]f|mbox|q?quad|[lc]?dots|square|_)"
    r"|\\(?:[hv]?phantom|[hv]space)\{[^{}]*\}|(?:your |the )?(?:final )?answer(?: here)?)*",
    re.IGNORECASE,
)


MAX_BLANK_CHARS = 200
MAX_SENTENCE_CHARS = 1500
"""Bounds the search for an answer's end, so that thousands of markers in one line take no minutes."""


class _Box(NamedTuple):
    start: int
    answer: str


@dataclass(frozen=True, slots=True)
class Commitment:
    """An answer as the response writes it, and whether it stood in a box."""

    answer: str
    boxed: bool


def committed_answer(text: str) -> str | None:
    r"""Returns the first answer that the response commits to, or None.

    It is the earliest in the text of: the content of a complete \boxed{…} or \fbox{…} that isn't blank, and the rest of
    the sentence after "the answer is", "Answer:", "答案是" and the like. Reasoning in <think>…</think> doesn't count.
    """
    found = find_commitment(text)
    return found.answer if found else None


def find_commitment(text: str) -> Commitment | None:
    """Returns the first commitment outside <think>…</think>, or None. Takes time linear in the text's length."""
    text = drop_reasoning(text)
    box = next(_find_boxes(text), None)
    return _find_marked(text, box) or (Commitment(box.answer, boxed=True) if box else None)


def drop_reasoning(text: str) -> str:
    """Returns the text after its reasoning; a block without its beginning or its end is reasoning as a whole."""
    return _THINKING_END.split(_THINKING.sub("", text))[-1]


def cut_reason(answer: str) -> str:
    """Returns the answer without the reason after it: "12, as 5+7 = 12" is "12"; also joins runs of spaces."""
    answer = " ".join(answer.split())
    kept = _REASON.sub("", answer)
    # "the value of x, which is 7" says its answer only then.
    only_then = len(kept.split()) > 2 and not re.search(r"\d", kept) and re.search(r"\d", answer)
    return answer if only_then else kept


def is_blank(answer: str) -> bool:
    """Whether nothing, or only a placeholder, is left of an answer."""
    return len(answer) < MAX_BLANK_CHARS and _BLANK.fullmatch(answer) is not None


def _find_boxes(text: str) -> Iterator[_Box]:
    """Yields each complete box that isn't blank, in order."""
    closed: dict[int, int] = {}
    opened: list[int] = []
    for brace in _BRACES.finditer(text):
        if brace.group() == "{":
            opened.append(brace.start())
        elif brace.group() == "}" and opened:
            closed[opened.pop()] = brace.start()
    for box in _BOX.finditer(text):
        end = closed.get(box.end())  # None: the response was cut off inside
        if end is not None and not is_blank(content := text[box.end() + 1 : end]):
            yield _Box(box.start(), content.strip())


def _find_marked(text: str, box: _Box | None) -> Commitment | None:
    """Returns the answer after the first marker that one follows, if that marker stands before the first box."""
    for marker in _MARKER.finditer(text, 0, box.start if box else len(text)):
        start = _skip_opening(text, marker.end())
        if _MARKER.match(text, start):
            continue  # "Answer: the answer is 12"
        end = _SENTENCE_END.search(text, start, start + MAX_SENTENCE_CHARS)
        assert end is not None  # it finds the end of the text
        stop = end.start()
        if text[start:stop].rstrip(" *_$").endswith((":", "：")):  # "The answer is as follows:"
            start = stop = _skip_opening(text, stop)
        if box and (box.start == start or box.start < stop):
            # "7, so \boxed{8}" has committed to 7; "x = \boxed{7}" and "the sum of 3 and 4, \boxed{7}" have not.
            before = " ".join(text[start : box.start].split())
            said = cut_reason(before)
            if said == before or not re.search(r"\d|^\(?[A-Z]\)?$", said) or re.search(r"(?<!\\)\b[A-Za-z]{4,}", said):
                return Commitment(box.answer, boxed=True)
            stop = box.start
        answer = cut_reason(text[start:stop]).strip().strip("$*_`").strip()
        answer = re.sub(r"\s*\\[)\]]$", "", answer)
        answer = answer.replace("**", "") if answer.count("**") % 2 else answer  # "option **B", its end stripped
        if not is_blank(answer):
            return Commitment(answer, boxed=False)
    return None


def _skip_opening(text: str, start: int) -> int:
    opening = _OPENING.match(text, start)
    assert opening is not None  # it matches nothing, too
    return opening.end()
