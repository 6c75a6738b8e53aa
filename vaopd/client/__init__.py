"""The teacher's client: sends prompt groups to one replica or several, receives their scores. Torch-free."""

from vaopd.client.credentials import from_environment
from vaopd.client.teacher import ClientOptions, SyncTeacherClient, TeacherClient
from vaopd.types import GroupFailure

__all__ = ["ClientOptions", "GroupFailure", "SyncTeacherClient", "TeacherClient", "from_environment"]
