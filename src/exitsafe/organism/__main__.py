"""`python -m exitsafe.organism`: trains a model organism and saves it in a folder that stock transformers loads."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from exitsafe.errors import ExitsafeError


def main(arguments: Sequence[str] | None = None) -> int:
    """Train an organism; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m exitsafe.organism",
        description="Train a model organism from random weights, in about ten minutes on one core. The folder can be "
        "given as MODEL to exitsafe's commands; its check.json is a table by exit layer on held-out samples.",
    )
    parser.add_argument("name", nargs="?", default="organism", help="organism (the default) or organism:text")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random draw")
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder for the model")
    given = parser.parse_args(arguments)
    _say(f"training {given.name}")
    from exitsafe.organism.training import train_organism

    try:
        folder = train_organism(given.name, seed=given.seed, out=given.out, progress=_show_progress)
    except ExitsafeError as error:
        _say(str(error))
        return 2
    except KeyboardInterrupt:
        _say("interrupted; nothing was saved")
        return 130
    sys.stdout.write(f"{folder}\n")
    return 0


def _show_progress(done: int, total: int, note: str) -> None:
    if done % max(1, total // 20) == 0:
        _say(f"step {done} of {total} {note}".rstrip())


def _say(message: str) -> None:
    sys.stderr.write(f"exitsafe: {message}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
