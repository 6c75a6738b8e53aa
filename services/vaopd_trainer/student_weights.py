"""Holds the student's weights and AdamW's state on a rank: whole on each, or sharded (`vaopd_trainer.sharded_weights`).

    loop.Trainer ──── step: loss, optimizer, clip ────┐
    Accumulator ───── plan, exchange ─────────────────┤
    Coordinator ───── stream ─► policy snapshots ─────┼──► StudentWeights ──► WholeWeights: one process, or DDP
    checkpoint ────── save, load ─────────────────────┘                  └──► ShardedWeights: FSDP2

Loop, coordinator and checkpoint know no kinds. What is a collective says so: all ranks call it, or they wait for ever.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor

from vaopd.config import TrainerConfig
from vaopd.run.tensor_files import TensorStream, write_tensors
from vaopd.vlm.adapters import name_adapters
from vaopd_trainer.optimizer import make_optimizer
from vaopd_trainer.rank_messages import Ranks
from vaopd_trainer.student_loss import Part


class StudentWeights(ABC):
    """What both kinds share. `loss` computes a step's loss; its parameters are those that the optimizer changes."""

    can_begin_again = True
    """Whether a rank that runs out of memory may begin its step again by itself."""

    def __init__(self, loss: nn.Module, *, model: nn.Module, settings: TrainerConfig, ranks: Ranks) -> None:
        """model: the student within `loss`, whose names the files have."""
        self.loss = loss
        self.ranks = ranks
        self.parameters = [parameter for parameter in loss.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(self.parameters, settings)
        self._model = model

    # -- a step -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def plan(self, own: Sequence[frozenset[Part]]) -> list[frozenset[Part]]:
        """Returns which parts of the model each forward must run, from those that this rank's forwards would run.

        A collective. There may be more forwards than this rank has.
        """

    @abstractmethod
    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """Surrounds a forward and its backward; `last`: of the step."""

    @abstractmethod
    def exchange(self) -> None:
        """Sums over the ranks what their backwards have left to sum. A collective."""

    def clip(self, most: float) -> float:
        """Scales the gradients so that their common norm is at most `most` -> the norm before. A collective."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        total = read_whole(torch.nn.utils.get_total_norm(gradients))
        norm = float(total)
        if norm + 1e-6 > most:  # torch divides by this sum, and would go over all gradients to multiply them by 1
            torch.nn.utils.clip_grads_with_norm_(self.parameters, most, total)
        return norm

    # -- weights and state as tensors ---------------------------------------------------------------------------------

    def list_weights(self) -> dict[str, Tensor]:
        """Returns this rank's weights, whole or shards, by the names of the model's files; with LoRA the adapters."""
        weights = self._list_state()
        return name_adapters(weights) or weights

    def _list_state(self) -> dict[str, Tensor]:
        """Returns all tensors of the model; a tied one once."""
        state = self._model.state_dict()
        names, distinct = (
            {name for name, _ in self._model.named_parameters(remove_duplicate=once)} for once in (False, True)
        )
        return {name: tensor.contiguous() for name, tensor in state.items() if name not in names - distinct}

    def stream(self, dtype: torch.dtype) -> TensorStream:
        """Returns the whole weights, tensor by tensor, for a snapshot. Reading them is a collective."""
        weights = self.list_weights()
        wanted = {name: dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in weights.items()}
        shapes = {n: torch.empty(tensor.shape, dtype=wanted[n], device="meta") for n, tensor in weights.items()}
        # Rounded first: fewer bytes to gather.
        return TensorStream(shapes, lambda name: read_whole(weights[name].to(wanted[name])).contiguous())

    def list_moments(self) -> dict[str, Tensor]:
        """Returns the optimizer's state as "parameter's number.name": none before the first step."""
        entries = [self.optimizer.state.get(parameter, {}) for parameter in self.parameters]
        return {f"{number}.{name}": tensor for number, entry in enumerate(entries) for name, tensor in entry.items()}

    @abstractmethod
    def save(self, folder: Path | None) -> dict[str, str]:
        """Writes weights and moments into rank 0's `folder` -> each file's digest. A collective.

        The other ranks pass None, and write beside rank 0, whose folder they must see.
        """

    def load(self, folder: Path) -> None:
        """Reads a checkpoint in place, however many ranks and whichever kind wrote it."""
        known = list_tensors(folder)
        self._make_moments({int(name.split(".")[0]) for name in known if name.split(".")[0].isdigit()})
        read_tensors(folder, self.list_weights() | self.list_moments())

    def _make_moments(self, numbers: set[int]) -> None:
        """Makes the optimizer's state of these parameters, by a step of rate 0 on gradients of 0: it changes nothing.

        A parameter that never had a gradient has none in the checkpoint, and gets none here.
        """
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        for number in numbers & set(range(len(self.parameters))):
            self.parameters[number].grad = torch.zeros_like(self.parameters[number])
        self.optimizer.step()
        self.optimizer.zero_grad()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


class WholeWeights(StudentWeights):
    """Every rank holds everything. Several ranks exchange gradients through DistributedDataParallel."""

    def plan(self, own: Sequence[frozenset[Part]]) -> list[frozenset[Part]]:
        """Each rank has its own forwards."""
        return list(own)

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """Exchanges no gradients: ranks have different numbers of forwards."""
        own: AbstractContextManager[None] = getattr(self.loss, "no_sync", nullcontext)()
        return own

    def exchange(self) -> None:
        """Takes a forward of no groups, which is connected to the model and adds nothing, in step with all ranks."""
        if self.ranks.world > 1:
            nothing, _ = self.loss([])
            nothing.backward()

    def save(self, folder: Path | None) -> dict[str, str]:
        """Writes two files, on rank 0 alone."""
        if folder is None:
            return {}
        tensors = {"student": self.list_weights(), "optimizer": self.list_moments()}
        files = {f"{name}.safetensors": values for name, values in tensors.items()}
        return {name: write_tensors(values, folder / name) for name, values in files.items()}


def read_whole(tensor: Tensor) -> Tensor:
    """Returns a tensor whole: a collective for a sharded one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# -- torch.distributed.checkpoint on safetensors -----------------------------------------------------------------------


def list_tensors(folder: Path) -> dict[str, Any]:
    """Returns the names and shapes of all tensors in a folder's safetensors files, sharded or not."""
    found: dict[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return found


def read_tensors(folder: Path, targets: dict[str, Tensor]) -> None:
    """Reads tensors in place, of a sharded one this rank's part only; converts to each target's precision.

    Without messages among the ranks: each reads for itself. Raises ValueError for what is missing or of another shape.
    """
    try:
        # torch warns of a load that isn't one of all ranks together.
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            dcp.load(dict(targets), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except dcp.CheckpointException as error:  # no `Exception`
        raise ValueError("; ".join(str(failure) for failure, _ in error.failures.values())) from error
