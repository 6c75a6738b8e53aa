"""A process's logs, traces, metrics and progress."""
