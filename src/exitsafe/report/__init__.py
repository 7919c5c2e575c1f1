"""Runs -> charts and a page. A page contains answers only if asked to; a chart never does."""

from exitsafe.report.charts import draw_chart
from exitsafe.report.page import render_report

__all__ = ["draw_chart", "render_report"]
