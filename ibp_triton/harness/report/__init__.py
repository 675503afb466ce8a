"""Reports: one HTML page that reads offline, Markdown tables, CSV, and figures as SVG and PNG."""

from ibp_triton.harness.report.write import write_report

__all__ = ["write_report"]
