"""A finished run against thresholds: passed, breached or could not be judged. Prints nothing; docs/gate.md explains."""

from exitsafe.gate.evidence import Place
from exitsafe.gate.gate import Finding, Gate, Outcome, gate
from exitsafe.gate.rules import MAX_UNSCORED, Rule, read_rules

__all__ = ["MAX_UNSCORED", "Finding", "Gate", "Outcome", "Place", "Rule", "gate", "read_rules"]
