"""The first report: one page on what a model does with a prompt, each line with the call that makes it."""

from hooklens.analysis.first_report.gather import report
from hooklens.analysis.first_report.page import Finding, Report

__all__ = ["Finding", "Report", "report"]
