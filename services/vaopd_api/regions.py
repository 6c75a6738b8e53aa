"""Which region of a picture causes a token's log-prob: degrades one tile at a time and scores the response again.

In: a question, a response and its pictures. Out: for each tile of one picture, what each token loses. A tile takes its
pixels from the degraded view of the whole picture, so tiles show what the degraded view shows there.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from vaopd.errors import InvalidInput, LimitExceeded, NumericalError, VaopdError
from vaopd.http_types import RegionsBody, RegionsReply, ScoreBody, Token, one_by_one
from vaopd.scoring.views import Views, make_views
from vaopd.types import EncodedImage
from vaopd_api.reply_cost import MAX_VALUES
from vaopd_api.scorer import make_degradation, score_request, translate_error
from vaopd_api.teachers import Teachers

TILES_AT_ONCE, PIXELS_AT_ONCE = 16, 2**24
"""Pictures in one call to the teacher, and their pixels, which bound the memory: as PNG, one takes up to 3 bytes."""
Box = tuple[int, int, int, int]


def make_grid(width: int, height: int, tiles: int) -> tuple[int, int]:
    """Returns columns and rows: `tiles` along the longer side, about square ones, none thinner than a pixel.

    >>> make_grid(400, 300, 6), make_grid(3, 1000, 6)
    ((6, 4), (1, 6))
    """
    longer = max(width, height)
    columns, rows = (max(1, min(side, round(tiles * side / longer))) for side in (width, height))
    return columns, rows


def list_boxes(width: int, height: int, *, columns: int, rows: int) -> list[Box]:
    """Returns the tiles' boxes (left, top, right, bottom), row by row; together they cover the picture."""
    across = [round(width * index / columns) for index in range(columns + 1)]
    down = [round(height * index / rows) for index in range(rows + 1)]
    return [(left, top, right, bottom) for top, bottom in pairwise(down) for left, right in pairwise(across)]


def degrade_tiles(views: Views, boxes: list[Box]) -> list[EncodedImage]:
    """Returns the picture with one tile after another degraded, as PNG, which loses nothing."""
    made = []
    for box in boxes:
        changed = views.original.copy()
        changed.paste(views.degraded.crop(box), box)
        file = io.BytesIO()
        changed.save(file, "PNG", compress_level=1)
        made.append(EncodedImage(data=file.getvalue()))
    return made


async def find_regions(
    teachers: Teachers,
    body: RegionsBody,
    images: list[EncodedImage],
    *,
    pixel_bounds: tuple[int | None, int | None],
    charge: Callable[[int], None],
) -> str:
    """Scores the response with the whole picture, then without each tile -> the JSON of a `RegionsReply`.

    charge: takes the further requests from the client's quota. Raises InvalidInput without the picture, LimitExceeded
    for a reply that is too large, and the errors of scoring.
    """
    if body.picture >= len(images):
        raise InvalidInput(f"picture is {body.picture}, and there are {len(images)}; it counts from 0", field="picture")
    address, description = await teachers.find(body.teacher)
    degradation = make_degradation(body.degradation)
    fewest, most = description.pixel_bounds or pixel_bounds
    views = await asyncio.to_thread(make_views, images[body.picture], degradation, min_pixels=fewest, max_pixels=most)
    columns, rows = make_grid(*views.original.size, body.tiles)
    boxes = list_boxes(*views.original.size, columns=columns, rows=rows)
    charge(len(boxes))
    whole = ScoreBody(question=body.question, responses=[body.response], teacher=body.teacher)
    try:
        (first,) = await teachers.score_all(address, [score_request(whole, images)], degradation)
    except InvalidInput as error:
        raise translate_error(error, whole, images) from None
    if first.response_ids is None or first.token_texts is None:
        raise VaopdError("the teacher sent no token texts; is it another version of vaopd?")
    ids_T = first.response_ids[0]
    if (values := len(ids_T) * len(boxes)) > MAX_VALUES:
        raise LimitExceeded(f"the reply would have {values} values, the limit is {MAX_VALUES}; ask for fewer tiles")
    same = ScoreBody(question=body.question, responses=[ids_T.tolist()], teacher=body.teacher)
    losses: list[np.ndarray] = []
    width, height = views.original.size
    at_once = max(1, min(TILES_AT_ONCE, PIXELS_AT_ONCE // (width * height)))
    for start in range(0, len(boxes), at_once):
        changed = await asyncio.to_thread(degrade_tiles, views, boxes[start : start + at_once])
        requests = [
            score_request(same, [*images[: body.picture], image, *images[body.picture + 1 :]], suffix=f"/tile-{index}")
            for index, image in enumerate(changed, start)
        ]
        scores = await teachers.score_all(address, requests, degradation)
        losses += [first.teacher_logprobs[0] - score.teacher_logprobs[0] for score in scores]
    if not np.isfinite(losses).all():
        raise NumericalError("the teacher's log-probs are not all finite numbers")
    reply = RegionsReply.model_construct(
        model=description.model,
        columns=columns,
        rows=rows,
        tokens=[Token(id=int(token), text=text) for token, text in zip(ids_T, first.token_texts[0], strict=True)],
        teacher_logprobs=first.teacher_logprobs[0].tolist(),
        losses=one_by_one(loss_T.tolist() for loss_T in losses),
    )
    return await asyncio.to_thread(reply.dump_json)
