"""The run directory: what an audit writes to disk, safe against a kill at any moment."""
