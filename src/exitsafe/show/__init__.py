"""What is shown, whoever prints it: text in, tables out. Knows no metric and no run."""

from exitsafe.show.table import Column, Row, Table, markdown_text

__all__ = ["Column", "Row", "Table", "markdown_text"]
