"""``report.html``: a run, or several side by side, in one file that needs nothing else."""

from lit_edit.report.compared import write_comparison
from lit_edit.report.page import write_report
from lit_edit.report.reading import ReportError, RunRecord, read_run

__all__ = ["ReportError", "RunRecord", "read_run", "write_comparison", "write_report"]
