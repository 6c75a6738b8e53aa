"""The content store: images by the SHA-256 of their encoded bytes, the least recently used dropped when room is short.

A dropped image is no loss: the group that names it gets NOT_FOUND, and the client uploads it again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable

from vaopd.errors import LimitExceeded, NotFound
from vaopd.types import EncodedImage

DEFAULT_CAPACITY_BYTES = 2**30


class ImageStore:
    """Used from the event loop and from the threads that prepare prompts."""

    def __init__(self, capacity_bytes: int = DEFAULT_CAPACITY_BYTES) -> None:
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

    def get(self, sha256: str) -> EncodedImage:
        """Raises NotFound for an image that was never sent, or was dropped."""
        with self._lock:
            if sha256 not in self._images:
                raise NotFound(f"image {sha256[:64]!r} is not stored here; upload it with PutImages")
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
