"""`exitsafe demo`: the demonstration's settings and last screen; its flow is in `demo_flow.py`."""

from __future__ import annotations

from exitsafe.cli import console
from exitsafe.cli.models import announce
from exitsafe.specs.verbs import DemoSpec


def demo_command(spec: DemoSpec, show: console.Show) -> None:
    """Measure how a small model's safety depends on the exit layer, repair it by L-PPO, and measure again.

    Minutes on a laptop, nothing is downloaded: the model ships with the package.

    Rerun the same command to resume.
    """
    announce(spec.organism)
    from exitsafe.cli.demo_flow import run_demo
    from exitsafe.cli.demo_screen import last_screen, to_document

    shown = run_demo(spec.organism, out=spec.out, seed=spec.seed, with_baselines=spec.baselines)
    show(to_document(shown), lambda: last_screen(shown))
