"""Reports: HTML pages that read offline, Markdown tables, CSV, and figures as SVG and PNG."""

from ibp_triton.harness.report.claims import claims_text, experiments_in
from ibp_triton.harness.report.gather import Findings
from ibp_triton.harness.report.samples import pictured
from ibp_triton.harness.report.write import write_comparison, write_leaderboard, write_report

__all__ = [
    "Findings",
    "claims_text",
    "experiments_in",
    "pictured",
    "write_comparison",
    "write_leaderboard",
    "write_report",
]
