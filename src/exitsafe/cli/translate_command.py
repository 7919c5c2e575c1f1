"""`exitsafe translate`: a model and pictures -> one linear map per exit, and how well each fits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exitsafe.cli import console, defaults, options
from exitsafe.cli.models import load_model
from exitsafe.cli.settings_file import config_option
from exitsafe.errors import InputError

if TYPE_CHECKING:
    from exitsafe.records import Sample

_OTHERWISE = "--images DIR with benign pictures, or --suite NAME_OR_FILE"


def translate_command(
    model: options.Model,
    out: Annotated[Path, options.out("A folder for the maps: new, empty, or of the same maps.")],
    images: Annotated[
        Path | None,
        typer.Option(
            "--images",
            metavar="DIR",
            help="Learn from the pictures in this folder.",
            show_default=False,
            file_okay=False,
        ),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            "--suite",
            metavar="NAME|PATH",
            help="Learn from the pictures of a suite's samples that are not harmful; may come several times.",
            show_default="an organism's own, training split",
        ),
    ] = None,
    layers: options.Layers = None,
    num_images: Annotated[
        int | None,
        typer.Option("--num-images", min=1, metavar="N", help="Draw so many of the pictures.", hidden=True),
    ] = None,
    seed: options.Seed = None,
    revision: options.Revision = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    config: Annotated[Path | None, config_option()] = None,
    json: options.Json = False,
) -> None:
    """Fit a linear map per exit from its image features to the default exit's: a repair without training.

    Needs pictures only, no labels. exitsafe audit takes the folder by --translators.
    """
    with console.results(as_json=json) as show:
        samples = _pictures(model, images=images, suites=suite, seed=seed or 0, num_images=num_images)
        from exitsafe.baselines import fit_translators
        from exitsafe.exits.translator_files import read_record

        vlm = load_model(model, revision=revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        with console.progress_bar("Translators", unit="picture") as progress:
            folder = fit_translators(vlm, samples, exit_layers=layers or "all", out=out, progress=progress)
        record = read_record(folder)
        assert record is not None
        audit = f"exitsafe audit {model} --translators {folder} --like BEFORE --out AFTER"
        pictures = record["pictures"]
        lines = [
            f"{pictures['count']} pictures; R² on {pictures['held_out']} of them that were held out.",
            f"Translators: {folder}",
            f"Audit it as before: {audit}",
        ]
        show({"translators": str(folder), **record}, lambda: [_table(record), *lines])


def _pictures(
    model: str, *, images: Path | None, suites: list[str] | None, seed: int, num_images: int | None
) -> list[Sample]:
    """The samples whose pictures to learn from, read before a model is loaded."""
    if images is not None and suites:
        raise InputError("--images and --suite are two sources of pictures: give one")
    samples = _of_folder(images) if images is not None else _of_suites(model, suites, seed=seed)
    if num_images is None or num_images >= len(samples):
        return samples
    from random import Random

    return Random(seed).sample(samples, num_images)


def _of_folder(folder: Path) -> list[Sample]:
    from exitsafe.data.images import check_image
    from exitsafe.data.pairing import list_images
    from exitsafe.records import Sample

    names = list_images(folder)
    for name in names:
        check_image(folder / name, where=f"--images {folder}")
    return [Sample(id=name, prompt="", images=(folder / name,), kind="benign") for name in names]


def _of_suites(model: str, suites: list[str] | None, *, seed: int) -> list[Sample]:
    names = defaults.choose_suites(model, suites, otherwise=_OTHERWISE)
    origin = defaults.make_origin(model, suites=names, split="train", seed=seed, limit=None)
    samples = [sample for sample in defaults.read_samples(origin) if sample.kind != "harmful" and sample.images]
    if not samples:
        raise InputError(f"{', '.join(names)}: no sample that is not harmful has a picture; give --images DIR")
    return samples


def _table(record: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="R² of the default exit's features", title_justify="left")
    for heading in ("exit", "as they are", "translated", "ridge"):
        table.add_column(heading, justify="left" if heading == "exit" else "right")
    for entry in record["exits"]:
        numbers = (f"{entry['r2_untranslated']:.3f}", f"{entry['r2']:.3f}", f"{entry['ridge']:g}")
        table.add_row(str(entry["exit_layer"]), *numbers)
    return table
