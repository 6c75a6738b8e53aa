"""The old name of `vaopd.client.credentials`; goes with the next release."""

from vaopd.client.credentials import Credentials, api_key_from, from_environment

__all__ = ["Credentials", "api_key_from", "from_environment"]
