"""The old name of `vaopd.client.credentials`; goes with the next release."""

from vaopd.client.credentials import Credentials, from_environment
from vaopd.client.credentials import parse_api_key as api_key_from

__all__ = ["Credentials", "api_key_from", "from_environment"]
