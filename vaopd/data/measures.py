"""Measures prompts before a run: decodes their pictures, counts their tokens, names their content.

    prompts ──► threads: read ──► known? ──no──► decode each picture, count the tokens ──► Measured, or Fault
                                    │ yes                                                    │
                                    └────────────── the cache's file of this split ◄─────────┘

Pillow releases the interpreter while it decodes, so threads suffice. A measure is kept by content: a record's text and
image bytes, the processor's files, the pixel bounds. A second start reads the bytes and decodes nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import threading
import unicodedata
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image

from vaopd.data.loaders import Prompts
from vaopd.data.records import Fault
from vaopd.errors import ConfigError, ImageRefused, InvalidInput, LimitExceeded
from vaopd.files.durable import write_atomic
from vaopd.files.hub import find_file
from vaopd.images import decode
from vaopd.process.extras import find_version
from vaopd.types import ImagePart, Prompt, TextPart

if TYPE_CHECKING:
    from vaopd.vlm.families import PreparedImage
    from vaopd.vlm.prompts import PromptReader

CACHE_VARIABLE = "VAOPD_CACHE"
"""The folder of measures; without it, vaopd's in the user's cache folder."""
_FORMAT = 1  # of the cache; another one measures everything again
_MAX_THREADS = 16  # a decoded picture of 32 megapixels has 96 MB
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".index.json")

Report = Callable[[int, int], None]
"""Called with how many records are done, and of how many."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A prompt's measures.

    content: SHA-256 of question and pixels, the same for another encoding of the same problem. tokens: image tokens
    included; None without a model. sizes: width and height of each picture, as a viewer shows it.
    """

    content: str
    tokens: int | None
    sizes: tuple[tuple[int, int], ...]


class Meter:
    """Counts a prompt's tokens as a model reads it. Its processor is opened when the first prompt is counted."""

    def __init__(self, model: str, *, min_pixels: int | None = None, max_pixels: int | None = None) -> None:
        """model: folder or hub id; its weights are not read. The pixel bounds override the processor's own."""
        self.model = model
        self._bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        self._lock = threading.RLock()
        self._reader: PromptReader | None = None
        self._prepared: dict[tuple[int, int], PreparedImage] = {}

    @property
    def is_here(self) -> bool:
        """Whether the processor can be opened without the hub."""
        return self._find_folder() is not None

    @cached_property
    def digest(self) -> str:
        """Names everything that a count depends on but the prompt: processor, tokenizer, bounds, libraries."""
        folder = self._find_folder()
        if folder is None:
            self._open()  # downloads it, or raises
            folder = self._find_folder()
        libraries = [find_version(name) for name in ("transformers", "tokenizers", "pillow")]
        digest = hashlib.sha256(json.dumps([_FORMAT, self._bounds, libraries]).encode())
        for file in sorted(folder.iterdir()) if folder else ():
            if file.is_file() and not file.name.endswith(_WEIGHTS):
                digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()

    def count(self, prompt: Prompt, sizes: Mapping[str, tuple[int, int]]) -> int:
        """Returns a prompt's tokens. sizes: width and height of each image, by SHA-256.

        Raises InvalidInput for a text that the model refuses, ConfigError for a model without a processor.
        """
        reader = self._open()
        prepared = {sha256: self._prepare(reader, size) for sha256, size in sizes.items()}
        with self._lock:  # a tokenizer serves one thread at a time
            return len(reader.render(prompt.messages, prepared).token_ids)

    def _open(self) -> PromptReader:
        from vaopd.vlm.prompts import PromptReader

        with self._lock:
            if self._reader is None:
                try:
                    self._reader = PromptReader.open(self.model, **self._bounds)
                except ValueError as error:  # transformers doesn't know it
                    raise ConfigError(f"the processor of {self.model!r} can't be loaded: {error}") from None
            return self._reader

    def _prepare(self, reader: PromptReader, size: tuple[int, int]) -> PreparedImage:
        """Prepares an empty picture: the tokens depend on the size alone."""
        found = self._prepared.get(size)
        if found is None:
            try:
                found = reader.prepare_image(reader.scale_image(PIL.Image.new("RGB", size)))
            except ValueError as error:  # e.g. an aspect ratio that this family doesn't take
                raise ImageRefused(f"the model's processor refuses a picture of {size[0]}×{size[1]}: {error}") from None
            found = dataclasses.replace(found, pixel_values=found.pixel_values[:0].clone())  # only the grid is kept
            self._prepared[size] = found
        return found

    def _find_folder(self) -> Path | None:
        """Finds the processor's files on this host, in a folder of models or in the hub's cache."""
        file = find_file(self.model, "config.json")
        return file.parent if file and any(file.with_name(name).is_file() for name in _PROCESSOR_FILES) else None


def measure(
    prompts: Prompts, meter: Meter | None, *, on_progress: Report = lambda done, total: None
) -> tuple[dict[int, Measured], list[Fault]]:
    """Measures prompts whose texts are sound -> measures by record, and the records that can't be read.

    Without a meter, tokens are not counted. Raises ConfigError for a model without a processor.
    """
    indices = prompts.indices
    cache = _Cache(prompts, meter)
    measured: dict[int, Measured] = {}
    faults: list[Fault] = []
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        results = pool.map(lambda index: _measure_one(prompts, index, meter, cache), indices)
        try:
            for done, (index, result) in enumerate(zip(indices, results, strict=True), 1):
                if isinstance(result, Fault):
                    faults.append(result)
                else:
                    measured[index] = result
                on_progress(done, len(indices))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    cache.save()
    return measured, faults


def _measure_one(prompts: Prompts, index: int, meter: Meter | None, cache: _Cache) -> Measured | Fault:
    prompt = prompts.read(index)
    if isinstance(prompt, Fault):
        return prompt
    parts = [part for message in prompt.messages for part in message.content]
    key = hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()
    if (known := cache.find(key, index)) is not None:
        return known
    sizes: dict[str, tuple[int, int]] = {}
    pixels: dict[str, str] = {}
    shown = [part.sha256 for part in parts if isinstance(part, ImagePart)]
    for image in prompt.images:
        try:
            picture = decode(image)
        except (InvalidInput, LimitExceeded) as error:
            return cache.add(key, prompts.make_picture_fault(index, shown.index(image.sha256), str(error)))
        sizes[image.sha256] = picture.size
        pixels[image.sha256] = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
    try:
        tokens = None if meter is None else meter.count(prompt, sizes)
    except ImageRefused as error:
        return cache.add(key, prompts.make_picture_fault(index, 0, str(error)))
    except InvalidInput as error:
        field = prompts.name_text_field(index)
        return cache.add(key, Fault(index=index, kind="control token", field=field, message=str(error)))
    text = " ".join(part.text for part in parts if isinstance(part, TextPart))
    found = Measured(
        content=name_content(text, [pixels[sha256] for sha256 in shown]),
        tokens=tokens,
        sizes=tuple(sizes[sha256] for sha256 in shown),
    )
    return cache.add(key, found)


def name_content(text: str, pixels: list[str]) -> str:
    """Returns a problem's name by content: its words, whatever the spaces between them, and its pictures.

    >>> name_content("Find  x.", ["aa"]) == name_content(" Find x.", ["aa"]) != name_content("Find x.", ["bb"])
    True
    """
    words = " ".join(unicodedata.normalize("NFKC", text).split())
    return hashlib.sha256(json.dumps([words, pixels]).encode("utf-8", "surrogatepass")).hexdigest()


class _Cache:
    """What was measured of one split with one processor, as a JSON file; a folder that can't be written is ignored."""

    def __init__(self, prompts: Prompts, meter: Meter | None) -> None:
        source = str(Path(prompts.source).resolve()) if Path(prompts.source).is_dir() else prompts.source
        name = json.dumps([_FORMAT, source, prompts.split, meter and meter.digest])
        self._file = find_cache_folder() / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"
        self._entries: dict[str, Any] = {}
        self._grown = False
        with contextlib.suppress(OSError, ValueError, TypeError):  # none yet, or damaged: measured again
            self._entries = dict(json.loads(self._file.read_bytes()))

    def find(self, key: str, index: int) -> Measured | Fault | None:
        match self._entries.get(key):
            case [str() as content, tokens, [*sizes]]:
                return Measured(content=content, tokens=tokens, sizes=tuple((w, h) for w, h in sizes))
            case {"kind": kind, "field": field, "message": message}:
                return Fault(index=index, kind=kind, field=field, message=message)
        return None

    def add(self, key: str, found: Measured | Fault) -> Measured | Fault:
        self._grown = True
        if isinstance(found, Fault):
            self._entries[key] = {"kind": found.kind, "field": found.field, "message": found.message}
        else:
            self._entries[key] = [found.content, found.tokens, found.sizes]
        return found

    def save(self) -> None:
        if not self._grown:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._file, json.dumps(self._entries))
        except OSError as error:
            log.debug("%s can't be written (%s); the next start measures again", self._file, error)


def find_cache_folder() -> Path:
    """Returns the folder in which measures are kept: $VAOPD_CACHE, or vaopd's in the user's cache folder."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vaopd"
