"""`exitsafe demo`: the flags of the demonstration; its flow is in `demo_flow.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from exitsafe.cli import console, options
from exitsafe.cli.models import announce
from exitsafe.cli.settings_file import config_option


def demo_command(
    out: Annotated[Path, options.out("Where everything is written.")] = Path("runs/demo"),
    organism: Annotated[
        str, typer.Option(metavar="NAME", help="organism, or organism:text, where the text alone decides.")
    ] = "organism",
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also what L-PPO must beat: PPO at the default exit, and SFT.")
    ] = False,
    seed: options.Seed = None,
    config: Annotated[Path | None, config_option()] = None,
    json: options.Json = False,
) -> None:
    """Measure how a small model's safety depends on the exit layer, repair it by L-PPO, and measure again.

    Minutes on a laptop, nothing is downloaded: the model ships with the package.

    The same command goes on where it stopped.
    """
    with console.results(as_json=json) as show:
        announce(organism)
        from exitsafe.cli.demo_flow import run_demo
        from exitsafe.cli.demo_screen import last_screen, to_document

        shown = run_demo(organism, out=out, seed=seed or 0, with_baselines=baselines)
        show(to_document(shown), lambda: last_screen(shown))
