"""How every process begins, and ends when it hangs."""

from vaopd.process.entry import add_monitoring_arguments, main, parser

__all__ = ["add_monitoring_arguments", "main", "parser"]
