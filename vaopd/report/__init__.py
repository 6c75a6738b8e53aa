"""Shows a run's folder: as one HTML page (`page.py`), or in a terminal (`watch.py`)."""

from vaopd.report.page import (
    Evaluation,
    Run,
    content_security_policy,
    plot_accuracy,
    read_run,
    report_html,
    write_report,
)

__all__ = [
    "Evaluation",
    "Run",
    "content_security_policy",
    "plot_accuracy",
    "read_run",
    "report_html",
    "write_report",
]
