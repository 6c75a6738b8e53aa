"""The teacher's client: prompt groups go out, scores come in, from one replica or several. Torch-free."""

from vaopd.client.answers import GroupFailure
from vaopd.client.credentials import from_environment
from vaopd.client.teacher import ClientOptions, SyncTeacherClient, TeacherClient

__all__ = ["ClientOptions", "GroupFailure", "SyncTeacherClient", "TeacherClient", "from_environment"]
