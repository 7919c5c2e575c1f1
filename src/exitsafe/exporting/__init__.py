"""A checkpoint of one exit: cut, described, and verified against the audit."""
