"""A cache of the frozen vision tower's output by image and view, so that further epochs don't run the tower again.

An entry holds everything that the text model takes of an image, deepstack features included, in the host's memory,
within a byte budget; the least recently used are dropped. Each image is encoded by itself, so that its features are the
same bits in every forward. Only for weights that never change: the student trains its tower.
"""

from __future__ import annotations

from collections.abc import Sequence

from vaopd.vlm.families import ImageFeatures, PreparedImage
from vaopd.vlm.model import Vlm
from vaopd_teacher.engines.byte_lru import ByteLru


class VisionCache(ByteLru[ImageFeatures]):
    """Used by the engine's thread; the counters may be read from others.

    `hits`: features taken from the cache; an image that occurs twice in one forward counts once. `misses`: runs of the
    vision tower, which images without a key always need.
    """

    def __init__(self, vlm: Vlm, *, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes, size_of=lambda features: sum(part.nbytes for part in features))
        self._vlm = vlm

    def features(self, images: Sequence[PreparedImage]) -> list[ImageFeatures]:
        """Returns the features of each image, in order, on the model's device."""
        found: dict[str | int, ImageFeatures] = {}
        for image in images:
            if _name(image) not in found:
                found[_name(image)] = self._encode_one(image)
        return [found[_name(image)] for image in images]

    def _encode_one(self, image: PreparedImage) -> ImageFeatures:
        if image.key is not None and (kept := self._values.get(image.key)) is not None:
            self.hits += 1
            return tuple(part.to(self._vlm.device, non_blocking=True) for part in kept)
        self.misses += 1
        (features,) = self._vlm.encode_images([image])
        if image.key is not None and self._fits(features):
            # Copied: a view would keep alive everything else that the tower returned.
            self._values[image.key] = tuple(part.to("cpu", copy=True) for part in features)
        return features


def _name(image: PreparedImage) -> str | int:
    return id(image) if image.key is None else image.key
