"""Runs -> figures. Reads summaries only: no response text ever reaches a figure."""

from exitsafe.report.chart import can_draw, draw_chart

__all__ = ["can_draw", "draw_chart"]
