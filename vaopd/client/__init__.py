"""The teacher's client: sends prompt groups to one replica or several, receives their scores. Torch-free."""

from vaopd.client.credentials import from_environment
from vaopd.client.sync import SyncTeacherClient
from vaopd.client.teacher import ClientOptions, TeacherClient
from vaopd.types import GroupFailure

__all__ = ["ClientOptions", "GroupFailure", "SyncTeacherClient", "TeacherClient", "from_environment"]
