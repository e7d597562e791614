"""One self-contained HTML page about a run, drawn from what it left behind."""

from medssl.report.page import report

__all__ = ["report"]
