"""The numbers of a finished run: metrics, summary, comparison, agreement, limits."""
