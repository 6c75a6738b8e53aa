"""Runs the divergence's kernels in Triton's interpreter, for test_divergence_kernels.py: one process for all cases.

TRITON_INTERPRET=1 python -m tests.support.kernel_runs FOLDER: reads inputs.safetensors, writes outputs.safetensors. The
variable is read when Triton is imported, so that this can't be done in the tests' own process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vaopd.divergence import FullTarget, fused, fused_loss_and_logprobs, head, targets
from vaopd.divergence.kernels import compare_logits


def main(folder: Path) -> None:
    """Computes rows of logits by the kernels alone, then the fused loss with padded products, as on a GPU."""
    given = load_file(folder / "inputs.safetensors")
    found: dict[str, torch.Tensor] = {}
    for name in sorted(key.removesuffix(".student") for key in given if key.endswith(".student")):
        student, teacher = given[f"{name}.student"], given[f"{name}.teacher"]
        vocabulary = int(given[f"{name}.vocabulary"])
        for dtype in (torch.float32, torch.bfloat16):
            slope = torch.full(student.shape, 7.0, dtype=dtype)
            logits = (student[:, :vocabulary], teacher[:, :vocabulary])
            values, log_sum = compare_logits(*logits, slope=slope)
            found |= {f"{name}.values": values, f"{name}.log_sum": log_sum, f"{name}.slope.{dtype}": slope}
        found[f"{name}.values_alone"] = compare_logits(*logits)[0]

    for module in (fused, head, targets):
        module.is_padded = lambda device: True  # type: ignore[attr-defined]
    hidden, student_head = given["hidden"].requires_grad_(), given["head"].requires_grad_()
    vocabulary = int(given["vocabulary"])
    target = FullTarget(hidden=given["teacher_hidden"], head=given["teacher_head"], vocab_size=vocabulary)
    loss, values, logprobs = fused_loss_and_logprobs(
        hidden, student_head, target, given["weights"], given["ids"], vocab_size=vocabulary, chunk_tokens=7
    )
    loss.backward()
    assert hidden.grad is not None
    assert student_head.grad is not None
    found |= {"loss": loss.detach(), "values": values, "logprobs": logprobs}
    save_file(found | {"by_hidden": hidden.grad, "by_head": student_head.grad}, folder / "outputs.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
