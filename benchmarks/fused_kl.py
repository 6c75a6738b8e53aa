"""Compares the loss in one pass over the heads with full logits and log-softmax: time and peak memory.

`python benchmarks/fused_kl.py` prints one table. Both sides get the same hidden states, heads and weights, must return
the same divergences and gradients, and take turns. Time and memory include the backward pass. Peak memory is measured
in a process per side, above the memory in use with the inputs loaded; gradients count. `--full` adds the differentiable
(M,) form, which computes the logits again in its backward pass.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import tables
import timing
import torch
from torch import Tensor

from vaopd.divergence import FullTarget, fused_loss, fused_reverse_kl, reverse_kl

WIDTH = 384
SIDES = ("full logits", "one pass", "recomputed")
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
"""Allowed relative difference of norms; bfloat16 logits have 8 bits on both sides."""

Result = tuple[Tensor, Tensor, Tensor]


def make_sides(tokens: int, vocabulary: int) -> dict[str, Callable[[], Result]]:
    """Returns the sides; each returns divergences (M,) and gradients of their weighted sum."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(shape, generator=generator)
        return values.to(timing.DEVICE, getattr(torch, timing.DTYPE))

    # Logits of standard deviation 2, independent for student and teacher.
    scale = 2 / WIDTH**0.5
    hidden, head = random(tokens, WIDTH).requires_grad_(), random(vocabulary, WIDTH, scale=scale).requires_grad_()
    teacher_hidden, teacher_head = random(tokens, WIDTH), random(vocabulary, WIDTH, scale=scale)
    weights = torch.rand(tokens, generator=generator).to(timing.DEVICE) / tokens

    def gradients(loss: Tensor, kl: Tensor) -> Result:
        return kl.detach(), *torch.autograd.grad(loss, (hidden, head))  # type: ignore[return-value]

    def run_full_logits() -> Result:
        with torch.no_grad():
            teacher_logits = teacher_hidden @ teacher_head.T
        kl = reverse_kl(hidden @ head.T, teacher_logits)
        return gradients((weights * kl).sum(), kl)

    def run_one_pass() -> Result:
        return gradients(*fused_loss(hidden, head, FullTarget(hidden=teacher_hidden, head=teacher_head), weights))

    def run_recomputed() -> Result:
        kl = fused_reverse_kl(hidden, head, teacher_hidden, teacher_head)
        return gradients((weights * kl).sum(), kl)

    return dict(zip(SIDES, (run_full_logits, run_one_pass, run_recomputed), strict=True))


def find_difference(found: Result, expected: Result) -> float:
    """Returns the largest relative difference, by norm."""
    return max(
        float((one.float() - other.float()).norm() / other.float().norm())
        for one, other in zip(found, expected, strict=True)
    )


def main() -> None:
    parser = tables.parser(__doc__ or "")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    options = parser.parse_args()
    tables.apply(options)
    if options.child:
        measure_memory(options.child)
        return
    tokens, vocabulary = (256, 32_000) if options.quick else (options.tokens, options.vocabulary)
    names = SIDES if options.full else SIDES[:2]
    check_room(tokens, vocabulary)
    peaks = {name: int(timing.in_subprocess(__file__, [str(tokens), str(vocabulary), name])["bytes"]) for name in names}
    for run in make_sides(32, vocabulary).values():
        run()  # warm-up of kernels and thread pools
    runs = {name: run for name, run in make_sides(tokens, vocabulary).items() if name in names}
    seconds, results = timing.interleaved(runs, repeats=options.repeats)
    differences = {name: find_difference(results[name], results[SIDES[0]]) for name in names}
    if max(differences.values()) > TOLERANCE[timing.DTYPE]:
        raise SystemExit(f"the sides don't agree: {differences}")

    base_s, base_bytes = seconds[SIDES[0]], peaks[SIDES[0]]
    tables.table(
        f"Reverse KL, forward and backward: {tokens} tokens, vocabulary {vocabulary}, width {WIDTH}",
        ("side", "seconds", "of full logits", "peak, MB", "of full logits", "difference"),
        [
            (
                name,
                f"{seconds[name]:.2f}",
                f"{seconds[name] / base_s:.2f} ×",
                f"{peaks[name] / 1e6:.0f}",
                f"1/{base_bytes / peaks[name]:.1f}",
                f"{differences[name]:.1e}",
            )
            for name in names
        ],
        "Target, at 2048 tokens and a vocabulary of 151 936: time ≤ 1.0 ×, peak memory ≤ 1/8.",
    )
    tables.save(options.json, "fused_kl", {"seconds": seconds, "peak_bytes": peaks, "difference": differences})


def check_room(tokens: int, vocabulary: int) -> None:
    """Exits if memory is short, since the system would then kill some process.

    Full logits take eight matrices in float32 at their peak.
    """
    needed = 8 * tokens * vocabulary * 4 * 5 // 4
    available = torch.cuda.mem_get_info()[0] if timing.ON_GPU else read_available_bytes()
    if needed > available:
        raise SystemExit(
            f"full logits of {tokens} tokens take up to {needed / 1e9:.1f} GB with a margin, "
            f"{available / 1e9:.1f} GB are free; choose fewer --tokens"
        )


def read_available_bytes() -> int:
    """Returns the available memory; all physical memory on a system that doesn't report it."""
    information = Path("/proc/meminfo")
    for line in information.read_text().splitlines() if information.exists() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def measure_memory(child: Sequence[str]) -> None:
    """Prints the bytes as JSON; run in a child process."""
    tokens, vocabulary, name = child
    make_sides(8, 64)[name]()  # memory that the libraries keep
    run = make_sides(int(tokens), int(vocabulary))[name]
    print(json.dumps({"bytes": timing.peak_extra_bytes(run)}))


if __name__ == "__main__":
    main()
