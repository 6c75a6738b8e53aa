"""Starts processes alike, and ends those that hang."""

from vaopd.process.entry import loading, main, parser
from vaopd.process.flags import add_flags, service_config

__all__ = ["add_flags", "loading", "main", "parser", "service_config"]
