"""One of two processes that share a model, for test_shared_prompt_on_two_ranks.py.

`main` takes HOW=FOLDER..., where HOW is "tensor_parallel", "fsdp" or "fsdp_checkpointing", and compares each with the
whole model in this process, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.support import tolerance
from tests.support.families import ask
from tests.support.teacher import drawing
from vaopd.divergence import token_logprobs
from vaopd.vlm.model import Segment, Vlm


class Scores(nn.Module):
    """Model and head together, as the trainer's loss has them."""

    def __init__(self, vlm: Vlm) -> None:
        super().__init__()
        self.model = vlm.model
        self.vlm = vlm

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        ids = np.concatenate([ids for segment in segments for ids in segment.responses])
        return token_logprobs(self.vlm.compute_response_hidden(segments), self.vlm.head, torch.from_numpy(ids))


def segments_for(vlm: Vlm) -> list[Segment]:
    rng = np.random.default_rng(0)
    shown = [[drawing(0)], [drawing(1, (128, 64))]]
    lengths = [(9, 1, 17, 9, 16), (6,)]
    return [
        Segment(prompt=ask(vlm, pictures), responses=tuple(rng.integers(0, 200, n) for n in ns))
        for pictures, ns in zip(shown, lengths, strict=True)
    ]


def main(*cases: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for case in cases:
        print(case, flush=True)  # the last one printed is the one that failed
        _compare(*case.split("=", 1))
    dist.destroy_process_group()


def _compare(how: str, folder: str) -> None:
    whole = Vlm.load(folder, dtype="float64")
    segments = segments_for(whole)
    expected = Scores(whole)(segments)
    if how == "tensor_parallel":
        shared = Vlm.load(folder, dtype="float64", tensor_parallel=True)
        projection = shared.family.language_model(shared.model).layers[0].self_attn.q_proj.weight
        assert projection.to_local().shape[0] * 2 == projection.shape[0], "the layers aren't split"
        with torch.inference_mode():
            assert_same_scores(whole, Scores(shared)(segments), expected)
    else:
        _fsdp(Vlm.load(folder, dtype="float64"), whole, segments, expected, checkpointing=how == "fsdp_checkpointing")


def assert_same_scores(whole: Vlm, found: Tensor, expected: Tensor) -> None:
    """Up to what two whole forwards differ by."""
    bound = tolerance.forward(whole.config, dtype=torch.float64) * expected.detach().abs().max()
    tolerance.assert_within(found, expected, bound)


def _fsdp(student: Vlm, whole: Vlm, segments: Sequence[Segment], expected: Tensor, *, checkpointing: bool) -> None:
    """Both ranks take the same groups, so that the gradients' mean over ranks is the whole model's gradient."""
    if checkpointing:
        student.model.train()
        student.model.gradient_checkpointing_enable({"use_reentrant": False})
    module = Scores(student)
    mesh = init_device_mesh("cpu", (2,))
    for layer in student.model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    scores = module(segments)
    assert_same_scores(whole, scores, expected)
    scores.sum().backward()
    expected.sum().backward()
    theirs = {name: p.grad for name, p in whole.model.named_parameters() if p.grad is not None}
    errors = tolerance.backward(whole.config, theirs, dtype=torch.float64)
    for name, parameter in student.model.named_parameters():
        assert (parameter.grad is None) == (name not in theirs), name
        if parameter.grad is not None:
            difference = parameter.grad.full_tensor() - theirs[name]
            tolerance.assert_within(difference.norm(), 0.0, errors[name], name)
