"""A finished run against thresholds: passed, breached or could not be judged. Prints nothing; docs/gate.md explains."""

from exitsafe.gate.checking import Finding, Gate, Outcome, check_run
from exitsafe.gate.rules import MAX_UNSCORED, Rule, read_rules

__all__ = ["MAX_UNSCORED", "Finding", "Gate", "Outcome", "Rule", "check_run", "read_rules"]
