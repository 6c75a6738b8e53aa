"""The two image stores: what they keep, what has to make room, and that a view is made once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vaopd.errors import Busy, ImageRefused, LimitExceeded, NotFound
from vaopd.types import EncodedImage
from vaopd.vlm.families import PreparedImage
from vaopd_teacher.intake import image_stores
from vaopd_teacher.intake.image_stores import ImageStore, Pins, PreparedImages


def encoded(number: int, size: int = 10) -> EncodedImage:
    return EncodedImage(data=bytes([number]) * size)


def missing(store: ImageStore, job: str, *numbers: int) -> list[int]:
    digests = {encoded(n).sha256: n for n in numbers}
    return [digests[sha256] for sha256 in store.find_missing(digests, job=job)]


def view(floats: int = 25) -> PreparedImage:
    """Four bytes a float."""
    return PreparedImage(pixel_values=torch.zeros(floats), grid=(1, 1, 1), num_tokens=1)


def test_the_least_recently_used_image_makes_room() -> None:
    store = ImageStore(20)
    first, second, third = (encoded(n) for n in range(3))
    store.put(first)
    store.put(second)
    store.get(first.sha256)
    store.put(third)
    assert store.find_missing([first.sha256, second.sha256, third.sha256]) == [second.sha256]
    with pytest.raises(NotFound, match="upload it with PutImages"):
        store.get(second.sha256)
    assert (store.hits, store.misses, store.dropped) == (1, 1, 1)


def test_asking_which_images_are_missing_counts_as_use() -> None:
    store = ImageStore(20)
    first, second = encoded(1), encoded(2)
    store.put(first)
    store.put(second)
    store.find_missing([first.sha256])
    store.put(encoded(3))
    assert store.find_missing([first.sha256, second.sha256]) == [second.sha256]


def test_an_image_above_the_whole_room_is_refused() -> None:
    with pytest.raises(LimitExceeded, match="21 bytes, the teacher keeps 20"):
        ImageStore(20).put(encoded(1, size=21))


def test_images_are_counted_however_small_and_the_job_with_most_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_stores, "MAX_STORED", 4)
    store = ImageStore(10_000)
    store.put(encoded(0), job="light")
    for number in range(1, 9):
        store.put(encoded(number), job="heavy")
    assert missing(store, "heavy", *range(9)) == [1, 2, 3, 4, 5]
    store.pin([encoded(n).sha256 for n in (6, 7, 8)], job="heavy")
    with pytest.raises(Busy, match="in use by calls in progress"):
        store.put(encoded(9), job="light")


def test_a_job_within_its_share_loses_nothing_to_one_that_floods() -> None:
    store = ImageStore(100)
    for n in range(4):
        store.put(encoded(n), job="light")
    for n in range(100, 150):
        store.put(encoded(n), job="heavy")
    assert missing(store, "light", *range(4)) == []
    assert (store.size_bytes, store.dropped) == (100, 44)
    # Half of the room is its own, though the other has taken more than that.
    for n in range(4, 6):
        store.put(encoded(n), job="light")
    assert missing(store, "light", *range(6)) == [0]  # six are above its share


def test_shares_follow_the_weights() -> None:
    store = ImageStore(40, weights={"heavy": 3.0})
    for n in range(4):
        store.put(encoded(n), job="light")
    for n in range(10, 14):
        store.put(encoded(n), job="heavy")
    assert missing(store, "light", *range(4)) == [0, 1, 2]
    assert missing(store, "heavy", *range(10, 14)) == [10]


def test_a_pinned_image_stays_until_it_is_let_go() -> None:
    store = ImageStore(30)
    first = encoded(1)
    store.put(first)
    pins = Pins(store, {"g": [first.sha256], "h": [first.sha256, "0" * 64]}, job="")
    for n in range(2, 6):
        store.put(encoded(n))
    assert store.find_missing([first.sha256]) == []
    pins.release("g")
    others = Pins(store, {"i": [encoded(n).sha256 for n in (4, 5)]}, job="")
    with pytest.raises(Busy, match="in use by calls in progress"):
        store.put(encoded(6))
    pins.release_all()
    store.put(encoded(6))
    assert store.find_missing([first.sha256, encoded(4).sha256, encoded(5).sha256]) == [first.sha256]
    others.release_all()


def test_pins_beyond_a_jobs_share_keep_no_other_job_out() -> None:
    store = ImageStore(40)
    for n in range(4):
        store.put(encoded(n), job="greedy")
    Pins(store, {"g": [encoded(n).sha256 for n in range(4)]}, job="greedy")
    for n in (11, 12):
        store.put(encoded(n), job="other")
    Pins(store, {"g": [encoded(n).sha256 for n in (11, 12)]}, job="other")
    with pytest.raises(Busy):
        store.put(encoded(13), job="other")
    assert missing(store, "greedy", *range(4)) == [0, 1]


def test_a_shared_image_is_charged_to_the_job_with_less() -> None:
    store = ImageStore(40)
    for n in range(3):
        store.put(encoded(n), job="heavy")
    store.put(encoded(0), job="light")
    for n in range(10, 20):
        store.put(encoded(n), job="heavy")
    assert missing(store, "light", 0) == []


def test_a_silent_jobs_images_make_room_first() -> None:
    now = [0.0]
    store = ImageStore(40, clock=lambda: now[0])
    store.put(encoded(1), job="ended")
    now[0] = 601.0
    for n in range(10, 14):
        store.put(encoded(n), job="busy")
    assert missing(store, "busy", 1, *range(10, 14)) == [1]
    store.put(encoded(20, size=35), job="large")  # more than its share, and nothing else of its own
    assert store.size_bytes == 35


def test_a_view_is_made_once() -> None:
    views, made = PreparedImages(1000), []

    def make() -> PreparedImage:
        made.append(1)
        return view()

    assert views.get("a:original", make) is views.get("a:original", make)
    assert len(made) == 1
    assert (views.hits, views.misses, views.size_bytes) == (1, 1, 100)


def test_a_view_that_was_used_makes_room_and_is_made_again() -> None:
    """Before one that still waits for its use, although that one is older."""
    views = PreparedImages(200)
    views.get("1", view)
    second = views.get("2", view)
    views.get("1", view)
    views.get("3", view)
    assert (views.dropped, views.size_bytes) == (1, 200)
    assert views.get("2", view) is second
    assert views.misses == 3
    views.get("1", view)
    assert views.misses == 4


def test_a_view_above_the_whole_room_is_made_and_not_kept() -> None:
    views = PreparedImages(99)
    views.get("large", view)
    views.get("large", view)
    assert (views.misses, views.dropped, views.size_bytes) == (2, 0, 0)


def test_two_threads_that_want_the_same_view_make_it_once() -> None:
    views, begun, go, made = PreparedImages(1000), threading.Event(), threading.Event(), []

    def make() -> PreparedImage:
        made.append(1)
        begun.set()
        assert go.wait(60)
        return view()

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(views.get, "a", make)
        assert begun.wait(60)
        second = pool.submit(views.get, "a", make)
        go.set()
        assert first.result() is second.result()
    assert len(made) == 1


def test_a_view_that_can_not_be_made_is_tried_again() -> None:
    views = PreparedImages(1000)

    def fail() -> PreparedImage:
        raise ImageRefused("it is damaged")

    with pytest.raises(ImageRefused):
        views.get("a", fail)
    assert views.get("a", view).num_tokens == 1
