"""Renews leases during the work."""

from __future__ import annotations

import threading
from collections.abc import Callable

from vaopd.errors import Unavailable, VaopdError


class LeaseKeeper:
    """Calls `renew` at once and then every `every_s` in a thread of its own while the `with` block runs.

    >>> with trainer_queue.keeper() as keeper:      # doctest: +SKIP
    ...     keeper.check()                          # between steps: raises LeaseLost or Mismatch if renewing did

    It proves that the process lives, not that its work makes progress: a process with stuck work must be ended by
    its watchdog, and its leases end with it.
    """

    def __init__(self, *, renew: Callable[[], object], every_s: float) -> None:
        """renew: may raise a VaopdError; Unavailable is tolerated, any other ends the renewing."""
        self._renew = renew
        self._every_s = every_s
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="vaopd-lease-keeper", daemon=True)

    def __enter__(self) -> LeaseKeeper:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def check(self) -> None:
        """Raises the error that ended the renewing, if there was one."""
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._renew()
            except Unavailable:
                # Redis is away or full. The lease may still be ours when it is back; if not, renewing will say so then.
                pass
            except VaopdError as error:
                self._failure = error
                return
            self._stop.wait(self._every_s)
