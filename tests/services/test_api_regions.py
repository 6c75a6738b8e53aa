"""Which region of a picture a token depends on: the API against pictures whose tiles are degraded here."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import PIL.Image
import pytest

from tests.support import tolerance
from tests.support.api import PNG, QUESTION, Api, error_of, service_file, start_api
from tests.support.models import LARGEST_LOGIT, tiny_vlm
from tests.support.teacher import TeacherInProcess, drawing, encoded
from tests.support.tolerance import assert_within
from vaopd.degradation import pixelate
from vaopd_api.regions import list_boxes, make_grid

RESPONSE = "It is 12."


def test_a_tile_s_loss_is_the_difference_that_degrading_it_makes(api: Api) -> None:
    """The lower right one of four 48 px tiles of the second picture, pasted by hand and scored as any picture."""
    pictures = [drawing(2), drawing(1)]
    texts = [base64.b64encode(encoded(picture).data).decode() for picture in pictures]
    body = {"question": QUESTION, "images": texts, "response": RESPONSE, "picture": 1, "tiles": 2}
    found = api.http.post("/v1/regions", json=body).json()
    assert (found["columns"], found["rows"], len(found["losses"])) == (2, 2, 4)
    changed = pictures[1].copy()
    changed.paste(pixelate(pictures[1], 0.1).crop((48, 48, 96, 96)), (48, 48))
    file = io.BytesIO()
    changed.save(file, "PNG")
    images = [texts[0], base64.b64encode(file.getvalue()).decode()]
    (whole,) = api.score(question=QUESTION, images=texts, response=RESPONSE).json()["rollouts"]
    (without,) = api.score(question=QUESTION, images=images, response=RESPONSE).json()["rollouts"]
    assert found["tokens"] == whole["tokens"]
    expected = [a - b for a, b in zip(whole["teacher_logprobs"], without["teacher_logprobs"], strict=True)]
    error = 4 * tolerance.forward(tiny_vlm().config) * LARGEST_LOGIT  # two log-probs, each of another batch
    assert_within(found["losses"][3], expected, error)
    assert any(abs(loss) > error for loss in expected)


@pytest.mark.parametrize(
    ("size", "tiles", "grid"), [((400, 300), 6, (6, 4)), ((3, 1000), 6, (1, 6)), ((2, 2), 12, (2, 2))]
)
def test_tiles_are_about_square_and_cover_the_picture(size: tuple[int, int], tiles: int, grid: tuple[int, int]) -> None:
    assert make_grid(*size, tiles) == grid
    covered = PIL.Image.new("L", size)
    for box in list_boxes(*size, columns=grid[0], rows=grid[1]):
        assert covered.crop(box).getextrema() == (0, 0)  # each pixel is in one tile only
        covered.paste(1, box)
    assert covered.getextrema() == (1, 1)


def test_a_picture_that_is_not_there_is_refused(api: Api) -> None:
    body = {"question": QUESTION, "image": PNG, "response": RESPONSE, "picture": 1}
    assert error_of(api.http.post("/v1/regions", json=body))["field"] == "picture"
    assert error_of(api.http.post("/v1/regions", json={**body, "tiles": 13}))["field"] == "tiles"


def test_each_tile_counts_towards_the_quota(teacher: TeacherInProcess, tmp_path: Path) -> None:
    """The whole picture and four tiles are five requests of ten; sixteen tiles never fit."""
    for api in start_api(tmp_path, teacher.target, *service_file(tmp_path, "[api.quotas]\nrequests_per_minute = 10\n")):
        body = {"question": QUESTION, "image": PNG, "response": RESPONSE, "tiles": 2}
        assert api.http.post("/v1/regions", json=body).headers["ratelimit-remaining"] == "5"
        refused = api.http.post("/v1/regions", json={**body, "tiles": 4})
        assert (refused.status_code, error_of(refused)["code"]) == (413, "too_large")
