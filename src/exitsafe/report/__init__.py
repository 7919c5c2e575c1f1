"""Runs -> charts and a page. Texts enter a page only where they are asked for; a chart never holds any."""

from exitsafe.report.chart import can_draw, draw_chart
from exitsafe.report.page import render_report

__all__ = ["can_draw", "draw_chart", "render_report"]
