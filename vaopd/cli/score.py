"""`vaopd score`: what a running teacher says of one question about images, token by token."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vaopd.cli.common import Subparsers
    from vaopd.types import Degradation, GroupScore

TIMEOUT_S = 60.0
BAR_NATS_PER_CELL = 0.25
BAR_CELLS = 24


def add_parsers(subparsers: Subparsers) -> None:
    score = subparsers.add_parser("score", help="visual advantage of a response's tokens, from a running teacher")
    score.add_argument(
        "--image", action="append", default=[], type=Path, metavar="FILE", help="PNG, JPEG or WEBP (repeatable)"
    )
    score.add_argument("--question", required=True)
    score.add_argument("--response", action="append", required=True, help="repeat it to compare several")
    score.add_argument("--teacher", default="127.0.0.1:50051", metavar="HOST:PORT", help="(default %(default)s)")
    score.add_argument(
        "--degradation",
        default="pixelate",
        choices=("pixelate", "blur", "mean_colour", "black", "noise"),
        help="how the second view is made (default pixelate)",
    )
    score.add_argument("--strength", type=float, default=0.1, help="of the degradation (default 0.1)")
    score.add_argument("--json", action="store_true", help="print JSON, with the log-probs of both views")
    score.set_defaults(command=_score)


def _score(arguments: argparse.Namespace) -> int:
    from vaopd.types import Degradation

    score = ask(
        arguments.teacher,
        images=arguments.image,
        question=arguments.question,
        responses=arguments.response,
        degradation=Degradation(kind=arguments.degradation, strength=arguments.strength),
    )
    rollouts = as_dicts(score)
    if arguments.json:
        print(json.dumps({"prompt_tokens": score.prompt_tokens, "rollouts": rollouts}, indent=2, allow_nan=False))
    else:
        print("\n".join(table_lines(rollouts)))
    return 0


def ask(
    teacher: str, *, images: Sequence[Path], question: str, responses: Sequence[str], degradation: Degradation
) -> GroupScore:
    """One group's score. Raises what the teacher refuses, and InvalidInput for a file that can't be read."""
    from vaopd.client import ClientOptions, GroupFailure, SyncTeacherClient
    from vaopd.credentials import from_environment
    from vaopd.scoring import unique_images, user_turn
    from vaopd.types import EncodedImage, ScoreRequest

    encoded = [EncodedImage(data=_read(path)) for path in images]
    request = ScoreRequest(
        group_id="score",
        responses=tuple(responses),
        images=unique_images(encoded),
        messages=user_turn(question, encoded),
    )
    options: ClientOptions = {
        "timeout_s": TIMEOUT_S,
        "payload": "none",
        "degradation": degradation,
        **from_environment(),
    }
    with SyncTeacherClient(teacher, **options) as client:
        (result,) = client.score([request], with_token_texts=True)
    if isinstance(result, GroupFailure):
        raise result.error
    return result


def as_dicts(score: GroupScore) -> list[dict[str, Any]]:
    """Per rollout the keys of the API's reply."""
    from vaopd.scoring import rollout_weights

    assert score.response_ids is not None
    assert score.token_texts is not None
    means_K = score.mean_visual_advantage
    weights_K = rollout_weights(means_K)
    return [
        {
            "tokens": [
                {"id": int(token), "text": text}
                for token, text in zip(score.response_ids[k], score.token_texts[k], strict=True)
            ],
            "teacher_logprobs": score.teacher_logprobs[k].tolist(),
            "degraded_logprobs": score.degraded_logprobs[k].tolist(),
            "visual_advantage": score.visual_advantage[k].tolist(),
            "mean_visual_advantage": float(means_K[k]),
            "rollout_weight": float(weights_K[k]),
        }
        for k in range(len(means_K))
    ]


def table_lines(rollouts: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A token per line: its text, both log-probs, its VA in nats, and a bar for the VA."""
    for number, rollout in enumerate(rollouts, 1):
        if len(rollouts) > 1:
            yield f"response {number}"
        yield f"{'token':<18} {'teacher':>9} {'degraded':>9} {'VA':>7}"
        columns = (rollout[name] for name in ("tokens", "teacher_logprobs", "degraded_logprobs", "visual_advantage"))
        for token, teacher, degraded, va in zip(*columns, strict=True):
            bar = "█" * min(round(va / BAR_NATS_PER_CELL), BAR_CELLS)
            yield f"{token['text']!r:<18} {teacher:9.3f} {degraded:9.3f} {va:7.3f} {bar}".rstrip()
        weight = f", rollout weight {rollout['rollout_weight']:.3f}" if len(rollouts) > 1 else ""
        yield f"mean VA {rollout['mean_visual_advantage']:.4f} nats per token{weight}"


def _read(path: Path) -> bytes:
    from vaopd.errors import InvalidInput

    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"image {str(path)!r} can't be read ({error.strerror})") from None
