"""The two image stores: what they keep, what has to make room, and that a view is made once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vaopd.errors import ImageRefused, LimitExceeded, NotFound
from vaopd.types import EncodedImage
from vaopd.vlm.families import PreparedImage
from vaopd_teacher.intake.image_stores import ImageStore, PreparedImages


def encoded(number: int, size: int = 10) -> EncodedImage:
    return EncodedImage(data=bytes([number]) * size)


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
