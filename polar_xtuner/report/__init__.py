"""What people look at: an evaluation, a check of data, a run's curves, each as one HTML page.

Needs matplotlib and jinja2, which the extra `eval` brings.
"""

from polar_xtuner.report.data import write_data_report
from polar_xtuner.report.evaluation import write_evaluation_report
from polar_xtuner.report.runs import write_run_report

__all__ = ["write_data_report", "write_evaluation_report", "write_run_report"]
