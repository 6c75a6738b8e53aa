r"""Brings inequalities, systems and ratios into the form that the other side has.

>>> align_relations("x < -2 or x > 2", r"(-\\infty,-2)\\cup (2,\\infty)")[0]
'(-\\infty,-2)\\cup (2,\\infty)'
>>> align_relations("y=3, x=2", "(2,3)")
('(2,3)', '(2,3)')
"""

from __future__ import annotations

import math
import re

_OPERATOR = r"\s*(<=|>=|<|>|\\leq?(?![A-Za-z])|\\geq?(?![A-Za-z])|\\leqslant|\\geqslant)\s*"
_SIDE = r"([^<>,=\\]*(?:\\(?!l|g)[^<>,=\\]*)*)"
_ONE_SIDED = re.compile(rf"([a-zA-Z]){_OPERATOR}{_SIDE}")
_TURNED = re.compile(rf"{_SIDE}{_OPERATOR}([a-zA-Z])")
_TWO_SIDED = re.compile(rf"{_SIDE}{_OPERATOR}([a-zA-Z]){_OPERATOR}{_SIDE}")
_BUILDER = re.compile(r"\\\{\s*([a-zA-Z])\s*(?:\\in\s*\\mathbb\{?R\}?\s*)?(?:\\mid|\\vert|\||:)\s*(.+?)\s*\\\}")
_ASSIGNED = re.compile(r"\s*([a-zA-Z])\s*=\s*([^=]+?)\s*")
_RATIO = re.compile(r"\d+(?: ?(?::| to ) ?\d+)+")
_POINT = re.compile(r"[A-Z]'?(?:_\{?\w\}?)? ?=? ?(\([^()]+,[^()]+\))")
_ANGLE = re.compile(r"(\\(?:sin|cos|tan|cot|sec|csc)(?: ?\^ ?\{? ?\d ?\}?)?) ?[({]? ?(\d+(?:\.\d+)?) ?deg\b ?[)}]?")


def align_relations(given: str, wanted: str) -> tuple[str, str]:
    """Returns both sides, as intervals or points where one of them has those; set builders are conditions."""
    sides = [_BUILDER.sub(r"\2", given), _BUILDER.sub(r"\2", wanted)]
    if _RATIO.fullmatch(given) and _RATIO.fullmatch(wanted):
        return _write_ratio(given), _write_ratio(wanted)
    for index, other in ((0, sides[1]), (1, sides[0])):
        if other.startswith("(") and other.endswith(")"):
            sides[index] = _POINT.sub(r"\1", _write_point(sides[index]))
    unions = [_write_union(side) for side in sides]
    if any(union and r"\cup" in union for union in (*unions, *sides)):
        sides = [union or side for union, side in zip(unions, sides, strict=True)]
    return _ascend(sides[0]), _ascend(sides[1])


def read_degrees_of_angles(text: str) -> str:
    r"""Writes the angle of a trigonometric function in radians: "\sin 30 deg" as \sin(30\pi/180)."""
    return _ANGLE.sub(lambda found: rf"{found[1]}(\frac{{{found[2]}\pi}}{{180}})", text)


def split_signs(text: str) -> str:
    r"""Writes "1 \pm x" as "1 + x, 1 - x"; a list stays."""
    one = text.count(r"\pm") == 1 and "," not in text
    return ", ".join(text.replace(r"\pm", sign) for sign in "+-") if one else text


def _write_ratio(text: str) -> str:
    """Writes "4:6" and "2 to 3" as 2:3."""
    parts = [int(part) for part in re.findall(r"\d+", text)]
    return ":".join(str(part // (math.gcd(*parts) or 1)) for part in parts)


def _write_point(text: str) -> str:
    """Writes "x=2, y=3" as "(2,3)", by the order of the letters; any other text stays."""
    parts = [_ASSIGNED.fullmatch(part) for part in re.split(r",| and ", text)]
    values = {part[1]: part[2] for part in parts if part}
    if len(parts) < 2 or len(values) < len(parts):
        return text
    return f"({','.join(values[name] for name in sorted(values))})"


def _ascend(text: str) -> str:
    """Writes "7 > x > 1" as "1 < x < 7"."""
    found = _TWO_SIDED.fullmatch(text)
    if not found or not (_is_greater(found[2]) and _is_greater(found[4])):
        return text
    high, first, name, second, low = found.groups()
    signs = ["<" if sign == ">" else r"\leq " for sign in (second, first)]
    return f"{low} {signs[0]} {name} {signs[1]} {high}"


def _write_union(text: str) -> str | None:
    r"""Writes "x < 1 or x > 2" as a union of intervals; None unless all parts are conditions on one letter."""
    parts = [_write_interval(part.strip()) for part in re.split(r"\bor\b|\\cup(?![A-Za-z])", text)]
    found = [part for part in parts if part]
    if len(found) < len(parts) or len({name for name, _ in found}) > 1:
        return None
    return r"\cup ".join(interval for _, interval in found)


def _write_interval(text: str) -> tuple[str, str] | None:
    """Returns the letter and the interval of one condition."""
    if found := _ONE_SIDED.fullmatch(text):
        name, sign, value = found.groups()
    elif found := _TURNED.fullmatch(text):
        value, sign, name = found.groups()
        sign = ("<" if _is_greater(sign) else ">") + ("" if sign in "<>" else "=")
    elif found := _TWO_SIDED.fullmatch(_ascend(text)):
        low, first, name, second, high = found.groups()
        if _is_greater(first) or _is_greater(second) or not low or not high:
            return None
        return name, f"{'(' if first == '<' else '['}{low.strip()},{high.strip()}{')' if second == '<' else ']'}"
    else:
        return None
    value = value.strip()
    if not value:
        return None
    if _is_greater(sign):
        return name, rf"{'(' if sign == '>' else '['}{value},\infty)"
    return name, rf"(-\infty,{value}{')' if sign == '<' else ']'}"


def _is_greater(sign: str) -> bool:
    return sign.startswith((">", r"\g"))
