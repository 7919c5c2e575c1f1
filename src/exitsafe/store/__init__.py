"""The run directory: what an audit leaves on disk, kill-proof while it grows. Knows no model and no judge's inside."""
