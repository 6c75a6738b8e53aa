"""A sharded student of each family is read tensor by tensor: its rank never holds more than its share and one tensor.

The process is rank 1 of four on torch's fake backend, which answers collectives without other processes.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.families import FAMILIES, family_folder
from tests.support.sharded_training import make_config
from tests.support.weighted import teacher_head
from vaopd.vlm.adapters import name_adapters, name_base
from vaopd.vlm.model import Vlm
from vaopd_trainer.compose import hold_weights, load_student
from vaopd_trainer.student_loss import StudentLoss
from vaopd_trainer.student_weights import StudentWeights

RANK, WORLD = 1, 4


@contextmanager
def one_of_four() -> Iterator[None]:
    dist.init_process_group("fake", rank=RANK, world_size=WORLD, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class Held(TorchDispatchMode):
    """The most bytes that were alive at once, of all tensors that any operation took or made."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._alive: Counter[tuple[int, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            tensor = leaf._local_tensor if isinstance(leaf, DTensor) else leaf
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                place = tensor.data_ptr(), tensor.nbytes
                self._alive[place] += 1
                weakref.finalize(tensor, self._gone, place)
        self.most = max(self.most, sum(dict(sorted(self._alive)).values()))  # of views from one address, the largest
        return result

    def _gone(self, place: tuple[int, int]) -> None:
        self._alive[place] -= 1
        if not self._alive[place]:
            del self._alive[place]


def hold(family: str, *, lora: bool = False, dtype: str = "float32") -> tuple[Vlm, StudentWeights]:
    config = make_config("full", dtype=dtype, lora=lora)
    of_family = config.student.model_copy(update={"model": str(family_folder(family))})
    config = config.model_copy(update={"student": of_family})
    student = load_student(config)
    loss = StudentLoss(student, teacher_head=teacher_head(student), trainer=config.trainer)
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"))
    ranks: Any = SimpleNamespace(rank=RANK, world=WORLD, group=None)
    return student, hold_weights(config, loss, student, accelerator, ranks)


@pytest.mark.parametrize(("family", "lora"), [*((family, False) for family in FAMILIES), ("qwen2_5_vl", True)])
def test_a_rank_reads_its_rows_and_never_holds_the_whole(family: str, lora: bool) -> None:
    expected = Vlm.load(family_folder(family)).model.state_dict()
    with one_of_four(), Held() as held:
        student, weights = hold(family, lora=lora)
    own = name_base(weights._list_state())
    for name, tensor in own.items():
        assert isinstance(tensor, DTensor)
        rows = expected[name].chunk(WORLD)
        mine = rows[RANK] if len(rows) > RANK else expected[name][:0]
        assert torch.equal(tensor.to_local(), mine), name
    whole = sum(expected[name].nbytes for name in own)
    share = sum(tensor.to_local().nbytes for tensor in own.values())
    largest = max(expected[name].nbytes for name in own)
    # One tensor of the file, and the rows that are read from it; adapters are made whole.
    one = largest + largest // WORLD
    others = (
        teacher_head(student).nbytes + 1024 + sum(t.numel() * 4 for t in name_adapters(weights._list_state()).values())
    )
    assert share <= held.most <= share + one + others < whole


class Exchanged(TorchDispatchMode):
    """The precision of what ranks gather and sum, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, set[torch.dtype]] = {"_allgather_base_": set(), "_reduce_scatter_base_": set()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := str(func.overloadpacket).partition(".")[2]) in self.found:
            self.found[name].add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_weights_of_a_bfloat16_student_are_gathered_rounded_and_its_gradients_summed_in_float32() -> None:
    """But for the rest of the vision tower, which is small."""
    with one_of_four(), Exchanged() as exchanged:
        _, weights = hold("qwen3_vl", dtype="bfloat16")
        with torch.autocast("cpu", torch.bfloat16):
            nothing, _ = weights.loss([], parts=frozenset({"text", "vision"}))
        nothing.backward()
    both = {torch.bfloat16, torch.float32}
    assert exchanged.found == {"_allgather_base_": both, "_reduce_scatter_base_": {torch.float32}}
