"""Control messages among the trainer's ranks: raw bytes over gloo, beside the gradients' collectives. Never pickles.

Rank 0, the coordinator, is the only one that talks to Redis; it hands whole prompt groups to their ranks.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

COORDINATOR = 0
# A rank may wait for a whole evaluation; a dead peer ends the wait at once, since its connection closes.
_PATIENCE = timedelta(hours=12)


class Ranks:
    """This process's place among `world` ranks. One process is a world of one and needs no process group."""

    def __init__(self) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.world = dist.get_world_size() if distributed else 1
        self.rank = dist.get_rank() if distributed else COORDINATOR
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE) if self.world > 1 else None

    @property
    def is_coordinator(self) -> bool:
        return self.rank == COORDINATOR

    def send(self, data: bytes, *, to: int) -> None:
        """Coordinator to `to`; may be empty."""
        dist.send(torch.tensor([len(data)]), dst=to, group=self._group)
        if data:
            dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), dst=to, group=self._group)

    def receive(self) -> bytes:
        """The coordinator's next message to this rank."""
        length = torch.zeros(1, dtype=torch.long)
        dist.recv(length, src=COORDINATOR, group=self._group)
        data = torch.empty(int(length), dtype=torch.uint8)
        if len(data):
            dist.recv(data, src=COORDINATOR, group=self._group)
        return data.numpy().tobytes()

    def gather(self, data: bytes) -> list[bytes]:
        """Everybody's bytes, by rank, on every rank."""
        if self.world == 1:
            return [data]
        lengths = [torch.zeros(1, dtype=torch.long) for _ in range(self.world)]
        dist.all_gather(lengths, torch.tensor([len(data)]), group=self._group)
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(max(longest, 1), dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else padded[:0]
        everyone = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(everyone, padded, group=self._group)
        return [part[: int(length)].numpy().tobytes() for part, length in zip(everyone, lengths, strict=True)]

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(group=self._group)
