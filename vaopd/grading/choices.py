"""Recognises option letters: "A", "(A)", "A. 12", "Option A", "C because it is green"; not "A or B", "A triangle"."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vaopd.grading.commitment import cut_reason

_OPTION = re.compile(
    r"(?i:(?:the )?(?:correct )?(?:option|choice|answer|选项|选择|选)(?: is)?:? ?)?"
    r"(?:\( ?(?P<round>[A-Ja-j]) ?\)|\[ ?(?P<square>[A-Ja-j]) ?\]"
    r"|(?P<bare>[A-J])(?![\w'^(])|(?P<small>[a-j])(?=[).]|$))"
)
_TEXT = re.compile(r" ?[.):、，,] ?(?P<text>.+)")
# After a bracket the option's text may follow at once.
_NEXT_OPTION = re.compile(
    r"(?:[,/&] ?|(?:and|or|nor|to)\b ?|[或和与至])*\(?[A-Z]\)?(?![a-z])|(?:and|or|nor)\b|[或和与至]"
)
_REMARK = re.compile(
    r" (?:is|are|was) (?:the )?(?:only )?(?:correct|right|true|answer|best)"
    r"| \((?!or\b)[^()]{2,}\)$| -+ ?(?:\d|[A-Za-z\\]{2})| ?=> "
)
_FOLLOWS = re.compile(r" (?:[\d$]|\\(?:frac|sqrt|pi)(?![a-z])|[A-Z]?[a-z]{2})|, [a-z]{2}")
_CHOSEN = re.compile(
    r"(?:(?i:\b(?:option|choice|choose|select|pick)\b(?: is)?:?(?: option| choice)?) ?"
    r"|(?:选项|选择|选)(?:是|为|：|:)? ?)[(（*]*(?P<letter>[A-J])(?![A-Za-z0-9']| as\b)"
    r"|(?<![\w(])[(*]*(?P<named>[A-J])[)*]* is (?:correct|the (?:correct |right |best )?(?:answer|option|choice))\b"
)
_DENIED = re.compile(
    r" (?:can't|cannot|(?:is|are|was|can|could|does|do|would|will)(?:n't| not| wrong| incorrect| false))\b"
)
_DOUBT = re.compile(
    r"\b(?:not|isn't|can't|cannot|wrong|incorrect|false|neither|nor|except|eliminate\w*|rul\w+ out|reject\w*"
    r"|discard\w*|or|either)\b|[不错非或]|[?？]",
    re.IGNORECASE,
)
_SEVERAL = re.compile(r"[A-J](?: ?(?:,|;|&|and) ?[A-J])+")


MAX_SEARCHED_CHARS = 20_000


@dataclass(frozen=True, slots=True)
class Option:
    """An option's letter in upper case, and its text where that follows."""

    letter: str
    text: str = ""


def find_option(answer: str, *, strict: bool = False) -> Option | None:
    """Returns the option that a cleaned answer names. strict: only by its letter alone or with point or bracket."""
    found = _OPTION.match(answer)
    if found is None:
        return None
    letter = next(letter for letter in found.groups() if letter).upper()
    rest = cut_reason("A" + answer[found.end() :])[1:].rstrip(" ,")
    if rest in ("", ")", ".", "]"):
        return Option(letter)
    bracketed = bool(found["round"] or found["square"])
    text = _TEXT.fullmatch(rest) or (re.fullmatch(" ?(?P<text>.+)", rest) if bracketed else None)
    if _NEXT_OPTION.match(text["text"] if text else rest.lstrip()):
        return None
    if text and (bracketed or not re.match(r" ?, ?[^\s\d]", rest)):
        return Option(letter, text["text"])
    if strict:
        return None
    if _REMARK.match(rest):
        return Option(letter)
    # "A triangle", "I think": a letter that is also a word says nothing.
    article = letter in "AI" and re.match(r" [A-Za-z]", rest)
    denied = _DENIED.match(rest)
    another = re.search("(?<![A-Za-z\\\\])[B-H](?![A-Za-z])", rest)
    return Option(letter, rest.strip()) if _FOLLOWS.match(rest) and not (article or another or denied) else None


def find_chosen(response: str) -> str | None:
    """Returns the option that the last sentence with one chooses: "So I choose B.", "选项B正确"; None in doubt."""
    for sentence in reversed(re.split(r"(?<=[.!?])\s+|[\n。！；;]", response[-MAX_SEARCHED_CHARS:])):
        letters = {found["letter"] or found["named"] for found in _CHOSEN.finditer(sentence)}
        if letters:
            return letters.pop() if len(letters) == 1 and not _DOUBT.search(sentence) else None
    return None


def find_options(answer: str) -> frozenset[str] | None:
    """Returns the letters of "A, C", "(A) and (C)" or "AC" (in alphabetical order, so no points of a figure)."""
    answer = re.sub(r"\(([A-J])\)", r"\1", answer)
    if _SEVERAL.fullmatch(answer):
        return frozenset(re.findall("[A-J]", answer))
    if re.fullmatch("[A-J]{2,}", answer) and list(answer) == sorted(set(answer)):
        return frozenset(answer)
    return None
