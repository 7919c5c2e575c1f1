"""`exitsafe organism train`: a name and a seed -> a model organism in a folder that stock transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from exitsafe.cli import console, options
from exitsafe.cli.settings_file import config_option

organism_app = typer.Typer(
    no_args_is_help=True,
    help="Remake the built-in model organisms.",
    epilog="Example: exitsafe organism train organism --seed 1 --out runs/organism-1",
)


@organism_app.command("train", epilog="Example: exitsafe organism train organism:text --seed 1 --out runs/text-1")
def train_command(
    out: Annotated[Path, options.out("A new or empty folder for the model.")],
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="organism or organism:text.", show_default=True)
    ] = "organism",
    seed: options.Seed = None,
    config: Annotated[Path | None, config_option()] = None,
    json: options.Json = False,
) -> None:
    """Train a model organism from random weights; about ten minutes on one core.

    The folder also holds check.json, a table by exit layer on held-out samples.

    The other commands take the folder as MODEL.
    """
    with console.results(as_json=json) as show:
        from json import loads

        from exitsafe.organism import train_organism

        try:
            with console.progress_bar("Training", unit="step") as progress:
                folder = train_organism(name, seed=seed or 0, out=out, progress=progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; nothing is saved before the end: {out} starts anew") from None
        check = loads((folder / "check.json").read_text(encoding="utf-8"))
        show(
            {"folder": str(folder), **check},
            lambda: [f"Organism: {folder}", f"Audit it: exitsafe audit {folder} --out DIR"],
        )
