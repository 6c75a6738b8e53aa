"""Measures each payload's size on the wire, and the error of the KL computed from it.

`python benchmarks/codecs.py` prints one table. A real server answers one prompt group per payload; the size is that of
the answer's serialised messages per response token: log-probs of both views, VA, the payload and all framing. The exact
KL comes from float64 logits of the float32 teacher over the full vocabulary. Three teachers: the tiny one with its
student, and two wider ones of random weights, with the teacher plus noise on its hidden states as the student.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import groups
import grpc
import numpy as np
import serving
import tables
import torch
from torch import Tensor

from vaopd import divergence, images
from vaopd.client.answers import GroupAssembly
from vaopd.divergence import FullTarget, SampledTarget, Target, TopKTarget
from vaopd.payloads import PAYLOADS, decode, hidden_states
from vaopd.pb import teacher_pb2_grpc
from vaopd.types import GroupScore, PayloadKind, ScoreRequest
from vaopd.vlm.model import Segment, Vlm
from vaopd.vlm.prompts import PreparedPrompt
from vaopd.wire.common import image_to_pb
from vaopd.wire.teacher import score_request_to_pb
from vaopd_teacher.server import TeacherServer

ROLLOUTS, RESPONSE, TOP_K = 4, 128, 64
LOGPROB_BYTES = 12
"""Log-probs of both views and VA in float32, which every answer has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A teacher, a request, and the student's side: hidden (M, D_S), head (V, D_S), log-probs (M, V) float64."""

    name: str
    folder: Path
    request: ScoreRequest
    student_hidden: Tensor
    student_head: Tensor
    exact_kl: Tensor
    sampled: tuple[Tensor, Tensor]
    """A token drawn from the student at each position, and the teacher's log-prob of it, (M,) each."""


def compute_hidden(vlm: Vlm, request: ScoreRequest) -> Tensor:
    """Computes the original view's hidden states (M, D)."""
    prepared = tuple(vlm.prepare_image(images.decode(image)) for image in request.images)
    assert request.prompt_token_ids is not None
    prompt = PreparedPrompt(token_ids=request.prompt_token_ids.astype(np.int64), images=prepared)
    responses = tuple(np.asarray(ids, dtype=np.int64) for ids in request.responses)
    with torch.no_grad():
        return vlm.compute_response_hidden([Segment(prompt=prompt, responses=responses)])


def make_pair(name: str, folder: Path, student_folder: Path | None) -> Pair:
    teacher = Vlm.load(folder, dtype="float32")
    request = serving.group(teacher, "g", seed=0, side_px=96, rollouts=ROLLOUTS, response_tokens=RESPONSE)
    hidden, head = compute_hidden(teacher, request), teacher.head.detach()
    generator = torch.Generator().manual_seed(0)
    if student_folder is None:
        noise = torch.randn(hidden.shape, generator=generator)
        student_hidden, student_head = hidden + 0.5 * hidden.std() * noise, head
    else:
        student = Vlm.load(student_folder, dtype="float32")
        student_hidden, student_head = compute_hidden(student, request), student.head.detach()
    kl, tokens, teacher_logprobs = [], [], []
    for theirs, ours in zip(hidden.double().split(64), student_hidden.double().split(64), strict=True):
        log_q = torch.log_softmax(theirs @ head.double().T, -1)
        log_p = torch.log_softmax(ours @ student_head.double().T, -1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
        tokens.append(torch.multinomial(log_p.exp(), 1, generator=generator))
        teacher_logprobs.append(log_q.gather(-1, tokens[-1]))
    return Pair(
        name=f"{name}, D {hidden.shape[1]}, V {len(head)}",
        folder=folder,
        request=request,
        student_hidden=student_hidden,
        student_head=student_head,
        exact_kl=torch.cat(kl),
        sampled=(torch.cat(tokens)[:, 0], torch.cat(teacher_logprobs)[:, 0].float()),
    )


async def ask(server: str, request: ScoreRequest, payload: PayloadKind) -> tuple[GroupScore, int]:
    """Scores one group; returns the answer and the bytes of its messages."""
    message = score_request_to_pb([request], job="", payload=payload, top_k=TOP_K)
    async with grpc.aio.insecure_channel(server) as channel:
        stub: Any = teacher_pb2_grpc.TeacherStub(channel)
        await stub.PutImages(image_to_pb(image) for image in request.images)
        assembly, size = None, 0
        async for answer in stub.ScoreGroups(message):
            size += answer.ByteSize()
            match answer.WhichOneof("item"):
                case "score":
                    assembly = GroupAssembly(answer.score, request, payload)
                case "payload" if assembly is not None:
                    assembly.add(answer.payload)
                case _:
                    raise SystemExit(f"the teacher refused: {answer.error.message}")
    assert assembly is not None
    assert assembly.complete
    score = assembly.make_result()
    assert isinstance(score, GroupScore), score
    return score, size


async def measure(work: Pair, dtype: str, kinds: Sequence[PayloadKind]) -> list[dict[str, Any]]:
    """Measures the payloads of a server that computes, and sends hidden states, in `dtype`."""
    vlm = Vlm.load(work.folder, dtype=dtype)
    server = TeacherServer(vlm, model=str(work.folder), batch_tokens=8192)
    target = await server.start("127.0.0.1:0")
    try:
        answers = {kind: await ask(target, work.request, kind) for kind in kinds}
    finally:
        await server.stop(5.0)
    head, width, tokens = vlm.head.detach().float(), vlm.hidden_size, len(work.exact_kl)
    found = []
    for kind, (score, size) in answers.items():
        of_view = width * vlm.head.element_size()
        expected = {"hidden": of_view, "hidden_int8": width + 4, "hidden_pair": 2 * of_view, "top_k": 8 * TOP_K + 4}
        for label, against in make_targets(work, kind, score, head):
            with torch.no_grad():
                kl = divergence.fused_divergence(work.student_hidden, work.student_head, against).double()
            error = kl - work.exact_kl
            found.append(
                {
                    "teacher": work.name,
                    "payload": f"{label}, {dtype}" if kind == "hidden" else label,
                    "bytes": size / tokens,
                    "expected": expected.get(kind, 0) + LOGPROB_BYTES,
                    "exact": work.exact_kl.mean().item(),
                    "bias": error.mean().item(),
                    "mean_error": error.abs().mean().item(),
                    "largest_error": error.abs().max().item(),
                }
            )
    return found


def make_targets(work: Pair, kind: PayloadKind, score: GroupScore, head: Tensor) -> Iterator[tuple[str, Target]]:
    """Yields the trainer's targets from the answer; for sampled log-probs, one for each estimator."""
    if kind == "top_k":
        yield f"top_k({TOP_K}) + tail", TopKTarget(**decode(score.payload))
    elif kind == "sampled":
        ids, logprobs = work.sampled
        for estimator in ("k1", "k3"):
            target = SampledTarget(token_ids=ids, logprobs=logprobs, estimator=estimator)  # type: ignore[arg-type]
            yield f"sampled, {estimator}", target
    else:
        yield kind, FullTarget(hidden=hidden_states(score.payload, torch.float32), head=head)


@contextmanager
def make_random_teacher(width: int) -> Iterator[Path]:
    """Makes a random model of this hidden size; a single layer is enough, since only its payload matters."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    with tempfile.TemporaryDirectory(prefix="vaopd-benchmark-") as name:
        folder = groups.save_model(Path(name), vocabulary=32_000, layers=1)
        settings = json.loads((folder / "config.json").read_text())
        settings["text_config"] |= {"hidden_size": width, "intermediate_size": 256}
        settings["vision_config"] |= {"out_hidden_size": width, "depth": 2, "deepstack_visual_indexes": [0]}
        torch.manual_seed(0)
        Qwen3VLForConditionalGeneration(Qwen3VLConfig(**settings)).save_pretrained(folder)
        yield folder


def main() -> None:
    parser = tables.parser(__doc__ or "")
    options = parser.parse_args()
    tables.apply(options)
    offered = [kind for kind in PAYLOADS if kind != "none"]
    found: list[dict[str, Any]] = []

    def add(name: str, folder: Path, student_folder: Path | None) -> None:
        work = make_pair(name, folder, student_folder)
        found.extend(asyncio.run(measure(work, "float32", offered)))
        found.extend(asyncio.run(measure(work, "bfloat16", ["hidden"])))

    groups.quiet()
    add("tiny-teacher", serving.TINY_TEACHER, serving.ROOT / "models" / "tiny-student")
    for width in () if options.quick else (384, 2048):
        with make_random_teacher(width) as folder:
            add("random", folder, None)

    tables.table(
        f"Payloads of one group, {ROLLOUTS} rollouts of {RESPONSE} tokens",
        ("teacher", "payload", "bytes per token", "of them numbers", "around them", "exact KL, nats", "bias",
         "mean error", "largest"),
        [
            (row["teacher"], row["payload"], f"{row['bytes']:.1f}", f"{row['expected']}",
             f"{100 * (row['bytes'] / row['expected'] - 1):.2f} %", f"{row['exact']:.4f}", f"{row['bias']:+.1e}",
             f"{row['mean_error']:.1e}", f"{row['largest_error']:.1e}")
            for row in found
        ],
        "Numbers: the payload's tensors and 12 bytes for both log-probs and VA. Errors in nats, against float64 logits "
        "of the float32 teacher; bfloat16 is a teacher that also computes in it. The sampled estimators see one token "
        "that the student drew per position: no bias but for chance in k1 and k3, and a large spread.",
    )  # fmt: skip
    widest = [row for row in found if row["payload"] == "hidden, bfloat16"][-1]
    reached = "reached" if widest["bytes"] < 1.01 * widest["expected"] else "not reached"
    print(f"\nTarget: hidden at 2·D + 12 bytes plus under 1 %: {reached} at {widest['teacher']}.")
    tables.save(options.json, "codecs", {"rows": found})


if __name__ == "__main__":
    main()
