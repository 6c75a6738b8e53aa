"""Starts processes alike, and ends those that hang."""

from vaopd.process.entry import add_monitoring_arguments, main, parser

__all__ = ["add_monitoring_arguments", "main", "parser"]
