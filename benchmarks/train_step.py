"""Compares the student's loss with shared prompts and with one row per rollout, forward and backward.

`python benchmarks/train_step.py` prints tables. *shared* is `vaopd_trainer.student_loss.StudentLoss` as the trainer
calls it. *per sequence* is the plain implementation: the siblings in one right-padded batch, each row with its image,
and the same fused divergence over the response rows. *image shared* runs the vision tower once for the siblings. All
start from the same weights and must compute the same gradients.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import competitors
import floor
import groups
import numpy as np
import tables
import timing
import torch
from groups import HEADLINE, QUICK, Shape

from vaopd.config import TrainerConfig
from vaopd.divergence import FullTarget, fused_loss
from vaopd.payloads import to_torch
from vaopd.vlm.model import Vlm
from vaopd_trainer.student_loss import StudentLoss, WeightedGroup

SHAPES = [
    HEADLINE,
    Shape(prompt=150, response=128, rollouts=4),
    Shape(prompt=650, response=512, rollouts=4),
    Shape(prompt=650, response=512, rollouts=4, ragged=True),
    Shape(prompt=650, response=128, rollouts=8),
]
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1}
"""Allowed difference of the whole gradient, relative to its norm."""
SIDES = ("shared", "per sequence", "image shared")


def weighted_group(vlm: Vlm, shape: Shape) -> WeightedGroup:
    """Makes a scored group: random advantages, and hidden states of a teacher of the same width."""
    hidden = np.random.default_rng(7).standard_normal((sum(shape.lengths), vlm.hidden_size), dtype=np.float32)
    return groups.weigh(groups.group(vlm, shape), torch.from_numpy(hidden).to(vlm.head.dtype), seed=7)


def teacher_head(vlm: Vlm) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    head = 0.05 * torch.randn((vlm.vocab_size, vlm.hidden_size), generator=generator)
    return head.to(timing.DEVICE, vlm.head.dtype)


def make_sides(vlm: Vlm, plain: Any, group: WeightedGroup) -> dict[str, Callable[[], float]]:
    """Returns the sides; each runs forward and backward, leaves gradients in its model and returns the loss."""
    head = teacher_head(vlm)
    trainer = TrainerConfig(steps=1)
    loss_module = StudentLoss(vlm, teacher_head=head, trainer=trainer)
    scored = group.scored
    prompts = [scored.prompt] * len(scored.responses)
    if timing.ON_GPU:  # as the trainer does on that device
        plain.gradient_checkpointing_enable({"use_reentrant": False})
        plain.train()

    def shared() -> float:
        vlm.model.zero_grad(set_to_none=False)
        loss, _ = loss_module([group])
        loss.backward()
        return loss.item()

    def per_sequence(share_image: bool) -> float:
        plain.zero_grad(set_to_none=False)
        hidden = competitors.compute_response_hidden(plain, prompts, scored.responses, share_image=share_image)
        teacher = to_torch(scored.score.payload.tensors["hidden"]).to(hidden.device)
        own_head = plain.get_output_embeddings().weight
        target = FullTarget(hidden=teacher, head=head)
        loss, _ = fused_loss(hidden, own_head, target, group.token_weights, chunk_tokens=trainer.chunk_tokens)
        loss.backward()
        return loss.item()

    return {"shared": shared, "per sequence": lambda: per_sequence(False), "image shared": lambda: per_sequence(True)}


def compare(vlm: Vlm, plain: Any, shapes: Sequence[Shape], repeats: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    model = floor.Model.of(vlm.config)
    for run in make_sides(vlm, plain, weighted_group(vlm, QUICK)).values():
        run()  # gradients are allocated, kernels are there
    for shape in shapes:
        runs = make_sides(vlm, plain, weighted_group(vlm, shape))
        seconds, losses = timing.interleaved(runs, repeats=repeats)
        runs["per sequence"]()
        whole, worst = gradient_difference(vlm.model, plain)
        if whole > TOLERANCE[timing.DTYPE]:
            raise SystemExit(
                f"{shape}: gradients differ by {whole:.2g} of their norm; the sides don't do the same work"
            )
        found.append(
            {
                "shape": str(shape),
                "seconds": seconds,
                "loss": losses,
                "gradient": whole,
                "worst": worst,
                "operations": {name: operations(model, name, shape) for name in SIDES},
            }
        )
    tables.table(
        "Forward and backward of one group",
        ("shape", "shared", "per sequence", "image shared", "gradient difference",
         "worst parameter"),
        [
            [
                f["shape"],
                f"{1000 * f['seconds']['shared']:.0f} ms",
                factor(f, "per sequence") + (" (≥ 2)" if f["shape"] == str(HEADLINE) else ""),
                factor(f, "image shared"),
                f"{f['gradient']:.1e} (≤ 1e-5 in float32)",
                f"{f['worst']:.1e}",
            ]
            for f in found
        ],
        "Factors: the other side's time over the shared one's, 'of' the factor by counted operations "
        "(benchmarks/floor.py). Gradient difference: norm of the difference over the norm, of all parameters together "
        "and of the parameter where it is largest.",
    )  # fmt: skip
    return found


def operations(model: floor.Model, side: Any, shape: Shape) -> float:
    image_tokens = groups.image_tokens(shape)
    return floor.count_training_flops(
        model, side, prompt=shape.prompt, image_tokens=image_tokens, lengths=shape.lengths
    )


def factor(entry: dict[str, Any], side: str) -> str:
    seconds, counted = entry["seconds"], entry["operations"]
    return f"{seconds[side] / seconds['shared']:.2f} × of {counted[side] / counted['shared']:.2f}"


def gradient_difference(ours: Any, other: Any) -> tuple[float, float]:
    """Returns the relative difference of the whole gradient, and the largest of a parameter with a gradient."""
    theirs = dict(other.named_parameters())
    square, whole, worst = 0.0, 0.0, 0.0
    norms = {}
    for name, parameter in ours.named_parameters():
        expected = theirs[name].grad.double()
        distance = float((parameter.grad.double() - expected).norm())
        norms[name] = (distance, float(expected.norm()))
        square += norms[name][1] ** 2
        whole += distance**2
    for distance, norm in norms.values():
        # If a bias's gradient cancels exactly (a key's, inside a softmax), only rounding noise is left.
        if norm > 1e-6 * square**0.5:
            worst = max(worst, distance / norm)
    return (whole / square) ** 0.5, worst


def memory(folder: Path, shapes: Sequence[Shape]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for shape in shapes:
        peaks = {}
        for name in SIDES:
            child = [str(folder), str(shape.prompt), str(shape.response), str(shape.rollouts), name]
            peaks[name] = timing.in_subprocess(__file__, child)["bytes"]
        found.append({"shape": str(shape), "bytes": peaks})
    tables.table(
        "Peak extra memory of forward and backward, without weights and gradients",
        ("shape", *SIDES),
        [[f["shape"], *(f"{f['bytes'][name] / 2**20:.0f} MiB" for name in SIDES)] for f in found],
    )
    return found


def measure_memory(arguments: Sequence[str]) -> None:
    """Prints the bytes as JSON; run in a child process."""
    folder, prompt, response, rollouts, name = arguments
    vlm = groups.load(Path(folder))
    plain = groups.load_plain(Path(folder))
    make_sides(vlm, plain, weighted_group(vlm, QUICK))[name]()  # gradients are allocated, kernels are there
    shape = Shape(prompt=int(prompt), response=int(response), rollouts=int(rollouts))
    run = make_sides(vlm, plain, weighted_group(vlm, shape))[name]
    print(json.dumps({"bytes": timing.peak_extra_bytes(run)}))


def main() -> None:
    options = tables.parser(__doc__).parse_args()
    tables.apply(options)
    if options.child:
        measure_memory(options.child)
        return
    shapes = tables.chosen(options, SHAPES, usual=1)
    with groups.model_folder(32_000) as folder:
        numbers = {"speed": compare(groups.load(folder), groups.load_plain(folder), shapes, options.repeats)}
        longer = [replace(HEADLINE, response=512)] if options.full else []
        numbers["memory"] = memory(folder, [shapes[0], *longer])
    tables.save(options.json, "train_step", numbers)


if __name__ == "__main__":
    main()
