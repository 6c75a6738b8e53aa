"""Logs, traces, metrics and progress of a process."""
