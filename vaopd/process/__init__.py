"""Starts processes alike, and ends those that hang."""

from vaopd.process.entry import loading, main, make_parser
from vaopd.process.flags import add_flags, read_service_config
