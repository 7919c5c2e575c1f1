"""A checkpoint of one exit: cut, described, and verified against the audit."""

from exitsafe.slim.exporting import export
from exitsafe.slim.verification import Verification, verify

__all__ = ["Verification", "export", "verify"]
