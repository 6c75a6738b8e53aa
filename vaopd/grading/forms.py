r"""Brings an answer into one form: plain LaTeX, apart from its words and units.

>>> clean(r"**$2$½** √3 × 1\,000.")
'2\\frac{1}{2} \\sqrt{3} \\times 1000'
>>> take_apart("the length is 12 apples")
Parts(core='12', words='apples')
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

# Pairs; a command is followed by a space.
_PAIRS = r"""
− - – - — - ‐ - ﹣ - ⁄ / ∶ : 、 , 。 . ’ ' ‘ ' “ " ” " × \times · \cdot ⋅ \cdot ∙ \cdot ÷ \div ± \pm √ \sqrt ∛ \sqrt[3]
≤ \leq ≥ \geq ⩽ \leq ⩾ \geq ≠ \neq ≈ \approx ∈ \in ∞ \infty ∪ \cup ∩ \cap ∅ \emptyset ∠ \angle △ \triangle
° ^\circ º ^\circ 度 ^\circ π \pi α \alpha β \beta γ \gamma θ \theta λ \lambda φ \phi 平方 square 立方 cubic
∥ \parallel ⊥ \perp ≅ \cong ∼ \sim ∽ \sim Ω \Omega Ω \Omega µ \mu μ \mu ⟨ ( ⟩ ) ′ ' ″ ''
""".split()  # noqa: SIM905
_SYMBOLS = {
    symbol: plain if len(plain) == 1 else f" {plain} " for symbol, plain in zip(_PAIRS[::2], _PAIRS[1::2], strict=True)
}
_SYMBOL = re.compile("|".join(_SYMBOLS))
_CURRENCY = {r"\$": "dollar", "₹": "rupee", "£": "gbp", "€": "euro", "¥": "yuan"}
_SCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ₀₁₂₃₄₅₆₇₈₉", "0123456789+-n0123456789")
_STYLED = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|color\s*\{[^{}]*\})?|math(?:rm|bf|it|sf)|boldsymbol|bm|mbox|underline|operatorname"
    r"|f?box(?:ed)?|overline(?=\s*\{[A-Z]{2}\}))\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_GROUPS_OF_THREE = re.compile(r"(?<![\d.,])(\d{1,3})((?:,\d{3})+|(?:\{,\}\d{3})+|(?:(?:\\[,; ]|[ ~])\d{3})+)(?!\d|,\d)")
_STEPS: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(\\sqrt(?:\[3\])?)\s*(\d+(?:\.\d+)?|[A-Za-z](?![A-Za-z]))", r"\1{\2}"),
        (r"\\?(?<![A-Za-z])sqrt\s*\(((?:[^()]|\([^()]*\))*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z])sqrt\s*(\d+)", r"\\sqrt{\1}"),
        (r"\\varnothing|\\\{\s*\\\}", r"\\emptyset"),
        (r"\\([lg])t(?![A-Za-z])", lambda found: "<>"[found[1] == "g"]),
        (r"(?<=[A-Z]) ?// ?(?=[A-Z])", r" \\parallel "),
        (r"(?i:\ball real (?:number|value)s\b)", r"\\mathbb{R}"),
        (r"(?i:\b([ap])\.\s?m\b\.?)", r"\1m"),
        (r"(?<=\d)(?: ?\^ ?\{?)? ?(?:st|nd|rd|th)(?![A-Za-z]) ?\}?", ""),
        (
            r"\\checkmark(?![A-Za-z])|[✓✔✅☑\ufe0f\U0001f300-\U0001faff]|\\(?:tiny|small|normalsize|[Ll]arge|LARGE|[Hh]uge)(?![A-Za-z])",
            "",
        ),
        (r"\\langle(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
        (r"\\color\s*\{[^{}]*\}", ""),
        (r"\^\s*\{?\s*\\prime\s*\}?", "'"),
        (r"(?<=[A-Za-z0-9)}])\s*[或和与]\s*(?=[-A-Za-z0-9\\(])", " or "),
        (r"\\(?:left|right|displaystyle|limits|[Bb]igg?[lr]?)(?![A-Za-z])|\\!|\\?\$|\\[()]|(?<!\\)\\[][]|`", ""),
        (r"(?<![\w)}])\*\*([^*]+)\*\*(?![\w(\\])|^[*_]+|[*_]+$", r"\1"),
        (r"\*\*\s*(-?\d+|[A-Za-z])", r"^{\1}"),
        (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])|\\(?:thin)?space(?![A-Za-z])", " "),
        (r"(\d)[eE]([+-]?\d{1,9})(?![\dA-Za-z.])", r"\1\\times 10^{\2}"),
        (r"(?<=\d)\s*[xX*]\s*(?=10\s*\^)", r"\\times "),
        (r"(?<![A-Za-z])(?:negative|minus) +(?=[\d\\])", "-"),
        (r"\s*\b(?:percent(?:age)?|pct)\b|\s*(?<!\\)%", r"\\%"),
        (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![A-Za-z])", " deg "),
        (r" deg ([CF])\b", r" deg\1"),
        (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
        (r"(?<![\\A-Za-z])(?:infinity|inf)(?![A-Za-z])", r"\\infty "),
        (r"\s+", " "),
        (r"(?<=\d) ?\\mu ?(?=[gms](?![A-Za-z]))", " u"),
        (r"(?<=\d) ?([kM]?) ?\\Omega(?![A-Za-z])", r" \1ohm"),
        (r"(?<![A-Za-z\\])N *\\cdot *m(?![A-Za-z])", "Nm"),
        (r"(?<![A-Za-z\\])(k?m|cm) (?:\\cdot ?)?s ?\^ ?\{? ?-(?:1|(2)) ?\}?", r"\1/s^\2"),
        (r"(?<=/s)\^(?!\s*[\d{])", ""),
    )
)
_TENS = {
    "hundred": 2,
    "thousand": 3,
    "million": 6,
    "billion": 9,
    "lakh": 5,
    "crore": 7,
    "百": 2,
    "千": 3,
    "万": 4,
    "亿": 8,
}
_TEN = re.compile(r"(?<=\d) ?(hundred|thousand|million|billion|lakh|crore|[百千万亿](?![克米升瓦]))(?![a-z])")
_SMALL = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen""".split()  # noqa: SIM905
_ROUND = "twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905
_NUMBER_WORDS = {word: number for number, word in enumerate(_SMALL)}
_NUMBER_WORDS |= {
    word + (f"-{_SMALL[ones]}" if ones else ""): 10 * tens + ones
    for tens, word in enumerate(_ROUND, 2)
    for ones in range(10)
}
_CIRCLED = re.compile("[①-⑳](?:(?:[\\s,，、;；和与]|and)*[①-⑳])+")
_SYSTEM = re.compile(r"\\begin\s*\{(cases|aligned)\}(.*?)\\end\s*\{\1\}", re.DOTALL)
_FUNCTIONS = frozenset(
    """sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp lim max min gcd lcm""".split()  # noqa: SIM905
)
# A number beside one of these is not the answer itself.
_CHANGES_A_NUMBER = frozenset(
    """or and nor not no never isn't cannot can't may might
    without between less more fewer least most greater than over above below under plus
    minus divided multiplied half third quarter twice double triple negative squared cubed square cube root
    factorial power to hundred thousand million billion trillion dozen am pm mod base
    january february march april may june july august september october november december""".split()  # noqa: SIM905
)
_WORD = re.compile("\\(?(?:[A-Za-z][A-Za-z'-]*|[\u4e00-\u9fff]+)\\)?[,:.，：]?")
_AFTER = re.compile("\\(?(?:[A-Za-z][A-Za-z'-]+|[\u4e00-\u9fff]+)\\.?\\)?[,:.，：]?")
_HAN = re.compile("[\u4e00-\u9fff]")
_HAN_CHANGES = re.compile("[不非没无或和与至到半倍分点万亿千百十]|[大小多少]于")


def _normalize(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def clean(text: str) -> str:
    """Returns the answer in plain LaTeX: no dollar signs, Markdown, styles or thin spaces; Unicode as commands."""
    text = _SYSTEM.sub(_join_lines, text)
    text = re.sub(r"\\textcircled ?\{?(\d)\}?", lambda found: chr(0x245F + int(found[1])), text)
    text = _CIRCLED.sub(_name_statements, text)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda found: f"^{{{found[0].translate(_SCRIPTS)}}}", text)
    text = re.sub("[₀-₉]+", lambda found: f"_{{{found[0].translate(_SCRIPTS)}}}", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda found: r"\frac{{{}}}{{{}}}".format(*_normalize(found[0]).split("⁄")), text)
    text = _SYMBOL.sub(lambda found: _SYMBOLS[found[0]], text)  # before, too: º would be an o
    text = _SYMBOL.sub(lambda found: _SYMBOLS[found[0]], _normalize(text))
    text = re.sub(
        r"(\\\$|[£€¥₹]) ?(\d(?:[\d.,{}]*\d)?)(?! ?\\?\$)", lambda found: f"{found[2]} {_CURRENCY[found[1]]}", text
    )
    text = re.sub(r"(\.\d*)\\(?:overline|dot)\s*\{?(\d+)\}?", r"\1(\2)", text)  # a repeating decimal: 0.(3)
    while (plain := _STYLED.sub(r" \1 ", text)) != text:
        text = plain
    text = _GROUPS_OF_THREE.sub(lambda found: found[1] + re.sub(r"\D", "", found[2]), text)
    for pattern, replacement in _STEPS:
        text = pattern.sub(replacement, text)
    text = _TEN.sub(lambda found: rf"\times 10^{{{_TENS[found[1]]}}}", text).strip(' ,;:"').rstrip(" .,;:")
    text = text[1:-1] if text[:1] == text[-1:] == "'" else text
    return str(_NUMBER_WORDS.get(text.lower().replace(" ", "-"), text))


def _name_statements(found: re.Match[str]) -> str:
    """Returns "①, ③" as words, since digits would make the number 13 or a product of it."""
    return "".join(f"第{_normalize(number)}" for number in found[0] if "①" <= number <= "⑳")


def _join_lines(found: re.Match[str]) -> str:
    """Returns a system's lines as a list: "x=1, y=2"; with cases of a function in it, the system as it is."""
    if found[1] == "cases" and "&" in found[2]:
        return found[0]
    lines = (line.strip(" ,;") for line in re.split(r"\\\\", found[2].replace("&", "")))
    return ", ".join(line for line in lines if line)


def text_key(text: str) -> str:
    """Returns what equal texts share: words in one case, no articles, commas in place of "and", no spaces.

    Spaces between digits and hyphens between letters stay: "3 1/2" is not 31/2, and "a-b" not "ab".
    """
    text = re.sub(r"^(?:the|an?) (?=[a-z])", "", text, flags=re.IGNORECASE)
    text = re.sub(r"\s*(?:,\s*and\b|[,;&]|\band\b)\s*", ",", text)
    text = re.sub(r"(?<=[A-Z]) ?_\{?(\d+)\}?", r"\1", text)  # CO_2 is CO2
    text = re.sub(
        r"\\[A-Za-z]+|[^\W\d_]{2,}", lambda found: found[0] if found[0][0] == "\\" else found[0].casefold(), text
    )
    return re.sub(r"(?<=[a-z]{3})-(?=[a-z]{3})|(?<!\d)\s|\s(?!\d)", "", text).rstrip(".")


def is_wordy(text: str) -> bool:
    """Whether a cleaned answer holds words, no products of letters: "cat", "BCA", Chinese; not "2ab" or "xy"."""
    if _HAN.search(text):
        return True
    text = re.sub(r"\\(?:begin|end) ?\{\w+\*?\}", "", text)
    operator = re.search(r"[+*/^=_<>|\\(]|(?<![A-Za-z])-|-(?![A-Za-z])", text)
    for run in re.finditer(r"(?<![\\A-Za-z])[A-Za-z]{2,}", text):
        attached = text[run.start() - 1 : run.start()].isdigit()
        product = not re.search("[A-Zaeiou]", run[0]) or (len(run[0]) <= 3 and (attached or operator))
        if run[0] not in _FUNCTIONS and run[0] not in ("and", "or") and not product:
            return True
    return False


@dataclass(frozen=True, slots=True)
class Parts:
    """The expression in an answer, and the words after it as `text_key`: "12 red apples" is 12 and "redapples"."""

    core: str
    words: str


def take_apart(text: str) -> Parts | None:
    """Separates the expression in a cleaned answer from the words around it; None if the words matter."""
    tokens = re.sub("([\u4e00-\u9fff]+)", r" \1 ", text).split()
    start, end = 0, len(tokens)
    while start < end and _WORD.fullmatch(tokens[start]) and tokens[start] not in _FUNCTIONS:
        start += 1
    if not re.search("[a-z]{2}|[\u4e00-\u9fff]", " ".join(tokens[:start])):
        start = 0  # "x 5" is a product, and "AB + CD" a sum
    while end > start and _AFTER.fullmatch(tokens[end - 1]):
        end -= 1
    while (
        end < len(tokens)
        and len(tokens[end]) < 3
        and tokens[end] not in ("in", "of", "is")
        and not _HAN.match(tokens[end])
    ):
        end += 1  # "3 ab" is a product
    core, before, after = (" ".join(part) for part in (tokens[start:end], tokens[:start], tokens[end:]))
    words = f"{before} {after}"
    if not core and not is_wordy(text):
        return Parts(text, "")
    if not core or is_wordy(core) or _HAN_CHANGES.search(words):
        return None
    if _CHANGES_A_NUMBER & set(re.findall(r"[a-z']+", words.lower())):
        return None
    return Parts(core.strip(" ,:"), text_key(after.strip("(),:. ")))
