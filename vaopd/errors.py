"""The errors of vaopd, one tree. A message names the value, the bound and the remedy.

    VaopdError
    ├── InvalidInput            the request itself is wrong; sending it again is pointless
    │   └── ImageRefused        the image can't be read, is of another format, or is over a cap
    ├── LimitExceeded           too large, too many, or no room now
    │   └── Busy                a quota is used up: says when to ask again
    │       └── QueueFull       no room in the teacher's queue now
    ├── Unauthenticated         no key, or one that isn't valid here
    ├── PermissionDenied        a valid key, but not for this job; whether there is such a job is not told
    ├── Mismatch                two sides disagree: tokenizer, model revision, policy version, image grid, weights
    │   └── TeacherFault        the teacher is to blame: it differs from its replicas, or breaks the protocol
    ├── NotFound                an image, run or snapshot that the other side doesn't have
    ├── LeaseLost               somebody else owns this queue entry or this job now; nothing was committed
    ├── Unavailable             the other side is starting, draining, or can't be reached; try again
    ├── NumericalError          a number that must be finite isn't
    ├── ConfigError             the configuration can't be run as it is
    ├── ChildFailed             a process that `vaopd up` started has ended, or never became ready
    └── Interrupted             a signal asked for the end

`vaopd.wire.errors` maps them to gRPC statuses and `vaopd_api.problems` to HTTP; nothing else does.
"""

import signal


class VaopdError(Exception):
    """Any error that this project raises on purpose."""


class InvalidInput(VaopdError):
    """The request is wrong in itself."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        """`field`: the path of what is wrong in the request, where it is one thing, e.g. "groups[1].group_id"."""
        super().__init__(message)
        self.field = field


class ImageRefused(InvalidInput):
    """An image that is not decoded: unreadable, of another format than PNG, JPEG or WEBP, or over a cap."""


class LimitExceeded(VaopdError):
    """Over a stated limit."""


class Busy(LimitExceeded):
    """No room now, or a quota is used up; the same request may be sent again after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unauthenticated(VaopdError):
    """No key, or one that isn't valid here: malformed, unknown, expired or revoked."""


class PermissionDenied(VaopdError):
    """A valid key that is not for this job."""


class Mismatch(VaopdError):
    """Two sides that must agree do not; the message names both."""


class NotFound(VaopdError):
    """Something that was referred to is not there."""


class LeaseLost(VaopdError):
    """The lease on an entry or a job is held by somebody else; the late commit was refused."""


class Unavailable(VaopdError):
    """The other side can't answer now."""


class NumericalError(VaopdError):
    """A missing or non-finite number where a finite one is required."""


class ConfigError(VaopdError):
    """A configuration that can't be run; the message names the key."""


class QueueFull(Busy):
    """No room now; the same request may be sent again a little later."""


class TeacherFault(Mismatch):
    """What a teacher is to blame for, not the request: it differs from its fellows, or breaks the protocol."""


class ChildFailed(VaopdError):
    """A child ended, or never became ready, and can't be restarted; the message holds the end of its log."""


class Interrupted(VaopdError):
    """SIGINT, SIGTERM or SIGHUP asked for the end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.exit_code = 128 + number
