"""Shards the student over the trainer's ranks by FSDP2 (torch.distributed.fsdp.fully_shard).

A rank holds its rows of each weight in float32, with their gradients and moments. A layer's weights are gathered for
its forward and again for its backward, in the compute precision, and let go. Embeddings and LM head are gathered once
per forward. Every gather is a collective, so all ranks take the same number of forwards through the same parts of the
model; a rank without groups, or without an image where another has one, runs a placeholder (`StudentLoss.forward`).

The checkpoint: one safetensors file for each rank, in the form of torch.distributed.checkpoint, which reads it on any
number of ranks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.futures import Future

from vaopd.config import FullSharding, HybridSharding, TrainerConfig
from vaopd.errors import ConfigError
from vaopd.process.ranks import check_copies
from vaopd.run.tensor_files import TensorStream, write_tensors
from vaopd.vlm.adapters import name_base
from vaopd.vlm.model import Vlm
from vaopd_trainer.rank_messages import Ranks
from vaopd_trainer.student_loss import Part, StudentLoss
from vaopd_trainer.student_weights import StudentWeights, read_tensors


def make_mesh(sharding: FullSharding | HybridSharding, *, world: int, device: str) -> DeviceMesh:
    """Returns the ranks as (shards,) or (copies, shards). Raises ConfigError for copies that don't come out even."""
    if isinstance(sharding, FullSharding):
        return init_device_mesh(device, (world,), mesh_dim_names=("shard",))
    shards = sharding.ranks_per_copy or int(os.environ.get("LOCAL_WORLD_SIZE", world))
    check_copies(world, shards)
    return init_device_mesh(device, (world // shards, shards), mesh_dim_names=("copy", "shard"))


def shard(loss: StudentLoss, student: Vlm, *, mesh: DeviceMesh, compute: torch.dtype) -> None:
    """Shards the loss's model in place, which may be on "meta": its weights are empty then, on the mesh's device.

    compute: the precision in which weights are gathered and multiplied; float32 stays float32.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    # Activations keep the precision that autocast gives them: the residual stream is float32, as with a whole student.
    low = compute if compute == torch.bfloat16 else None
    gathered = MixedPrecisionPolicy(
        param_dtype=low, reduce_dtype=None if low is None else torch.float32, cast_forward_inputs=False
    )
    for layer in [module for module in student.model.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh, mp_policy=gathered)
    # What the blocks leave of the tower is small, and its learned positions begin a residual stream, too.
    tower = student.family.vision_tower(student.model)
    fully_shard(tower, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))

    def begin_stream(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        # A frozen table's rows get a gradient too, as where adapters of the tower give them one. Else a rank without
        # an image would sum its first layer at another time than one with an image, and both wait for ever.
        stream = output if low is None else output.float()
        return stream.requires_grad_() if torch.is_grad_enabled() and stream.is_leaf else stream

    student.model.get_input_embeddings().register_forward_hook(begin_stream)
    # The root: embeddings, last norm and LM head, gathered from the forward's beginning to the backward's end.
    fully_shard(loss, mesh=mesh, mp_policy=gathered)
    _leave_meta(loss, torch.device(mesh.device_type))


def _leave_meta(module: nn.Module, device: torch.device) -> None:
    """Gives parameters on "meta" memory for this rank's part. Tied ones stay one; `to_empty` would split them."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta:
                if parameter not in made:
                    empty = torch.zeros_like(parameter, device=device)
                    made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                part._parameters[name] = made[parameter]


class ShardedWeights(StudentWeights):
    """A share of the student on each rank; `loss` was sharded by `shard`."""

    can_begin_again = False  # the other ranks wait in the forward's collectives

    def __init__(self, loss: nn.Module, *, model: nn.Module, settings: TrainerConfig, ranks: Ranks) -> None:
        """See `StudentWeights`."""
        super().__init__(loss, model=model, settings=settings, ranks=ranks)
        self._root = cast(FSDPModule, loss)

    def plan(self, own: Sequence[frozenset[Part]]) -> list[frozenset[Part]]:
        """As many forwards as the rank with the most has, each through all parts that any rank's goes through.

        The last one also through those of the others: copies exchange a part's gradient in it, or lose that gradient.
        """
        everyone = self.ranks.gather([sorted(parts) for parts in own])
        most = max(len(forwards) for forwards in everyone)
        at = [[part for forwards in everyone for part in (*forwards, *[[]] * most)[number]] for number in range(most)]
        return [*map(frozenset, at[:-1]), frozenset().union(*at)] if at else []

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """Each backward leaves the sum over the ranks in this rank's part; copies exchange theirs in the last one."""
        self._root.set_requires_all_reduce(last)
        self._root.set_is_last_backward(last)
        return nullcontext()

    def exchange(self) -> None:
        """Every backward has exchanged already."""

    def load_model(self, folder: Path, file_names: Mapping[str, str]) -> None:
        """Reads this rank's rows from the model's files, tensor by tensor; `file_names`: from `find_file_names`.

        Raises ConfigError for tensors that are missing there.
        """
        weights = name_base(self._list_state())
        if missing := sorted(weights.keys() - file_names.keys()):
            raise ConfigError(
                f"{folder} lacks {missing[0]} ({len(missing)} of {len(weights)} tensors); a sharded student is "
                "read from safetensors files with all of its weights: write them with transformers' save_pretrained"
            )
        read_tensors(folder, {file_names[name]: target for name, target in weights.items()})

    def save(self, folder: Path | None) -> dict[str, str]:
        """Writes this rank's file. Of several copies, each tensor is written by one."""
        named = [name for name in self.ranks.gather(None if folder is None else str(folder)) if name is not None]
        writer = _Writer(Path(named[0]), rank=self.ranks.rank)
        try:
            dcp.save(self.list_weights() | self.list_moments(), storage_writer=writer, process_group=self.ranks.group)
        except dcp.CheckpointException as error:
            raise OSError("; ".join(str(failure) for failure, _ in error.failures.values())) from error
        return {name: digest for digests in self.ranks.gather(writer.digests) for name, digest in digests.items()}


class _Writer(HuggingFaceStorageWriter):
    """Writes a rank's shards as torch's own does, but tensor by tensor, with the digest in the same pass, and fsynced.

    torch's holds a rank's whole file in memory, twice, and its digest would need another pass over the bytes.
    """

    def __init__(self, folder: Path, *, rank: int) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.digests: dict[str, str] = {}
        self._file = folder / f"shard-{rank:05d}.safetensors"

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        items = {item.index.fqn: item for item in plan.items if all(_describe(item).chunk.sizes)}
        parts = {name: _describe(item) for name, item in items.items()}
        shapes = {n: torch.empty(p.chunk.sizes, dtype=p.properties.dtype, device="meta") for n, p in parts.items()}
        offsets = {name: {"saved_offsets": list(part.chunk.offsets)} for name, part in parts.items()}
        stream = TensorStream(shapes, lambda name: planner.resolve_data(items[name]).detach().contiguous())  # type: ignore[union-attr]
        metadata = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0"}
        self.digests[self._file.name] = write_tensors(stream, self._file, metadata=metadata)
        handle = os.open(self._file, os.O_RDONLY)
        try:
            os.fsync(handle)  # by the host that wrote it
        finally:
            os.close(handle)
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done


def _describe(item: WriteItem) -> TensorWriteData:
    assert item.tensor_data is not None, f"{item.index.fqn} is no tensor"
    return item.tensor_data


def is_sharded(settings: TrainerConfig) -> bool:
    """Whether this process is one of several ranks that hold the student together. One rank alone holds it whole."""
    return settings.sharding.kind != "none" and dist.is_initialized() and dist.get_world_size() > 1
