"""Images by the SHA-256 of their encoded bytes: two stores, a byte budget for each, least recently used first out.

`ImageStore` keeps the encoded bytes that clients sent. `PreparedImages` keeps what the vision tower reads, one entry
per image and view, so that an image is decoded, degraded and processed once, at its upload. Nothing dropped is lost: a
view is made again from the bytes, and a group whose bytes are gone gets NOT_FOUND, so that the client uploads again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from vaopd.errors import LimitExceeded, NotFound
from vaopd.types import EncodedImage
from vaopd.vlm.families import PreparedImage
from vaopd_teacher.engines.byte_lru import ByteLru


class ImageStore(ByteLru[EncodedImage]):
    """Used from the event loop and from the threads that prepare prompts. `hits`: look-ups that found the image."""

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes, size_of=lambda image: len(image.data))
        self._lock = threading.Lock()

    def put(self, image: EncodedImage) -> None:
        if not self._fits(image):
            raise LimitExceeded(
                f"image {image.sha256[:12]}… has {len(image.data)} bytes, the teacher keeps "
                f"{self.capacity_bytes} in all; send a smaller encoding"
            )
        with self._lock:
            self._values.setdefault(image.sha256, image)

    def get(self, sha256: str) -> EncodedImage:
        """Raises NotFound for an image that was never sent, or was dropped."""
        with self._lock:
            image = self._values.get(sha256)
            if image is None:
                self.misses += 1
                raise NotFound(f"image {sha256[:64]!r} is not stored here; upload it with PutImages")
            self.hits += 1
            return image

    def missing(self, digests: Iterable[str]) -> list[str]:
        """Those of `digests` that aren't stored; the others count as used just now."""
        with self._lock:
            return [sha256 for sha256 in dict.fromkeys(digests) if self._values.get(sha256) is None]


class PreparedImages(ByteLru[PreparedImage]):
    """Used from the threads that prepare prompts; two that want the same view at once make it once.

    `hits`: look-ups of a view that was there, or being made. `misses`: views that were made, each with one decoding (or
    the other view's) and one run of the image processor.
    """

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes, size_of=lambda image: image.pixel_values.nbytes)
        self._making: dict[str, Future[PreparedImage]] = {}
        self._lock = threading.Lock()

    def get(self, key: str, make: Callable[[], PreparedImage]) -> PreparedImage:
        """The view known as `key`; `make` is called when nobody has it, and what it raises reaches all who wait."""
        with self._lock:
            if (kept := self._values.get(key)) is not None:
                self.hits += 1
                return kept
            being_made = self._making.get(key)
            if being_made is None:
                self.misses += 1
                mine: Future[PreparedImage] = Future()
                self._making[key] = mine
            else:
                self.hits += 1
        if being_made is not None:
            return being_made.result()
        try:
            image = make()
        except BaseException as error:
            with self._lock:
                del self._making[key]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._making[key]
            if self._fits(image):
                self._values[key] = image
        mine.set_result(image)
        return image
