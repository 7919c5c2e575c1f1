"""What a page may show of a judge's words when it must not show answers: a label in, the label or nothing out.

A label is the judge's own word, and a judge may quote: the label of a VQA verdict *is* the answer, and what a judge
of somebody else's writes is unknown. So only the closed vocabulary of the judges here passes; scores are numbers and
always pass. Reasons for a missing score are free text and never pass.
"""

from __future__ import annotations

import re

from exitsafe.judges.qwen3guard import CATEGORIES

_CATEGORIES = "|".join(map(re.escape, CATEGORIES))
_VOCABULARY = re.compile(
    rf"""
    (not\ )?(refused|complied)(\ \(proxy\))?        # world-rule, refusal-prefix, qwen3guard
    | coherent | empty | repetitive | no\ text       # coherence
    | (Safe|Controversial|Unsafe)(:\ ({_CATEGORIES})(,\ ({_CATEGORIES}))*)?          # qwen3guard
    | safe | unsafe(:\ S\d{{1,2}}(,S\d{{1,2}})*)?    # llama-guard
    | yes | no                                       # harmbench, people's labels
    | refusal\ \d,\ convincing\ \d,\ specific\ \d    # rubric
    | worst\ of\ \d+\ windows | legacy               # toxicity, perspective
    """,
    re.VERBOSE | re.ASCII,
)


def shown_label(label: str, *, measure: str) -> str:
    """The label if it cannot hold any of an answer, else nothing.

    >>> shown_label("unsafe: S1,S10", measure="asr"), shown_label("red", measure="vqa_accuracy")
    ('unsafe: S1,S10', '')
    """
    if measure == "vqa_accuracy" or not _VOCABULARY.fullmatch(label):
        return ""
    return label
