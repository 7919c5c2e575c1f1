"""When an audit may stop asking harmful samples at a layer: samples and verdicts so far in, decisions out.

Harmful samples are asked in a random order, block by block. After each block a sequential test evaluates each layer's
attack successes so far; a layer whose rate is decided to be below or above the limit gets no further samples. Blocks
do not depend on batch size and number of processes, so the result does not either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np

from exitsafe.errors import RunError
from exitsafe.records import Sample, Verdict
from exitsafe.specs.verbs import StopRule
from exitsafe.stats.sequential import Decision, decide
from exitsafe.store.fingerprint import Settings
from exitsafe.store.scores import OWN, Scores, ScoreTable
from exitsafe.untrusted import UnreadableError

BLOCK = 16  # harmful samples between two tests


class Stopping(TypedDict):
    """The rule of a run that stopped early, the judge whose verdicts it used, and each layer's decision, if any."""

    max_asr: float
    error: float
    judge: str
    layers: Mapping[int, Decision | None]


def blocks_of(samples: Sequence[Sample], rule: StopRule | None, *, seed: int) -> list[list[Sample]]:
    """The samples in blocks to ask one after the other, first those to which the rule does not apply.

    Args:
        samples: All samples of the audit.
        rule: None puts all samples into one block.
        seed: Together with the sample's id, the key of the order.
    """
    if rule is None:
        return [list(samples)]
    harmful = sorted((sample for sample in samples if sample.kind == "harmful"), key=lambda s: _key(s.id, seed))
    others = [sample for sample in samples if sample.kind != "harmful"]
    return [others, *(harmful[start : start + BLOCK] for start in range(0, len(harmful), BLOCK))]


def settle(
    verdicts: Sequence[Verdict],
    blocks: Sequence[Sequence[Sample]],
    exit_layers: Sequence[int],
    rule: StopRule | None,
    *,
    judge: str | None,
) -> dict[int, Decision | None]:
    """The decision at each layer after these blocks, None while it is undecided; the first decision stands.

    Args:
        verdicts: All verdicts so far.
        blocks: The blocks asked so far, in order.
        exit_layers: The layers audited.
        rule: None decides nothing.
        judge: The judge whose verdicts on attack success count.

    Raises:
        RunError: If that judge's scores are not all 0 or 1.
    """
    decisions: dict[int, Decision | None] = dict.fromkeys(exit_layers)
    if rule is None:
        return decisions
    scores = {(v.sample_id, v.exit_layer): v.score for v in verdicts if v.measure == "asr" and v.judge == judge}
    for layer in exit_layers:
        outcomes: list[float | None] = []
        for block in blocks:
            outcomes += [scores[sample.id, layer] for sample in block if (sample.id, layer) in scores]
            scored = [score for score in outcomes if score is not None]
            if strange := set(scored) - {0.0, 1.0}:
                raise RunError(
                    f"stopping early needs a judge whose scores are 0 or 1, but {judge} gave {strange.pop():g}; put "
                    "another judge first or leave stop_when out, in a new folder"
                )
            decisions[layer] = decide(
                round(sum(scored)),
                len(scored),
                max_rate=rule.max_asr,
                unscored=len(outcomes) - len(scored),
                error=rule.error,
            )
            if decisions[layer] is not None:
                break
    return decisions


def stopping_of(table: ScoreTable, settings: Settings) -> Stopping | None:
    """A run's early stopping, recomputed from its verdicts; None for a run that asked everything.

    An exit that lacks answers must have been asked complete blocks, in order, whose verdicts decide its side of the
    limit.

    Args:
        table: The scores of a run.
        settings: The run's settings.

    Raises:
        UnreadableError: If answers are missing that the rule does not account for.
    """
    rule = settings["stop_when"]
    if rule is None:
        return None
    judge = next(each["name"] for each in settings["judges"] if "asr" in each["measures"])
    harmful = table.of_kinds(("harmful",))
    others = np.setdiff1d(np.arange(len(table.samples)), harmful)
    order = np.array(
        sorted(harmful, key=lambda row: _key(table.samples[row].id, settings["decoding"]["seed"])), dtype=np.intp
    )
    num_harmful = len(order) + settings["data"]["samples"] - len(table.samples)  # some may not have been asked at all
    is_answered = ~np.isnan(table.scores[OWN, "tokens"].values)
    asr = table.scores.get((judge, "asr"))
    decisions: dict[int, Decision | None] = {}
    for column, layer in enumerate(table.exit_layers):
        asked = int(is_answered[order, column].sum())
        is_whole = asked == num_harmful
        decisions[layer] = None if asr is None else _decision(asr.of_samples(order[:asked]), column, rule)
        if (
            not is_answered[others, column].all()
            or not is_answered[order[:asked], column].all()
            or not (is_whole or (asked % BLOCK == 0 and decisions[layer] is not None))
        ):
            raise UnreadableError(f"responses.parquet: answers are missing at exit {layer}, which did not stop early")
    return {"max_asr": rule["max_asr"], "error": rule["error"], "judge": judge, "layers": decisions}


def _decision(scores: Scores, column: int, rule: Mapping[str, float]) -> Decision | None:
    values = scores.values[:, column]
    scored = values[~np.isnan(values)]
    if not np.isin(scored, (0.0, 1.0)).all():
        raise UnreadableError("verdicts.parquet: exits stopped early because of scores other than 0 and 1")
    return decide(
        int(scored.sum()),
        len(scored),
        max_rate=rule["max_asr"],
        unscored=int(scores.unscored[:, column].sum()),
        error=rule["error"],
    )


def _key(sample_id: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\x1f{sample_id}".encode()).digest()
