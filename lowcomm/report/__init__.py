"""One HTML file that compares runs."""

from lowcomm.report.page import write_report
from lowcomm.report.runs import load_runs

__all__ = ["load_runs", "write_report"]
