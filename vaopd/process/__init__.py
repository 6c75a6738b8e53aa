"""Starts every process in the same way, and ends one that hangs."""

from vaopd.process.entry import main, parser
from vaopd.process.flags import add_flags, service_config

__all__ = ["add_flags", "main", "parser", "service_config"]
