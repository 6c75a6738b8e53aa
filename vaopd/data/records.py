"""One record of a data set: its columns, what may be wrong with it, its answer as text, its images as bytes.

A record has a text (`problem` as in Geometry3K, `question` as in ViRL39K), an `answer`, and `images` or `image`: one or
a list of bytes, paths or structs of both. "<image>" in the text marks the place of an image. A configuration may give
other names, a system prompt, and turns in place of the text (`vaopd.config.ColumnsConfig`).
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Literal

from vaopd.config import ColumnsConfig
from vaopd.data.tables import Rows
from vaopd.errors import InvalidInput
from vaopd.types import EncodedImage, ImagePart, Message, TextPart

IMAGE_MARKER = "<image>"
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")
# A data URI, or the base64 of one of these beginnings; "/9j/" alone could be a path.
_BASE64 = re.compile(r"(?:data:[^,]*;base64,|(?=iVBORw0KGgo|UklGR|/9j/[\w+/]{100}))(?P<data>[\w+/=\s-]+)")
_URL = re.compile(r"[a-z][a-z0-9+]+:/", re.IGNORECASE)

Role = Literal["system", "user", "assistant"]
_ROLES: dict[str, Role] = {
    "system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant",
}  # fmt: skip
FaultKind = Literal["text", "answer", "image markers", "control token", "picture", "over-long", "overlap"]


@dataclass(frozen=True, kw_only=True)
class Schema:
    """The columns of a data set's text, answer, images and record id (the first of `record_ids` that it has).

    has_turns: whether the text is a list of turns. needs_answer: whether a record without a reference is bad.
    """

    text: str
    images: str
    answer: str = "answer"
    record_ids: tuple[str, ...] = ("qid", "id")
    system: str = ""
    has_turns: bool = False
    needs_answer: bool = True

    def rename(self, columns: ColumnsConfig) -> Schema:
        """Returns it with the names that a configuration gives."""
        return replace(
            self,
            text=columns.messages or columns.text or self.text,
            images=columns.images or self.images,
            answer=columns.answer or self.answer,
            record_ids=(columns.id,) if columns.id else self.record_ids,
            system=columns.system,
            has_turns=bool(columns.messages) or (self.has_turns and not columns.text),
        )

    def split_turns(self, text: object) -> list[tuple[Role, str]]:
        """Returns a record's turns, system prompt excluded, each with its text. Raises InvalidInput."""
        return read_turns(text) if self.has_turns else [("user", check_text(text))]


SCHEMAS = (
    Schema(text="problem", images="images"),
    Schema(text="question", images="image"),
    Schema(text="problem", images="image"),
    Schema(text="question", images="images"),
    Schema(text="messages", images="images", has_turns=True),
    Schema(text="messages", images="image", has_turns=True),
    Schema(text="conversations", images="image", has_turns=True),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A reason why a record can't be used; `index` counts the split's records from 0.

    >>> str(Fault(index=3, kind="answer", field="answer", message="the answer is missing or empty"))
    "record 3, field 'answer': the answer is missing or empty"
    """

    index: int
    kind: FaultKind
    field: str
    message: str

    def __str__(self) -> str:
        return f"record {self.index}, field {self.field!r}: {self.message}"


def recognise(
    files: Sequence[Rows],
    source: str,
    *,
    columns: ColumnsConfig = ColumnsConfig(),
    may_differ: bool = False,
    needs_answer: bool = True,
) -> list[tuple[Rows, Schema]]:
    """Finds the columns of each file; a file may lack images if another has them.

    columns: names that come before the known ones. may_differ: they are another data set's, and this one may have the
    known names. Raises InvalidInput, naming file and columns, where text, images or, if it is needed, the answer is
    missing.
    """
    names = {name for rows in files for name in rows.columns}
    given = {key: name for key, name in columns.model_dump().items() if name}
    absent = {key: name for key, name in given.items() if name not in names}
    renamed = [] if absent else [schema.rename(columns) for schema in SCHEMAS]
    known = SCHEMAS if may_differ or not absent else ()
    schemas = [replace(schema, needs_answer=needs_answer) for schema in dict.fromkeys((*renamed, *known))]
    shards = []
    for rows in (rows for rows in files if len(rows) or len(files) == 1):
        for needs_images in (True, False):
            fitting = [
                schema
                for schema in schemas
                if {schema.text, *((schema.answer,) if needs_answer else ())} <= set(rows.columns)
                and schema.images in (rows.columns if needs_images else names)
            ]
            if fitting:
                shards.append((rows, fitting[0]))
                break
        else:
            unknown = (
                k for k in ("text", "images", "answer") if names.isdisjoint(getattr(each, k) for each in SCHEMAS)
            )
            usual = (
                "problem or question (or turns: messages or conversations), answer (unless it is only trained on), and "
                "images or image (an empty list where a problem has none)"
            )
            needed = ", ".join(f"data.columns.{key} = {name}" for key, name in absent.items()) or usual
            has, key = ", ".join(rows.columns) or "none", next(iter(absent or unknown), "text")
            raise InvalidInput(
                f"{rows.file or source} has columns {has}; needed: {needed}; name them, e.g. "
                f"--set data.columns.{key}=NAME (vaopd data: --column {key}=NAME)"
            )
    return shards


def find_fault(
    index: int, schema: Schema, text: object, answer: object, num_images: int, control_tokens: Sequence[str]
) -> Fault | None:
    """Checks a record's text, answer and number of images, not the images themselves."""

    def fault(kind: FaultKind, field: str, message: str) -> Fault:
        return Fault(index=index, kind=kind, field=field, message=message)

    try:
        text = "\n".join(turn for _, turn in schema.split_turns(text))
    except InvalidInput as error:
        return fault("text", schema.text, str(error))
    if half := _find_half_character(text):
        return fault("text", schema.text, f"the text holds {half}, half of a character; write the file again as UTF-8")
    try:
        if schema.needs_answer and not as_answer(answer):
            return fault("answer", schema.answer, "the answer is missing or empty")
    except InvalidInput as error:
        return fault("answer", schema.answer, str(error))
    markers = text.count(IMAGE_MARKER)
    if markers not in (0, num_images):
        return fault(
            "image markers",
            schema.text,
            f"the text has {markers} {IMAGE_MARKER} markers and the record {num_images} images; give one marker for "
            "each image, or none",
        )
    if found := find_control_token(text, control_tokens):
        return fault("control token", schema.text, f"the text holds {found!r}, a control token of the model")
    return None


def check_text(text: object) -> str:
    """Returns a question's text. Raises InvalidInput for one that is missing, empty or of another type."""
    if text is not None and not isinstance(text, str):
        raise InvalidInput(f"{_describe(text)} where a text belongs")
    if not text or not text.replace(IMAGE_MARKER, "").strip():
        raise InvalidInput("the text is missing or empty")
    return text


def read_turns(value: object) -> list[tuple[Role, str]]:
    """Returns (role, text with image markers) of each turn; a last turn of the assistant is left out.

    Raises InvalidInput for another form, and where the last turn isn't the user's.

    >>> read_turns([{"from": "human", "value": "<image>Where?"}, {"role": "assistant", "content": "Here."}])
    [('user', '<image>Where?')]
    """
    if value is not None and not isinstance(value, list):
        raise InvalidInput(f"{_describe(value)} where a list of turns belongs")
    turns = []
    for number, turn in enumerate(value or [], 1):
        role = _ROLES.get(str(turn.get("role") or turn.get("from"))) if isinstance(turn, dict) else None
        if role is None:
            raise InvalidInput(f"turn {number} has no role of {', '.join(_ROLES)}; give role and content")
        content = turn.get("content") or turn.get("value")
        try:
            text = "".join(map(_read_part, content)) if isinstance(content, list) else content
            turns.append((role, check_text(text)))
        except InvalidInput as error:
            raise InvalidInput(f"turn {number}: {error}") from None
    if turns and turns[-1][0] == "assistant":
        turns.pop()
    if not turns or turns[-1][0] != "user":
        raise InvalidInput("the turns don't end with the user's; give at least one question")
    return turns


def _read_part(part: object) -> str:
    """Returns the text of a part of a turn, or the marker of an image. Raises InvalidInput for any other part."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else _describe(part)
    if isinstance(part, dict) and kind in ("image", "image_url"):
        return IMAGE_MARKER
    if isinstance(part, dict) and kind in ("text", None):
        return check_text(part.get("text"))
    raise InvalidInput(f"a part is {kind!r}, neither text nor image")


def make_messages(turns: Sequence[tuple[Role, str]], image_sha256: Sequence[str]) -> tuple[Message, ...]:
    """Returns the turns as messages, each image at its marker; without any marker, all before the first question."""
    left = list(image_sha256)
    placed = any(IMAGE_MARKER in text for _, text in turns)
    first = next(index for index, (role, _) in enumerate(turns) if role == "user")
    messages = []
    for index, (role, text) in enumerate(turns):
        count = text.count(IMAGE_MARKER) if placed else len(left) * (index == first)
        messages.append(Message(role=role, content=content_parts(text, left[:count])))
        del left[:count]
    return tuple(messages)


def _find_half_character(text: str) -> str | None:
    """Returns the first lone surrogate, e.g. "U+D83D": JSON may hold one, UTF-8 and tokenizers may not."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"U+{ord(text[error.start]):04X}"
    return None


def find_control_token(text: str, control_tokens: Sequence[str]) -> str | None:
    """Returns the first of the model's control tokens that a text holds; the image marker is none."""
    written = text.replace(IMAGE_MARKER, "")  # it is a token of some families
    return next((token for token in control_tokens if token in written), None)


def as_answer(value: object) -> str:
    """Returns an answer as text, "" for none; raises InvalidInput for one that is neither text nor a finite number.

    >>> as_answer(12), as_answer(1e-7), as_answer([" x "])
    ('12', '0.0000001', 'x')
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool) and math.isfinite(value):
        return format(Decimal(str(value)), "f")
    raise InvalidInput(f"the answer is {_describe(value)}; give a text or a number")


def _describe(value: object) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    kinds = {dict: "a struct", bytes: "bytes", bool: "true or false", float: "no finite number"}
    return kinds.get(type(value), f"of type {type(value).__name__}")


def content_parts(text: str, image_sha256: Sequence[str]) -> tuple[TextPart | ImagePart, ...]:
    """Splits a text at its image markers into parts in reading order; without a marker the images come first.

    >>> content_parts("Is <image> like <image>?", ["aa", "bb"])[1]
    ImagePart(sha256='aa')
    """
    pieces = text.split(IMAGE_MARKER)
    if len(pieces) == 1:
        return (*(ImagePart(sha256=sha256) for sha256 in image_sha256), TextPart(text=text))
    parts: list[TextPart | ImagePart] = []
    for piece, sha256 in zip(pieces, [*image_sha256, None], strict=True):
        if piece:
            parts.append(TextPart(text=piece))
        if sha256 is not None:
            parts.append(ImagePart(sha256=sha256))
    return tuple(parts)


def read_image(entry: object, *, folder: Path | None, table: Path | None) -> EncodedImage:
    """Reads an image's bytes, from the record itself (base64 too) or from the file inside `folder` that it names.

    table: the file that holds the record; None for the hub's. Raises InvalidInput; nothing is decoded.
    """
    stored, path = (entry.get("bytes"), entry.get("path")) if isinstance(entry, dict) else (entry, entry)
    encoded = next(
        (found for text in (stored, path) if isinstance(text, str) and (found := _BASE64.fullmatch(text))), None
    )
    if isinstance(stored, bytes) and (stored or not path):
        data = stored
    elif encoded:
        try:
            data = base64.b64decode(encoded["data"].translate({45: "+", 95: "/"}))
        except binascii.Error:
            raise InvalidInput(
                f"base64 that ends early ({len(encoded['data'])} characters); correct or drop it"
            ) from None
    elif isinstance(path, str) and path:
        data = _read_file(path, folder, table)
    else:
        raise InvalidInput("there are neither image bytes nor a path; correct or drop the record")
    if not data.startswith(_MAGIC):
        raise InvalidInput(f"not a PNG, JPEG or WEBP image ({len(data)} bytes); convert or drop it")
    return EncodedImage(data=data)


def _read_file(path: str, folder: Path | None, table: Path | None) -> bytes:
    if folder is None or table is None:
        raise InvalidInput(
            f"the image {path!r} is a file beside the Parquet file, which the hub's loader doesn't deliver; download "
            "the data set, unpack its images, and give the folder as the source"
        )
    if _URL.match(path):
        raise InvalidInput(f"{path[:80]!r} is a URL, and none is fetched; download the picture and give its path")
    try:
        beside = (table.parent / path).resolve()
        file = beside if beside.is_file() else (folder / path).resolve()
        found = file.is_file()
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, or a loop of links
        raise InvalidInput(f"{path[:80]!r} is no path; correct or drop the record") from None
    # A record may name files of its own folder only, since the files are sent to other machines.
    if not file.is_relative_to(folder.resolve()):
        raise InvalidInput(f"the path {path!r} leads out of {folder}; use paths inside the folder")
    if not found:
        raise InvalidInput(f"there is no file {str(file)!r}; unpack the data set's images beside its Parquet file")
    try:
        return file.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{file} can't be read ({error.strerror}); correct or drop the record") from None
