"""Two stores of images, by SHA-256 of the encoded bytes, each with a byte budget.

`ImageStore` keeps the encoded bytes that clients sent; the least recently used are dropped. `PreparedImages` keeps the
vision tower's inputs, one entry per image and view, so that an image is decoded, degraded and processed once, at its
upload; `ReuseCache` says which are dropped. Dropped entries are recovered: a view is made again from the bytes, and a
group without its image's bytes gets NOT_FOUND, so that the client uploads them again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from vaopd.errors import LimitExceeded, NotFound
from vaopd.types import EncodedImage
from vaopd.vlm.families import PreparedImage
from vaopd_teacher.engines.byte_lru import ByteLru
from vaopd_teacher.engines.reuse_cache import ReuseCache


class ImageStore(ByteLru[EncodedImage]):
    """Encoded images; used from the event loop and the preparing threads. `hits`: look-ups that found the image."""

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes, size_of=lambda image: len(image.data))
        self._lock = threading.Lock()

    def put(self, image: EncodedImage) -> None:
        """Stores an image. Raises LimitExceeded for one that is larger than the store."""
        if not self._fits(image):
            raise LimitExceeded(
                f"image {image.sha256[:12]}… has {len(image.data)} bytes, the teacher keeps "
                f"{self.capacity_bytes} in all; send a smaller encoding"
            )
        with self._lock:
            self._values.setdefault(image.sha256, image)

    def get(self, sha256: str) -> EncodedImage:
        """Returns an image. Raises NotFound for one that was never sent, or was dropped."""
        with self._lock:
            image = self._values.get(sha256)
            if image is None:
                self.misses += 1
                raise NotFound(f"image {sha256[:64]!r} is not stored here; upload it with PutImages")
            self.hits += 1
            return image

    def find_missing(self, digests: Iterable[str]) -> list[str]:
        """Returns those of `digests` that aren't stored; the others count as used just now."""
        with self._lock:
            return [sha256 for sha256 in dict.fromkeys(digests) if self._values.get(sha256) is None]


class PreparedImages(ReuseCache[PreparedImage]):
    """Views of images; used from the preparing threads. Two that need the same view at once make it once.

    `hits`: look-ups of a view that was stored or being made. `misses`: views that were made, each with one decoding (or
    the other view's) and one run of the image processor.
    """

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes, size_of=lambda image: image.pixel_values.nbytes)
        self._making: dict[str, Future[PreparedImage]] = {}
        self._lock = threading.Lock()

    def get(self, key: str, make: Callable[[], PreparedImage]) -> PreparedImage:
        """Returns the view named `key`, made by `make` if it is missing; all waiters get its error."""
        with self._lock:
            if (kept := self._find(key)) is not None:
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
            self._keep(key, image)
        mine.set_result(image)
        return image
