"""`exitsafe transfer`: sets of exits to train on -> an L-PPO run and an audit for each, and their matrix."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exitsafe.cli import console, defaults, options
from exitsafe.cli.align_command import lppo_fields, make_config
from exitsafe.cli.audit_plan import origin_of_run
from exitsafe.cli.models import load_model
from exitsafe.cli.rewards import read_rewards
from exitsafe.cli.settings_file import FIELDS, config_option
from exitsafe.errors import InputError

if TYPE_CHECKING:
    from exitsafe.baselines import Transfer


def transfer_command(
    context: typer.Context,
    model: options.Model,
    out: options.Out,
    train_sets: Annotated[
        str,
        typer.Option(
            "--train-sets",
            metavar="SETS",
            help="Sets of exits, with semicolons between them, e.g. 1;1-3,7;all. Each is trained on alone, the default "
            "exit only where a set has it.",
        ),
    ] = "1;3;5;7;all",
    layers: Annotated[
        str | None,
        typer.Option("--layers", metavar="LAYERS", help="Exits to audit: all, or e.g. 1-8,16,23.", show_default="all"),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            "--suite",
            metavar="NAME|PATH",
            help="Train on these; may come several times.",
            show_default="an organism's own, training split",
        ),
    ] = None,
    test_suite: Annotated[
        list[str] | None,
        typer.Option(
            "--test-suite",
            metavar="NAME|PATH",
            help="Audit with these; may come several times.",
            show_default="an organism's own, held-out split",
        ),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            metavar="JUDGE",
            help="Judge that scores the answers in training, as for align.",
            show_default="built-in: qwen3guard; for an organism, its world's rule",
        ),
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Who scores the audits; may come several times.",
            show_default="world-rule for organism suites, else qwen3guard",
        ),
    ] = None,
    images: options.Images = None,
    category: options.Category = None,
    limit: options.Limit = None,
    num_steps: Annotated[
        int | None, typer.Option("--steps", min=1, metavar="N", help="PPO steps.", show_default="400; an organism 80")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Answers per step.", show_default="64; an organism 128"),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Longest answer, in training and audits.",
            show_default="256; an organism 24",
        ),
    ] = None,
    seed: options.Seed = None,
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantization: options.Quantization = None,
    trust_remote_code: options.TrustRemoteCode = False,
    config: Annotated[Path | None, config_option(section="lppo", fields=lppo_fields)] = None,
    json: options.Json = False,
) -> None:
    """Train L-PPO on each of several sets of exits, audit each at all exits, and show which exits helped which.

    All fields of LPPOConfig but the exits can be set in --config. The same command goes on where it stopped.
    """
    with console.results(as_json=json) as show:
        flags = {"num_steps": num_steps, "batch_size": batch_size, "max_new_tokens": max_new_tokens, "seed": seed}
        changes = context.meta.get(FIELDS, {}) | {name: value for name, value in flags.items() if value is not None}
        if refused := {"exit_layers", "include_default"} & changes.keys():
            raise InputError(f"{min(refused)}: --train-sets names the exits here; leave it out of --config")
        lppo = make_config(model, changes)
        train_names = defaults.choose_suites(model, suite, otherwise="--suite NAME_OR_FILE")
        if suite and not test_suite:
            raise InputError("--suite is trained on: give --test-suite NAME_OR_FILE to audit with")
        test_names = defaults.choose_suites(model, test_suite, otherwise="--test-suite NAME_OR_FILE")
        drawn: dict[str, Any] = {"seed": lppo.seed, "limit": limit, "images": images, "categories": category}
        train_origin = defaults.make_origin(model, suites=train_names, split="train", **drawn)
        test_origin = defaults.make_origin(model, suites=test_names, split="heldout", **drawn)
        from exitsafe.baselines import transfer

        loading = {
            "revision": revision,
            "dtype": dtype,
            "device": device,
            "quantization": quantization,
            "trust_remote_code": trust_remote_code,
        }
        is_organism = defaults.organism_of(model) is not None
        found = transfer(
            partial(_load, model, loading),
            train_sets.split(";"),
            train_samples=defaults.read_samples(train_origin),
            test_samples=defaults.read_samples(test_origin),
            reward=read_rewards(None if reward is None else [reward]),
            config=lppo,
            judges=judge or None,
            test_exits=layers or "all",
            max_new_tokens=max_new_tokens or (defaults.ORGANISM_TOKENS if is_organism else None),
            out=out,
            origin=lambda adapter: origin_of_run(test_origin, model, loading | {"adapter": adapter}, judging={}),
            stage=lambda title, unit: console.progress_bar(title, unit=unit),
        )
        show({"transfer": str(out), **found.to_json()}, lambda: transfer_tables(found))


def _load(model: str, loading: dict[str, Any], adapter: Path | None) -> Any:
    return load_model(model, adapter=adapter, **loading)


def transfer_tables(found: Transfer) -> list[Any]:
    """One table per metric: sets trained on down, exits audited across, with 95% intervals; * trained on that exit."""
    from rich.table import Table

    from exitsafe.baselines.transfer import METRICS
    from exitsafe.runs.metrics import TITLES

    tables: list[Any] = []
    for metric in METRICS:
        counts = {cell["n"] for row in found.rows.values() for cell in row["metrics"][metric] if cell is not None}
        if not counts:
            continue
        asked = f"n={min(counts)}" if len(counts) == 1 else f"n={min(counts)} to {max(counts)}"
        table = Table(title=f"{TITLES[metric]}, {asked} a cell", title_justify="left")
        table.add_column("trained on")
        for exit_layer in found.test_exits:
            table.add_column(f"exit {exit_layer}", justify="right")
        table.add_column("mean", justify="right")
        for name, row in found.rows.items():
            marks = ["*" if exit_layer in row["train_exits"] else "" for exit_layer in found.test_exits]
            cells = [_cell(metric, cell) + mark for cell, mark in zip(row["metrics"][metric], marks, strict=True)]
            table.add_row(name, *cells, _cell(metric, row["mean"][metric]))
        tables.append(table)
    return [*tables, "* trained on this exit. With 95% intervals."]


def _cell(metric: str, estimate: Any) -> str:
    from exitsafe.runs.numbers import amount, interval

    if estimate is None or estimate["value"] is None:
        return "" if estimate is None else f"none of {estimate['unscored']} scored"
    shown = f"{amount(metric, estimate['value'])} ({interval(metric, estimate['low'], estimate['high'])})"
    return f"{shown}, {estimate['unscored']} unscored" if estimate["unscored"] else shown
