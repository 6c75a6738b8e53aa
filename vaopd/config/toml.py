"""Reads TOML into pydantic sections: overrides from the command line, unions of variants, errors that name the key."""

from __future__ import annotations

import copy
import difflib
import tomllib
import types
import typing
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import pydantic
from pydantic import Field
from pydantic.fields import FieldInfo

from vaopd.errors import ConfigError
from vaopd.files.plain import read_plain
from vaopd.net.passwords import remove_passwords

Fraction = Annotated[float, Field(ge=0, le=1)]
_ADDRESS = r"(?:[^:,\s]+|\[[0-9a-fA-F:]+\]):\d+"
Address = Annotated[str, Field(pattern=rf"^{_ADDRESS}$")]
_ADDRESSES = rf"^{_ADDRESS}(?:, ?{_ADDRESS})*$"
Addresses = Annotated[str, Field(pattern=_ADDRESSES)]
QUEUE_URL = r"^(rediss?|unix)://|^embedded$"
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Section(pydantic.BaseModel):
    """A table of a TOML file. It refuses unknown keys; the docstring under a field describes it."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, hide_input_in_errors=True
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _refuse_truth_as_number(cls, values: Any) -> Any:
        """Makes words of true and false where a number belongs: pydantic takes them for 1 and 0, a rate of 1.0."""
        if not isinstance(values, dict):
            return values
        kinds = {key: _list_kinds(field) for key, field in cls.model_fields.items()}
        wrong = [
            key for key, value in values.items() if isinstance(value, bool) and {int, float} & kinds.get(key, set())
        ]
        return values | {key: str(values[key]).lower() for key in wrong}


S = TypeVar("S", bound=Section)


class Variants(NamedTuple):
    """A section that is one of several classes, by the value of its key `tag`; without it, the first one."""

    tag: str
    members: tuple[type[Section], ...]

    def find_member(self, values: Mapping[str, Any]) -> type[Section] | None:
        """Returns the class that `values` ask for; None if no class has that tag."""
        name = values.get(self.tag, self.default)
        return next((member for member in self.members if name in self.list_tags(member)), None)

    def list_tags(self, member: type[Section]) -> tuple[str, ...]:
        """Returns the tag's values that stand for `member`."""
        return typing.get_args(member.model_fields[self.tag].annotation)

    @property
    def default(self) -> str:
        """The tag's value when it is left out."""
        return str(self.members[0].model_fields[self.tag].default)

    def find_owners(self, key: str) -> str:
        """Returns the variants that know `key`, as a file would choose them; "" if none does."""
        names = [name for member in self.members if key in member.model_fields for name in self.list_tags(member)]
        return " or ".join(f'{self.tag} = "{name}"' for name in names)


def default_tag(tag: str, value: str) -> pydantic.BeforeValidator:
    """Lets a discriminated union do without its tag, which then is `value`, the first class's default."""
    return pydantic.BeforeValidator(lambda values: {tag: value, **values} if isinstance(values, dict) else values)


def find_variants(field: FieldInfo) -> Variants | None:
    """Returns the variants of a field that is a discriminated union of sections; None for every other field."""
    tags = [item.discriminator for item in field.metadata if isinstance(item, pydantic.Discriminator)]
    return Variants(tag=str(tags[0]), members=typing.get_args(field.annotation)) if tags else None


def find_section(field: FieldInfo) -> type[Section] | None:
    """Returns the class of a field that is one section, or may be; None for a value or a union."""
    kind, parts = field.annotation, typing.get_args(field.annotation)
    if type(None) in parts and len(parts) == 2:  # may be left out
        kind = next(part for part in parts if part is not type(None))
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _list_kinds(field: FieldInfo) -> set[Any]:
    """Returns the types that a field may have: several for a union."""
    kind = field.annotation
    return set(typing.get_args(kind)) if typing.get_origin(kind) in (typing.Union, types.UnionType) else {kind}


def read_toml(path: str | Path) -> dict[str, Any]:
    """Parses a file. Raises ConfigError if it can't be read, is not a plain file, or is not TOML."""
    try:
        text = read_plain(Path(path))
    except OSError as error:
        raise ConfigError(f"configuration {str(path)!r} can't be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"configuration {str(path)!r} is not UTF-8 ({error.reason} at byte {error.start})") from None
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def validate(model: type[S], values: dict[str, Any], *, origin: str, folder: Path | None = None) -> S:
    """Returns `values` as a `model`. Raises ConfigError that lists every wrong key.

    `folder`: relative paths that the model takes from there are looked for in it (`service.ServicePath`).
    """
    try:
        return model.model_validate(values, context={"folder": folder or Path()})
    except pydantic.ValidationError as error:
        lines = [_describe(model, item) for item in error.errors()]
        raise ConfigError(f"{origin}:\n  " + "\n  ".join(lines)) from None


def apply_overrides(model: type[Section], values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Sets values from "section.key=value" each; a bare word is a string. Raises ConfigError on another form.

    An override that chooses another variant drops the keys that belong to the file's variant: they have no
    effect any more, and the file need not be changed for that.
    """
    written = copy.deepcopy(values)
    overridden = [_apply_override(model, values, override) for override in overrides]
    _drop_left_variants(model, values, written, (), overridden)


def _apply_override(model: type[Section], values: dict[str, Any], override: str) -> tuple[str, ...]:
    key, separator, text = override.partition("=")
    parts = tuple(key.strip().split("."))
    if not separator or len(parts) < 2:
        owners = [name for name, field in model.model_fields.items() if _knows(field, parts[0])]
        hint = f"; do you mean {' or '.join(f'{owner}.{parts[0]}' for owner in owners)}?" if owners else ""
        raise ConfigError(f"--set {remove_passwords(override)!r} is not of the form section.key=value{hint}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    if not isinstance(value, str) and _takes_text(model, values, parts):
        value = text  # a name such as 7 or 2026-11-27, as it was written
    for part in parts[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {remove_passwords(override)!r}: {part!r} is a value, not a section")
    values[parts[-1]] = value
    return parts


def _knows(field: FieldInfo, key: str) -> bool:
    variants, section = find_variants(field), find_section(field)
    return any(key in member.model_fields for member in (variants.members if variants else (section,)) if member)


def _takes_text(model: type[Section], values: Any, parts: Sequence[str]) -> bool:
    """Returns whether the field at `parts` is a text or a path, and not also a number."""
    section: type[Section] | None = model
    kinds: set[Any] = set()
    for part in parts:
        if (field := section.model_fields.get(part) if section is not None else None) is None:
            return False
        values = values.get(part, {}) if isinstance(values, dict) else {}
        variants, kinds = find_variants(field), _list_kinds(field)
        section = variants.find_member(values) if variants and isinstance(values, dict) else find_section(field)
    return bool(kinds & {str, Path}) and not kinds & {int, float}


def _drop_left_variants(
    model: type[Section], values: Any, written: Any, place: tuple[str, ...], overridden: list[tuple[str, ...]]
) -> None:
    """Drops keys of the variants that a file, `written`, chose and that `values`, after the overrides, don't."""
    for name, field in model.model_fields.items():
        section, before = values.get(name), written.get(name)
        if not isinstance(section, dict) or not isinstance(before, dict):
            continue
        here, variants = (*place, name), find_variants(field)
        chosen = variants.find_member(section) if variants is not None else find_section(field)
        left = variants.find_member(before) if variants is not None else None
        if chosen is None:
            continue
        if left is not None and left is not chosen:
            given = {parts[len(here)] for parts in overridden if len(parts) > len(here) and parts[: len(here)] == here}
            for key in set(before) & set(left.model_fields) - set(chosen.model_fields) - given:
                section.pop(key, None)
        _drop_left_variants(chosen, section, before, here, overridden)


def _describe(model: type[Section], error: Any) -> str:
    """Returns one of pydantic's errors as "key: what is wrong with it"."""
    place = _locate(model, error["loc"])
    key = ".".join(place.parts) or "configuration"
    if error["type"] == "union_tag_invalid":
        assert place.variants is not None
        return (
            f"{key}.{place.variants.tag}: must be one of {error['ctx']['expected_tags']}, got {error['ctx']['tag']!r}"
        )
    if error["type"] == "extra_forbidden":
        assert place.section is not None
        if place.variants is not None and (owners := place.variants.find_owners(place.parts[-1])):
            chosen = f'{place.variants.tag} = "{place.tag}"'
            return f"{key}: no such key with {chosen}; it belongs to {owners}: set that, or leave the key out"
        near = difflib.get_close_matches(place.parts[-1], place.section.model_fields, n=1)
        hint = f"did you mean {near[0]}? Known here: " if near else "known here: "
        return f"{key}: no such key; {hint}{', '.join(place.section.model_fields)}"
    if error["type"] == "missing":
        return f"{key}: is required"
    message = _EXPECTED.get(error["type"]) or error["msg"].removeprefix("Value error, ")
    if error["type"] == "string_pattern_mismatch":
        message = _FORMS.get(error["ctx"]["pattern"], message)
    message = message.replace("Input should", "should")
    return f"{key}: {message}" + (
        "" if error["type"] == "value_error" else remove_passwords(f", got {error['input']!r}")
    )


_EXPECTED = {
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "should be a whole number"),
    **dict.fromkeys(("float_parsing", "float_type"), "should be a number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "should be true or false"),
    **dict.fromkeys(("string_type", "path_type"), "should be a text"),
    **dict.fromkeys(("tuple_type", "list_type"), 'should be a list, e.g. ["one", "two"]'),
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "should be a table, e.g. { key = value }"),
}
"""pydantic's kinds of error, in words of TOML in place of Python's."""
_FORMS = {
    NAME: "should begin with a letter or digit and have only letters (a to z), digits, '.', '_' and '-'",
    f"^{_ADDRESS}$": "should be HOST:PORT, e.g. 127.0.0.1:50051",
    QUEUE_URL: "should begin with redis://, rediss:// or unix://, or be embedded",
    _ADDRESSES: "should be HOST:PORT, or several with commas between, e.g. 127.0.0.1:50051",
}
"""What each pattern asks for."""


class _Place(NamedTuple):
    """Where an error is: the key, the section that holds its last part, and of which variants that section is one."""

    parts: list[str]
    section: type[Section] | None
    variants: Variants | None
    tag: str | None


def _locate(model: type[Section], location: Sequence[int | str]) -> _Place:
    """Follows pydantic's location, in which a union's name is followed by the tag of the variant."""
    place = _Place([], model, None, None)
    steps = deque(map(str, location))
    while steps:
        parts, section = [*place.parts, steps.popleft()], place.section
        field = section.model_fields.get(parts[-1]) if section is not None else None
        variants = find_variants(field) if field is not None else None
        if variants is not None:
            tag = steps.popleft() if steps else None
            place = _Place(parts, variants.find_member({variants.tag: tag}), variants, tag)
        elif not steps:
            place = place._replace(parts=parts)
        else:
            place = _Place(parts, find_section(field) if field is not None else None, None, None)
    return place
