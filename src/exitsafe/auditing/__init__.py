"""The audit: every sample at every exit layer, answered and judged."""
