"""What can be said about a model before any weight is read: its exits, its memory needs, what exits save."""

from exitsafe.doctor.blueprint import Blueprint, load_blueprint
from exitsafe.doctor.plan import Plan, bytes_by_name, make_plan
from exitsafe.doctor.prompts import Typical, typical_prompt
from exitsafe.doctor.savings import count_savings

__all__ = [
    "Blueprint",
    "Plan",
    "Typical",
    "bytes_by_name",
    "count_savings",
    "load_blueprint",
    "make_plan",
    "typical_prompt",
]
