"""Control messages among the trainer's ranks: raw bytes over gloo, beside the gradients' collectives. Never pickles.

Rank 0, the coordinator, is the only one that talks to Redis; it hands whole prompt groups to their ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vaopd.errors import Unavailable
from vaopd.process.failures import is_lost_rank
from vaopd.types import RolloutGroup
from vaopd.wire.queue import rollout_group_from_bytes, rollout_group_to_bytes

COORDINATOR = 0
_STOP = b"stop"  # no protobuf message of a group: those begin with the tag of group_id
# A rank may wait for a whole evaluation; a dead peer ends the wait at once, since its connection closes.
_PATIENCE = timedelta(hours=12)
SILENCE_S = 60
"""A host that answers or takes nothing for so long is gone, with its ranks."""


class Stopped(Exception):
    """SIGTERM or Ctrl-C arrived. The last finished step is checkpointed before this leaves `Trainer.run`."""


def watch_connections() -> None:
    """Makes this process's connections to other hosts fail after SILENCE_S of silence; gloo's never would. On Linux.

    A kernel answers for a process that is busy; for one that is frozen, until its receive buffer is full.
    """
    for link in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):  # closed meanwhile, or not connected
            if not os.readlink(link).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(link.name))) as connection:
                if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
                    continue
                if is_on_this_host(connection):
                    continue
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 3)):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_S * 1000)


def is_on_this_host(connection: socket.socket) -> bool:
    """Whether both ends are here: the kernel closes it with either process, so a silent one is frozen, not gone."""
    return bool(connection.getpeername()[0] == connection.getsockname()[0])


class Ranks:
    """Knows this process's place among `world` ranks. One process is a world of one, without a process group."""

    def __init__(self) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.world = dist.get_world_size() if distributed else 1
        self.rank = dist.get_rank() if distributed else COORDINATOR
        # Over gloo also where gradients go over NCCL.
        self.group = dist.new_group(backend="gloo", timeout=_PATIENCE) if self.world > 1 else None
        if self.world > 1:
            watch_connections()

    @property
    def is_coordinator(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == COORDINATOR

    def send_group(self, group: RolloutGroup | None, *, to: int) -> None:
        """Sends a group from the coordinator to its rank; None stands for one that will not come."""
        self._send(b"" if group is None else rollout_group_to_bytes(group), to=to)

    def receive_group(self) -> RolloutGroup | None:
        """Waits for this rank's next group; raises Stopped once the coordinator has stopped the run."""
        data = self._receive()
        if data == _STOP:
            raise Stopped
        return rollout_group_from_bytes(data) if data else None

    def stop_others(self) -> None:
        """Makes every other rank's next `receive_group` raise Stopped."""
        for rank in range(1, self.world):
            self._send(_STOP, to=rank)

    def gather(self, value: Any) -> list[Any]:
        """Returns the JSON values of all ranks, by rank, on every rank. A collective."""
        data = json.dumps(value).encode()
        if self.world == 1:
            return [json.loads(data)]
        lengths = [torch.zeros(1, dtype=torch.long) for _ in range(self.world)]
        dist.all_gather(lengths, torch.tensor([len(data)]), group=self.group)
        padded = torch.zeros(max(int(length) for length in lengths), dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        everyone = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(everyone, padded, group=self.group)
        return [
            json.loads(part[: int(length)].numpy().tobytes()) for part, length in zip(everyone, lengths, strict=True)
        ]

    @contextmanager
    def explain_loss(self) -> Iterator[None]:
        """Raises Unavailable, with this rank's number, for an error within the block of a rank that has gone."""
        try:
            yield
        except RuntimeError as error:
            if not is_lost_rank(error):
                raise
            raise Unavailable(
                f"rank {self.rank} has lost another of the {self.world} ranks: it has ended, for a reason that its own "
                "lines or the launcher's show, or its host is unreachable; --resume continues from the last checkpoint"
            ) from error

    def barrier(self) -> None:
        """Waits until every rank has called this."""
        if self.world > 1:
            dist.barrier(group=self.group)

    def _send(self, data: bytes, *, to: int) -> None:
        dist.send(torch.tensor([len(data)]), dst=to, group=self.group)
        if data:
            dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), dst=to, group=self.group)

    def _receive(self) -> bytes:
        length = torch.zeros(1, dtype=torch.long)
        dist.recv(length, src=COORDINATOR, group=self.group)
        data = torch.empty(int(length), dtype=torch.uint8)
        if len(data):
            dist.recv(data, src=COORDINATOR, group=self.group)
        return data.numpy().tobytes()
