"""What a model will need before any weight is read: its exits, its memory for audit and align, what exits save."""

from exitsafe.doctor.blueprint import Blueprint, load_blueprint
from exitsafe.doctor.judge_weights import bytes_by_name, judge_bytes
from exitsafe.doctor.plan import Part, Plan, align_plan, audit_plan
from exitsafe.doctor.prompts import Typical, typical_prompt
from exitsafe.doctor.savings import Savings, count_savings

__all__ = [
    "Blueprint",
    "Part",
    "Plan",
    "Savings",
    "Typical",
    "align_plan",
    "audit_plan",
    "bytes_by_name",
    "count_savings",
    "judge_bytes",
    "load_blueprint",
    "typical_prompt",
]
