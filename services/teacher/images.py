"""Images by the SHA-256 of their encoded bytes: two stores, a byte budget for each, least recently used first out.

`ImageStore` keeps the encoded bytes that clients sent. `PreparedImages` keeps what the vision tower reads, one entry
per image and view, so that an image is decoded, degraded and processed once, at its upload. Nothing dropped is lost: a
view is made again from the bytes, and a group whose bytes are gone gets NOT_FOUND, so that the client uploads again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from vaopd.errors import LimitExceeded, NotFound
from vaopd.families import PreparedImage
from vaopd.types import EncodedImage


class ImageStore:
    """Used from the event loop and from the threads that prepare prompts."""

    def __init__(self, capacity_bytes: int) -> None:
        self.hits = 0
        """Look-ups of an image that was there."""
        self.misses = 0
        self.dropped = 0
        """Images that had to make room."""
        self._capacity_bytes = capacity_bytes
        self._size_bytes = 0
        self._images: OrderedDict[str, EncodedImage] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, image: EncodedImage) -> None:
        size = len(image.data)
        if size > self._capacity_bytes:
            raise LimitExceeded(
                f"image {image.sha256[:12]}… has {size} bytes, the teacher keeps {self._capacity_bytes} in all; "
                "send a smaller encoding"
            )
        with self._lock:
            if image.sha256 in self._images:
                self._images.move_to_end(image.sha256)
                return
            self._images[image.sha256] = image
            self._size_bytes += size
            while self._size_bytes > self._capacity_bytes:
                _, dropped = self._images.popitem(last=False)
                self._size_bytes -= len(dropped.data)
                self.dropped += 1

    def get(self, sha256: str) -> EncodedImage:
        """Raises NotFound for an image that was never sent, or was dropped."""
        with self._lock:
            if sha256 not in self._images:
                self.misses += 1
                raise NotFound(f"image {sha256[:64]!r} is not stored here; upload it with PutImages")
            self.hits += 1
            self._images.move_to_end(sha256)
            return self._images[sha256]

    def missing(self, digests: Iterable[str]) -> list[str]:
        """Those of `digests` that aren't stored; the others count as used just now."""
        absent = []
        with self._lock:
            for sha256 in dict.fromkeys(digests):
                if sha256 in self._images:
                    self._images.move_to_end(sha256)
                else:
                    absent.append(sha256)
        return absent


class PreparedImages:
    """Used from the threads that prepare prompts; two that want the same view at once make it once."""

    def __init__(self, capacity_bytes: int) -> None:
        self.hits = 0
        """Look-ups of a view that was there, or being made."""
        self.misses = 0
        """Views that were made: one decoding (or the other view's), one run of the image processor."""
        self.dropped = 0
        self._capacity_bytes = capacity_bytes
        self._size_bytes = 0
        self._images: OrderedDict[str, PreparedImage] = OrderedDict()
        self._making: dict[str, Future[PreparedImage]] = {}
        self._lock = threading.Lock()

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def get(self, key: str, make: Callable[[], PreparedImage]) -> PreparedImage:
        """The view known as `key`; `make` is called when nobody has it, and what it raises reaches all who wait."""
        with self._lock:
            if key in self._images:
                self.hits += 1
                self._images.move_to_end(key)
                return self._images[key]
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

    def _keep(self, key: str, image: PreparedImage) -> None:
        size = image.pixel_values.nbytes
        if size > self._capacity_bytes:
            return
        self._images[key] = image
        self._size_bytes += size
        while self._size_bytes > self._capacity_bytes:
            _, dropped = self._images.popitem(last=False)
            self._size_bytes -= dropped.pixel_values.nbytes
            self.dropped += 1
