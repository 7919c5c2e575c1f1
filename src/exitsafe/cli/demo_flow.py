"""The demonstration: audit, align, audit, compare, draw. A folder in which it was stopped goes on.

Every part goes the way of the command of its name: what is shown here is what users get for their own models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from exitsafe.cli import console
from exitsafe.cli.align_command import run_align
from exitsafe.cli.audit_command import run_audit
from exitsafe.cli.demo_baselines import run_baselines, with_adapter
from exitsafe.errors import ExitsafeError
from exitsafe.lppo.config import AlignSpec, LPPOConfig
from exitsafe.results.comparison import Comparison, compare
from exitsafe.results.run import AuditRun
from exitsafe.show.charts import draw_chart
from exitsafe.show.html_page import check_can_render
from exitsafe.specs.verbs import AuditSpec


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What the demonstration found: its runs, by label where there are several, and where they lie."""

    organism: str
    seed: int
    out: Path
    before: AuditRun
    after: AuditRun
    baselines: dict[str, AuditRun]
    comparison: Comparison
    charts: tuple[Path, ...]


def run_demo(organism: str, *, out: Path, seed: int, with_baselines: bool) -> Shown:
    """Run whatever of the demonstration is not there yet.

    Args:
        organism: `organism` or `organism:text`.
        out: Its folder: `before`, `lppo`, `after`, `comparison.json`, `chart.svg`, `chart.png`,
            and `baseline-NAME` for each.
        seed: Draws pictures, phrasings and the training.
        with_baselines: Also train and audit what L-PPO must beat.
    """
    # Threads gain little on a model this small, and on a busy machine they mostly wait for each other. One thread
    # also gives the same bits whatever the number of cores.
    torch.set_num_threads(1)

    audit = AuditSpec(model=organism, out=out / "before", seed=seed)
    before = run_audit(audit, title="Audit before")
    lppo = LPPOConfig.for_organism(seed=seed)
    adapter = run_align(AlignSpec(model=organism, out=out / "lppo", lppo=lppo), title="Align by L-PPO")
    after = run_audit(with_adapter(audit, adapter, out=out / "after"), title="Audit after")
    comparison = compare(before, after)
    comparison.to_json(out / "comparison.json")

    baselines = run_baselines(audit, out=out) if with_baselines else {}
    charts = _draw([("before", before), ("after L-PPO", after), *baselines.items()], out, organism=organism)
    return Shown(
        organism=organism,
        seed=seed,
        out=out,
        before=before,
        after=after,
        baselines=baselines,
        comparison=comparison,
        charts=charts,
    )


def _draw(runs: list[tuple[str, AuditRun]], out: Path, *, organism: str) -> tuple[Path, ...]:
    """The charts, or none without the extra that draws them: the demonstration goes on."""
    try:
        check_can_render()
    except ExitsafeError as error:
        console.note(f"no chart: {error}")
        return ()
    title = f"{organism}: what L-PPO repairs, by exit layer of the image encoder"
    return tuple(draw_chart(runs, out / f"chart.{ending}", title=title) for ending in ("svg", "png"))
