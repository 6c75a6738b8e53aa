"""Shows a run's folder: as one HTML page (`page.py`), or in a terminal (`watch.py`)."""

from vaopd.report.page import content_security_policy, plot_accuracy, report_html, write_report
from vaopd.run.records import Evaluation, Run, read_run
