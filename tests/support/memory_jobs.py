"""A job on the queue in memory, with the methods of a job on Redis (`queue_jobs`)."""

from __future__ import annotations

from tests.support.memory_queue import MemoryBroker, MemoryTrainer, MemoryWorker


class MemoryJob:
    def __init__(self) -> None:
        self.broker = MemoryBroker()

    def trainer(self, *, owner: str | None = None, lease_s: float = 30.0, acquire: bool = True) -> MemoryTrainer:
        number = next(self.broker.numbers)
        trainer = MemoryTrainer(self.broker, owner=owner or f"trainer-{number}", lease_s=lease_s)
        if acquire:
            trainer.acquire()
        return trainer

    def worker(self, name: str, *, lease_s: float = 30.0) -> MemoryWorker:
        return MemoryWorker(self.broker, name, lease_s=lease_s)

    def trainer_dies(self) -> None:
        """Its lease has run out."""
        self.broker.owned_until_s = self.broker.clock()

    def comes_back_empty(self) -> None:
        self.broker.clear()

    def put_fields(self, stream: str, fields: dict[str, str | bytes]) -> None:
        """An entry that no trainer or worker would write."""
        key, body = (fields.get(name, b"") for name in ("key", "body"))
        self.broker.add(stream, *(part.encode() if isinstance(part, str) else part for part in (key, body)))

    def put_raw(self, stream: str, key: str, body: bytes) -> None:
        self.put_fields(stream, {"key": key, "body": body})
