"""The argument parser of `vaopd`: commands in groups, the nearest word for an unknown one, no option in vain."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

Number = TypeVar("Number", int, float)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that suggests words and can show its subcommands in groups."""

    def __init__(self, *arguments: Any, groups: Mapping[str, Sequence[str]] | None = None, **options: Any) -> None:
        """groups: heading -> names of subcommands, for the help."""
        # An abbreviation that works today may mean another option tomorrow, and a typing error is named.
        super().__init__(*arguments, **{"allow_abbrev": False, **options})
        self._groups = groups or {}
        self._ties: list[tuple[str, str, bool]] = []

    def tie(self, *options: str, to: str, apart: bool = False) -> None:
        """Refuses options without the option `to`, or, if `apart`, with it: they would have no effect."""
        self._ties += [(option, to, apart) for option in options]

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Refuses unknown arguments here, where the command's own options are known."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            hints = filter(None, (suggest(word.partition("=")[0], self._option_string_actions) for word in unknown))
            self.error(f"unrecognized arguments: {' '.join(unknown)}{''.join(hints)}")
        for option, other, apart in self._ties:
            first, second = (self._option_string_actions[name] for name in (option, other))
            with_other = getattr(found, second.dest) != second.default
            if getattr(found, first.dest) != first.default and with_other == apart:
                self.error(f"{option} has no effect {'with' if apart else 'without'} {other}; leave {option} out")
        return found, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices and isinstance(value, str):
            known = ", ".join(map(str, action.choices))
            hint = suggest(value, map(str, action.choices))
            raise argparse.ArgumentError(action, f"{value!r} is unknown{hint or f'; choose from {known}'}")
        super()._check_value(action, value)

    def format_help(self) -> str:
        """Shows each group of subcommands under its heading."""
        if not self._groups or self._subparsers is None:
            return super().format_help()
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        (commands,) = (action for action in self._actions if isinstance(action, argparse._SubParsersAction))
        for heading, names in self._groups.items():
            formatter.start_section(heading)
            formatter.add_arguments([action for action in commands._choices_actions if action.dest in names])
            formatter.end_section()
        formatter.start_section("options")
        formatter.add_arguments([action for action in self._actions if action is not commands])
        formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def error(self, message: str) -> NoReturn:
        """Prints the message and how to get help, and exits with 2; the usage of `up` alone has 12 lines."""
        self.exit(2, f"{self.prog}: {message}\n`{self.prog} --help` lists what there is\n")


def bounded(kind: Callable[[str], Number], low: Number, high: Number | None = None) -> Callable[[str], Number]:
    """Returns the `type` of an option that is a number of `kind` between bounds."""
    name = "a whole number" if kind is int else "a number"

    def read(text: str) -> Number:
        try:
            value = kind(text)
            if low <= value and (high is None or value <= high):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not {name} from {low} {'up' if high is None else f'to {high}'}")

    return read


def suggest(word: str, known: Iterable[str]) -> str:
    """Returns "; did you mean …?" with the nearest known word, or nothing.

    >>> suggest("--stpes", ["--steps", "--seed"]), suggest("xyz", ["up"])
    ('; did you mean --steps?', '')
    """
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def walk(parser: argparse.ArgumentParser) -> Iterable[argparse.ArgumentParser]:
    """Yields a parser and, depth first, those of its subcommands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in dict.fromkeys(action.choices.values()):
                yield from walk(child)
