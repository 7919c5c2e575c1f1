"""The demonstration: audit, align, audit, compare, draw. A folder in which it was stopped goes on.

Every part goes the way of the command of its name: what is shown here is what users get for their own models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from exitsafe.cli import console
from exitsafe.cli.align_command import run_align
from exitsafe.cli.audit_plan import make_plan, run_plan
from exitsafe.cli.demo_baselines import run_baselines
from exitsafe.errors import ExitsafeError, InputError
from exitsafe.results.comparison import Comparison, compare
from exitsafe.results.run import AuditRun
from exitsafe.show.charts import draw_chart
from exitsafe.show.document import check_can_render
from exitsafe.world import ORGANISMS


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
    if organism not in ORGANISMS:
        raise InputError(f"organism {organism!r} is unknown; choose {' or '.join(ORGANISMS)}")
    plan = make_plan(organism, {"seed": seed})
    # Threads gain little on a model this small, and on a busy machine they mostly wait for each other. One thread
    # also gives the same bits whatever the number of cores.
    torch.set_num_threads(1)

    before = run_plan(plan, out=out / "before", loading={}, title="Audit before")
    adapter = run_align(organism, changes={"seed": seed}, out=out / "lppo", loading={}, title="Align by L-PPO")
    after = run_plan(plan, out=out / "after", loading={"adapter": adapter}, title="Audit after")
    comparison = compare(before, after)
    comparison.to_json(out / "comparison.json")

    baselines = run_baselines(plan, out=out) if with_baselines else {}
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
