"""`vaopd score`: prints a running teacher's scores of a response, token by token."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vaopd.cli.common import Subparsers
from vaopd.cli.output import emit, get_results, wants_colour
from vaopd.cli.parser import bounded
from vaopd.errors import ConfigError, InvalidInput
from vaopd.files.durable import atomic_file, write_atomic
from vaopd.process.extras import require

if TYPE_CHECKING:
    from vaopd.http_types import ScoreReply
    from vaopd.types import Degradation, EncodedImage, TeacherDescription

TIMEOUT_S = 60.0


def add_parsers(subparsers: Subparsers) -> None:
    """Adds `vaopd score`."""
    score = subparsers.add_parser(
        "score", help="print the visual advantage of a response's tokens, from a running teacher"
    )
    score.add_argument(
        "--image",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="an image: PNG, JPEG or WEBP (repeatable)",
    )
    score.add_argument("--question", required=True, help="the question about the images")
    what = score.add_mutually_exclusive_group(required=True)
    what.add_argument("--response", action="append", help="a response to score (repeatable, to compare several)")
    what.add_argument(
        "--generate",
        nargs="?",
        type=bounded(int, 1),
        const=4,
        metavar="K",
        help="let --student answer K times (default 4)",
    )
    score.add_argument("--student", metavar="MODEL", help="the student of --generate: a folder or hub id")
    score.add_argument("--seed", type=int, default=0, help="seed of --generate (default 0)")
    score.tie("--student", "--seed", to="--generate")
    score.add_argument(
        "--teacher", default="127.0.0.1:50051", metavar="HOST:PORT", help="the teacher (default %(default)s)"
    )
    score.add_argument(
        "--degradation",
        default="pixelate",
        metavar="KIND",
        help="how to make the degraded view; an unknown kind prints the list (default %(default)s)",
    )
    score.add_argument("--strength", type=float, default=0.1, help="strength of the degradation, 0 to 1 (default 0.1)")
    score.add_argument(
        "--columns",
        action="append",
        default=[],
        metavar="NAME",
        help="a further number per token, in table and JSON, e.g. teacher_entropy_nats (repeatable)",
    )
    score.add_argument("--table", action="store_true", help="print a line per token, as without a terminal")
    score.add_argument("--json", action="store_true", help="print JSON, as POST /v1/score returns it")
    score.add_argument("--png", type=Path, metavar="FILE", help="also draw the scores as an image")
    score.add_argument(
        "--html", type=Path, metavar="FILE", help="also write the scores as one self-contained HTML file"
    )
    score.set_defaults(command=_score, extra="model")


def _score(arguments: argparse.Namespace) -> int:
    from vaopd.scoring.views import make_terminal_lines
    from vaopd.types import DEGRADATIONS, Degradation, EncodedImage

    if arguments.degradation not in DEGRADATIONS:
        raise ConfigError(f"--degradation {arguments.degradation!r} is unknown; use one of {', '.join(DEGRADATIONS)}")
    if arguments.generate is not None:
        require("model")
        if arguments.student is None:
            raise ConfigError("--generate needs --student MODEL, the folder or hub id of the student")
    degradation = Degradation(kind=arguments.degradation, strength=arguments.strength)
    images = [EncodedImage(data=_read(path)) for path in arguments.image]
    reply, description = ask(
        arguments.teacher,
        images=images,
        question=arguments.question,
        get_responses=lambda: arguments.response or _generate(arguments, images),
        degradation=degradation,
        columns=arguments.columns,
    )
    _write_files(arguments, reply, images, degradation, description.pixel_bounds)
    if arguments.json:
        emit(reply.model_dump_json(indent=2, exclude_none=True))
    else:
        colour = wants_colour(get_results().isatty())
        emit("\n".join(make_terminal_lines(reply, colour=colour, table=arguments.table)), coloured=True)
    return 0


def ask(
    teacher: str,
    *,
    images: Sequence[EncodedImage],
    question: str,
    get_responses: Callable[[], Sequence[str | list[int]]],
    degradation: Degradation,
    columns: Sequence[str] = (),
) -> tuple[ScoreReply, TeacherDescription]:
    """Scores one group; also returns who scored it. Raises the teacher's error if it refuses.

    get_responses: called once the teacher can be used, since loading a student takes long.
    """
    import numpy as np

    from vaopd.client import ClientOptions, GroupFailure, SyncTeacherClient, from_environment
    from vaopd.client.diagnosis import examine_teacher
    from vaopd.http_types import DegradationModel
    from vaopd.scoring.reply import make_reply
    from vaopd.types import ScoreRequest, unique_images, user_turn

    credentials = from_environment()
    # With a key, the job is the key's.
    options: ClientOptions = {**credentials} if "api_key" in credentials else {**credentials, "job": "score"}
    options |= {"timeout_s": TIMEOUT_S, "payload": "none", "degradation": degradation}
    examine_teacher(teacher, job=options.get("job"))  # at once and in plain words, where the client would try again
    request = ScoreRequest(
        group_id="score",
        responses=tuple(item if isinstance(item, str) else np.array(item, np.int32) for item in get_responses()),
        images=unique_images(images),
        messages=user_turn(question, images),
    )
    with SyncTeacherClient(teacher, **options) as client:
        description = client.describe()
        (result,) = client.score([request], with_token_texts=True, columns=columns)
    if isinstance(result, GroupFailure):
        raise result.error
    view = DegradationModel(kind=degradation.kind, strength=degradation.strength)
    return make_reply(result, description, degradation=view, top_k=0), description


def _generate(arguments: argparse.Namespace, images: Sequence[EncodedImage]) -> list[list[int]]:
    from vaopd.sampling.adhoc import AdHocStudent
    from vaopd.types import SamplingSettings

    print(f"loading {arguments.student}", file=sys.stderr)
    settings = SamplingSettings(max_new_tokens=512, seed=arguments.seed)
    answer = AdHocStudent(arguments.student).answer(arguments.question, images, settings, arguments.generate)
    return [response.token_ids for response in answer.responses]


def _write_files(
    arguments: argparse.Namespace,
    reply: ScoreReply,
    images: Sequence[EncodedImage],
    degradation: Degradation,
    pixel_bounds: tuple[int, int] | None,
) -> None:
    if arguments.png is None and arguments.html is None:
        return
    from vaopd.scoring.views import draw_picture, make_views, render_html

    min_pixels, max_pixels = pixel_bounds or (None, None)
    views = [make_views(image, degradation, min_pixels=min_pixels, max_pixels=max_pixels) for image in images]
    try:
        if arguments.png is not None:
            with atomic_file(arguments.png) as file:
                draw_picture(reply, question=arguments.question, views=views).save(file, "PNG")
        if arguments.html is not None:
            write_atomic(arguments.html, render_html(reply, question=arguments.question, views=views))
    except OSError as error:
        raise ConfigError(f"{error.filename} can't be written ({error.strerror})") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"image {str(path)!r} can't be read ({error.strerror})") from None
