"""Two stores of images, by SHA-256 of the encoded bytes, each with a byte budget.

`ImageStore` keeps the encoded bytes that clients sent, each charged to a job. `PreparedImages` keeps the vision tower's
inputs, one entry per image and view, so that an image is decoded, degraded and processed once, at its upload;
`ReuseCache` says which are dropped. Dropped entries are recovered: a view is made again from the bytes, and a group
without its image's bytes gets NOT_FOUND, so that the client uploads them again.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from vaopd.errors import Busy, LimitExceeded, NotFound
from vaopd.types import EncodedImage
from vaopd.vlm.families import PreparedImage
from vaopd_teacher.engines.reuse_cache import ReuseCache

IDLE_S = 600.0
"""The images of a job that was silent for so long make room first."""
MAX_STORED = 2**18
"""Images, however small they are: beside its bytes each takes about 600 of the books'. The job with most makes room."""
_RETRY_S = 1.0


@dataclass(slots=True, eq=False)
class _Share:
    """One job's images, the least recently used first."""

    weight: float
    images: OrderedDict[str, EncodedImage] = field(default_factory=OrderedDict)
    size_bytes: int = 0
    seen_s: float = 0.0

    @property
    def load(self) -> float:
        return self.size_bytes / self.weight


class ImageStore:
    """Encoded images, a fair share for each job; used from the event loop and the preparing threads.

    A job may use the room that the others leave. Where an upload needs room, the job with most bytes for its weight
    gives it, its least recently used image first, so a job within its share loses nothing to one that floods. Pinned
    images, which a call is about to read, stay; beyond its share a job can't keep out others with pins. An image that
    several jobs use is charged to the one with least. `hits`: look-ups that found the image.
    """

    def __init__(
        self, capacity_bytes: int, *, weights: Mapping[str, float] = {}, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """weights: of jobs, 1 for those not named."""
        self.capacity_bytes = capacity_bytes
        self.size_bytes = 0
        self.hits = self.misses = self.dropped = 0
        self._weights = weights
        self._clock = clock
        self._shares: dict[str, _Share] = {}
        self._owners: dict[str, str] = {}  # SHA-256 -> job
        self._pins: Counter[str] = Counter()
        self._lock = threading.Lock()

    def put(self, image: EncodedImage, *, job: str = "") -> None:
        """Stores an image. Raises LimitExceeded for one that is larger than the store, Busy while it finds no room."""
        nbytes = len(image.data)
        if nbytes > self.capacity_bytes:
            raise LimitExceeded(
                f"image {image.sha256[:12]}… has {nbytes} bytes, the teacher keeps "
                f"{self.capacity_bytes} in all; send a smaller encoding"
            )
        with self._lock:
            if self._use(image.sha256, job) is not None:
                return
            while self.size_bytes + nbytes > self.capacity_bytes:
                self._drop_for(job, nbytes)
            if len(self._owners) >= MAX_STORED:
                largest = max(self._shares.values(), key=lambda share: len(share.images))
                self._drop(next(self._list_free(largest), None))
            self._add(job, image)

    def get(self, sha256: str) -> EncodedImage:
        """Returns an image. Raises NotFound for one that was never sent, or was dropped."""
        with self._lock:
            image = self._use(sha256, None)
            if image is None:
                self.misses += 1
                raise NotFound(f"image {sha256[:64]!r} is not stored here; upload it with PutImages")
            self.hits += 1
            return image

    def find_missing(self, digests: Iterable[str], *, job: str = "") -> list[str]:
        """Returns those of `digests` that aren't stored; the others count as used just now."""
        with self._lock:
            return [sha256 for sha256 in dict.fromkeys(digests) if self._use(sha256, job) is None]

    def pin(self, digests: Iterable[str], *, job: str = "") -> list[str]:
        """Keeps those of `digests` that are stored until `unpin`; returns them."""
        with self._lock:
            found = [sha256 for sha256 in dict.fromkeys(digests) if self._use(sha256, job) is not None]
            self._pins.update(found)
            return found

    def unpin(self, digests: Iterable[str]) -> None:
        """Takes back one `pin` of each."""
        with self._lock:
            for sha256 in digests:
                self._pins[sha256] -= 1
                if self._pins[sha256] <= 0:
                    del self._pins[sha256]

    # -- inside; the lock is held -------------------------------------------------------------------------------------

    def _see(self, job: str) -> _Share:
        share = self._shares.setdefault(job, _Share(self._weights.get(job, 1.0)))
        share.seen_s = self._clock()
        return share

    def _forget_if_empty(self, job: str) -> None:
        if not self._shares[job].images:  # names of jobs come from clients, and must not pile up
            del self._shares[job]

    def _use(self, sha256: str, job: str | None) -> EncodedImage | None:
        """Returns an image, used just now; by `job` if that is known."""
        owner = self._owners.get(sha256)
        if owner is None:
            return None
        share = self._shares[owner]
        image = share.images[sha256]
        share.images.move_to_end(sha256)
        if job is not None:
            user = self._see(job)
            lighter = (user.size_bytes + len(image.data)) / user.weight < share.load
            if job != owner and (lighter or self._is_idle(share)):
                self._remove(sha256)
                self._add(job, image)
            self._forget_if_empty(job)
        return image

    def _add(self, job: str, image: EncodedImage) -> None:
        share = self._see(job)
        share.images[image.sha256] = image
        share.size_bytes += len(image.data)
        self.size_bytes += len(image.data)
        self._owners[image.sha256] = job

    def _remove(self, sha256: str) -> None:
        job = self._owners.pop(sha256)
        share = self._shares[job]
        nbytes = len(share.images.pop(sha256).data)
        share.size_bytes -= nbytes
        self.size_bytes -= nbytes
        self._forget_if_empty(job)

    def _is_idle(self, share: _Share) -> bool:
        return self._clock() - share.seen_s > IDLE_S

    def _drop_for(self, job: str, nbytes: int) -> None:
        """Drops one image for an upload of `job`. Raises Busy when none may be dropped."""
        self._drop(next(self._list_victims(job, nbytes), None))

    def _drop(self, victim: str | None) -> None:
        if victim is None:
            raise Busy(
                f"the teacher's {self.capacity_bytes} bytes for images are in use by calls in progress and by other "
                f"jobs; try again in {_RETRY_S:g} s",
                _RETRY_S,
            )
        self._remove(victim)
        self.dropped += 1

    def _list_victims(self, job: str, nbytes: int) -> Iterator[str]:
        """Yields what may be dropped for an upload of `job`, in the order of preference."""
        own = self._shares.get(job) or _Share(self._weights.get(job, 1.0))
        idle = [share for share in self._shares.values() if share is not own and self._is_idle(share)]
        for share in sorted(idle, key=lambda share: share.seen_s):
            yield from self._list_free(share)
        active = [share for share in self._shares.values() if share not in idle and share is not own]
        fair_load = self.capacity_bytes / (own.weight + sum(share.weight for share in active))
        loads = {id(share): share.load for share in active} | {id(own): (own.size_bytes + nbytes) / own.weight}
        heavy = sorted((*active, own), key=lambda share: loads[id(share)], reverse=True)
        heavy = [share for share in heavy if loads[id(share)] > fair_load]
        for share in heavy:
            yield from self._list_free(share)
        if own not in heavy:
            for share in heavy:
                yield from share.images
        if not own.images:  # larger than its job's whole share
            for share in sorted(active, key=lambda share: share.load, reverse=True):
                yield from self._list_free(share)

    def _list_free(self, share: _Share) -> Iterator[str]:
        return (sha256 for sha256 in share.images if sha256 not in self._pins)


class Pins:
    """What one call refers to, pinned; released group by group as they are prepared, or all at the call's end."""

    def __init__(self, store: ImageStore, groups: Mapping[str, Iterable[str]], *, job: str) -> None:
        """groups: the images of each group by its id."""
        self._store = store
        self._held = {group_id: store.pin(digests, job=job) for group_id, digests in groups.items()}

    def release(self, group_id: str) -> None:
        """Lets go of one group's images; again does no harm."""
        self._store.unpin(self._held.pop(group_id, ()))

    def release_all(self) -> None:
        """Lets go of all that is held."""
        for group_id in list(self._held):
            self.release(group_id)


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
