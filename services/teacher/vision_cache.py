"""The frozen vision tower's output by image and view: what five epochs over one data set need once.

An entry holds all that the text model takes of an image, deepstack features included, in the host's memory, under a
byte budget; the least recently used go first. Each image is encoded by itself, so that its features are the same bits
whatever else is in the forward that needs them first. Only for weights that never change: the student trains its tower.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from vaopd.families import ImageFeatures, PreparedImage
from vaopd.vlm import Vlm


class VisionCache:
    """Used by the engine's thread; the counters may be read from others."""

    def __init__(self, vlm: Vlm, *, capacity_bytes: int) -> None:
        self.hits = 0
        """Features taken from here; an image that occurs twice in one forward counts once."""
        self.misses = 0
        """Runs of the vision tower; images without a key are always one."""
        self.dropped = 0
        """Entries that had to make room."""
        self.size_bytes = 0
        self._vlm = vlm
        self._capacity_bytes = capacity_bytes
        self._entries: OrderedDict[str, ImageFeatures] = OrderedDict()

    def features(self, images: Sequence[PreparedImage]) -> list[ImageFeatures]:
        """One per image, in order."""
        found: dict[str | int, ImageFeatures] = {}
        for image in images:
            if _name(image) not in found:
                found[_name(image)] = self._one(image)
        return [found[_name(image)] for image in images]

    def _one(self, image: PreparedImage) -> ImageFeatures:
        if image.key is not None and image.key in self._entries:
            self.hits += 1
            self._entries.move_to_end(image.key)
            device = self._vlm.device
            return tuple(part.to(device, non_blocking=True) for part in self._entries[image.key])
        self.misses += 1
        (features,) = self._vlm.encode_images([image])
        if image.key is not None:
            self._keep(image.key, features)
        return features

    def _keep(self, key: str, features: ImageFeatures) -> None:
        size = sum(part.nbytes for part in features)
        if size > self._capacity_bytes:
            return
        # A copy of its own: a view would keep everything alive that the tower returned beside it.
        self._entries[key] = tuple(part.to("cpu", copy=True) for part in features)
        self.size_bytes += size
        while self.size_bytes > self._capacity_bytes:
            _, dropped = self._entries.popitem(last=False)
            self.size_bytes -= sum(part.nbytes for part in dropped)
            self.dropped += 1


def _name(image: PreparedImage) -> str | int:
    return id(image) if image.key is None else image.key
