r"""Reads plain numbers and units, and compares them exactly; a decimal also equals what it is rounded from.

>>> read_number(r"6.6\times 10^{-34}") == read_number("0.5")
False
>>> split_units("5 km/h")
('5', [Unit(name='m/s', factor=Fraction(5, 18))])
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

MAX_TENS = 400
"""Powers of ten beyond this are not plain numbers."""

_TABLE = """
m 1/1000000 um micrometer;g 1/1000000 ug;s 1/1000000 us;ohm 1 ohm;ohm 1000 kohm;ohm 1000000 Mohm;Nm 1 Nm
m 1/1000 mm millimeter millimetre 毫米;m 1/100 cm centimeter centimetre 厘米;m 1/10 dm decimeter decimetre 分米
m 1 m meter metre 米;m 1000 km kilometer kilometre 千米 公里;m 0.0254 in inch;m 0.3048 ft foot feet;m 0.9144 yd yard
m 1609.344 mi mile;g 1/1000 mg milligram;g 1 g gram 克;g 1000 kg kilogram 千克 公斤;lb 1 lb pound
s 1 s sec second 秒;s 60 min minute 分钟;s 3600 h hr hour 小时;s 86400 day 天
s 604800 week;month 1 month;month 12 year;m/s 0.44704 mph
L 1/1000 ml mL milliliter 毫升;L 1 L l liter litre 升;rad 1 rad radian;degC 1 degC;degF 1 degF
dollar 1 dollar usd USD;yuan 1 yuan 元;euro 1 euro;N 1 N newton;J 1 J joule;W 1 W watt;V 1 V volt;Hz 1 Hz hertz;Pa 1 Pa
Pa 1000 kPa;Pa 1000000 MPa
A 1/1000 mA;V 1/1000 mV;V 1000 kV;N 1000 kN;J 1000 kJ;J 1000000 MJ;W 1000 kW;W 1000000 MW;Hz 1000 kHz;Hz 1000000 MHz
m 1/1000000000 nm;s 1/1000 ms;eV 1 eV;eV 1000 keV;eV 1000000 MeV;J 3600000 kWh;cal 1 cal;cal 1000 kcal;atm 1 atm
mol 1 mol mole;rupee 1 rupee Rs;gbp 1 gbp;dollar 1/100 cent
C 1 C coulomb;K 1 K kelvin;A 1 A ampere;unit 1 unit 单位
"""
_UNITS = {
    name: (base, Fraction(factor))
    for base, factor, *names in (line.split() for line in _TABLE.replace("\n", ";").split(";") if line)
    for name in names
}
_NAME = "|".join(sorted(map(re.escape, _UNITS), key=len, reverse=True))
_POWER = r"\s?\^\s?\{?\s?([23])\s?\}?|([23])(?!\d)"
_UNIT = re.compile(
    rf"(?<=[\w)}}\]]) ?-?(?:(square|sq|cubic|cu)\.? )?({_NAME})(?:es|s)?(?:{_POWER})?"
    rf"(?: ?(?:/|per ) ?(?:({_NAME})(?:es|s)?)(?:{_POWER})?)?(?=\s*(?:$|[-+<>=,;)}}\]]|and\b|or\b)|(?<! in) [a-z]{{3}})"
)
_FRACTION_OF_UNITS = re.compile(rf" ?\\[dt]?frac ?\{{ ?({_NAME}) ?\}} ?\{{ ?({_NAME}) ?(\^ ?\{{? ?[23] ?\}}?)? ?\}}")
_BRACKETED = re.compile(rf"(?<=\d) ?(?:\( ?({_NAME}) ?\)|\[ ?({_NAME}) ?\])$")
_COMPOUND = re.compile(
    rf"(\d+) ?({_NAME})s? (?:and )?(\d+(?:\.\d+)?) ?({_NAME})s?(?: (?:and )?(\d+(?:\.\d+)?) ?({_NAME})s?)?"
)
_MINUTES = re.compile(r"(\d+) ?deg ?(\d+) ?'(?!')(?: ?(\d+) ?(?:''|\"))?")
_DEGREES = re.compile(r" ?\bdeg\b ?")
_DIGITS = r"(?:\d+\.?\d*|\.\d+)"
_DECIMAL = re.compile(
    rf"(?P<sign>[-+]?) ?(?P<digits>{_DIGITS})(?:\((?P<period>\d+)\))?"
    r"(?: ?\\(?:times|cdot) ?10 ?\^ ?\{? ?(?P<tens>-? ?\d+) ?\}?)?(?P<percent> ?\\%)?"
)
_POWER_OF_TEN = re.compile(r"10 ?\^ ?\{? ?(-? ?\d+) ?\}?")
_FRACTION = re.compile(
    r"(?P<sign>[-+]?) ?(?:(?P<whole>\d+) ?)?\\[dtc]?frac"
    r" ?(?:\{ ?(?P<above>-?\d+) ?\} ?\{ ?(?P<below>\d+) ?\}|(?P<a>\d) ?(?P<b>\d))"
    r"(?P<percent> ?\\%)?"
)
_SLASHED = re.compile(r"(?P<sign>[-+]?) ?(?:(?P<whole>\d+) )?(?P<above>\d+) ?/ ?(?P<below>\d+)(?P<percent> ?\\%)?")


@dataclass(frozen=True, slots=True)
class Number:
    """A plain number. decimal: written with a point, so perhaps rounded. percent: `value` is still a hundredfold."""

    value: Fraction
    decimal: bool = False
    percent: bool = False


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit as `factor` times a base: km/h is 5/18 m/s."""

    name: str
    factor: Fraction


def read_number(text: str) -> Number | None:
    """Reads an integer, decimal, fraction, mixed number, repeating decimal or power of ten; None for all else."""
    if found := _POWER_OF_TEN.fullmatch(text):
        text = f"1 \\times {text}"
    if found := _DECIMAL.fullmatch(text):
        tens = int((found["tens"] or "0").replace(" ", ""))
        if abs(tens) > MAX_TENS:
            return None
        value = Fraction(found["digits"])
        if found["period"]:
            places = len(found["digits"].partition(".")[2])
            value += Fraction(int(found["period"]), (10 ** len(found["period"]) - 1) * 10**places)
        value *= Fraction(10) ** tens
        decimal = "." in found["digits"] and not found["period"]
    elif found := _FRACTION.fullmatch(text) or _SLASHED.fullmatch(text):
        groups = found.groupdict()
        above, below = int(groups.get("a") or found["above"]), int(groups.get("b") or found["below"])
        if below == 0:
            return None
        value, decimal = int(found["whole"] or 0) + Fraction(above, below), False
    else:
        return None
    return Number(-value if found["sign"] == "-" else value, decimal=decimal, percent=bool(found["percent"]))


def read_numbers(text: str) -> list[Number] | None:
    """Reads a list of plain numbers, separated by commas, "and" or "or"; None where anything else is in it."""
    numbers = [read_number(part.strip()) for part in re.split(r"[,;]| (?:and|or) ", text)]
    return [number for number in numbers if number] if all(numbers) else None


def equal_lists(some: list[Number], others: list[Number]) -> bool:
    """Whether two lists hold equal numbers, in any order."""
    pairs = zip(*(sorted(numbers, key=lambda number: number.value) for numbers in (some, others)), strict=False)
    return len(some) == len(others) and all(equal_numbers(*pair) for pair in pairs)


def equal_numbers(one: Number, other: Number) -> bool:
    """Whether two numbers are equal; a percentage also equals its number and its hundredth: 50 % is 50 and 1/2."""
    rounded = one.decimal or other.decimal
    if one.percent == other.percent:
        return nearly_equal(one.value, other.value, rounded=rounded)
    percentage, plain = (one, other) if one.percent else (other, one)
    return any(
        nearly_equal(value, plain.value, rounded=rounded) for value in (percentage.value, percentage.value / 100)
    )


def nearly_equal(one: Fraction, other: Fraction, *, rounded: bool) -> bool:
    """Whether two values are equal; rounded ones to six decimals, tiny ones to six digits: 1/3 is 0.333333."""
    if one == other or not rounded:
        return one == other
    largest = max(abs(one), abs(other))
    if largest >= Fraction(1, 10_000):  # six decimals still hold three digits of it
        return round(one, 6) == round(other, 6)
    return abs(one - other) <= largest / 1_000_000


def join_units(text: str) -> str:
    r"""Returns an amount in two or three units in the first of them: "3 h 30 min" as 7/2 h, "\frac{m}{s}" as m/s."""
    text = _MINUTES.sub(lambda found: _write_fraction([found[1], found[2], found[3]], [1, 60, 3600]) + " deg", text)
    text = _FRACTION_OF_UNITS.sub(lambda found: f" {found[1]}/{found[2]}{found[3] or ''}", text)
    text = _BRACKETED.sub(lambda found: f" {found[1] or found[2]}", text)
    found = _COMPOUND.fullmatch(text)
    if not found:
        return text
    amounts, names = found.groups()[::2], [name for name in found.groups()[1::2] if name]
    units = [_UNITS[name] for name in names]
    if len({base for base, _ in units}) > 1 or any(small >= large for (_, large), (_, small) in pairwise(units)):
        return text
    return f"{_write_fraction(amounts, [units[0][1] / factor for _, factor in units])} {names[0]}"


def _write_fraction(amounts: Sequence[str | None], divisors: Sequence[int | Fraction]) -> str:
    total = sum(Fraction(amount) / divisor for amount, divisor in zip(amounts, divisors, strict=False) if amount)
    return rf"\frac{{{total.numerator}}}{{{total.denominator}}}" if total else "0"


def split_units(text: str) -> tuple[str, list[Unit]]:
    """Returns the text without its units, and these units, in order. "units" itself is none."""
    units = []

    def take(found: re.Match[str]) -> str:
        shape, name, raised, written, below, raised_below, written_below = found.groups()
        before = re.split("[,;]", text[: found.start()])[-1]
        if found[0][0].isalpha() and re.search(r"\\[A-Za-z]*$", before):
            return found[0]  # part of a command
        letters = re.sub(r"\\[A-Za-z]+", "", before)
        sum_ = re.search(r"[A-Za-z]|(?<=[\w)}]) ?[-+*/]", letters) or re.match(r" ?[-+=<>]", text[found.end() :])
        if len(name) == 1 and sum_:
            return found[0]  # the m of "2am" and "3 + 2m" is a variable
        base, factor = _UNITS[name]
        power = int(raised or written or {"sq": 2, "cu": 3}.get((shape or "")[:2], 1))
        unit, factor = (base if power == 1 else f"{base}^{power}"), factor**power
        if below:
            base, divisor = _UNITS[below]
            power = int(raised_below or written_below or 1)
            unit, factor = f"{unit}/{base}" + (f"^{power}" if power > 1 else ""), factor / divisor**power
        if base != "unit":
            units.append(Unit(unit, factor))
        return ""

    if _DEGREES.search(text):
        units.append(Unit("deg", Fraction(1)))
        text = _DEGREES.sub("", text)
    return _UNIT.sub(take, text).strip(), units
