"""Responses in, verdicts out. A judge is any callable with a name and a list of its measures; see `Judge`."""

from exitsafe.judges.protocol import MEASURES, Judge, ModelJudge
from exitsafe.judges.registry import JUDGE_NAMES, choose_judges, is_known, load_judges
from exitsafe.specs.inputs import JudgeOptions

__all__ = ["JUDGE_NAMES", "MEASURES", "Judge", "JudgeOptions", "ModelJudge", "choose_judges", "is_known", "load_judges"]
