"""`exitsafe translate`: a model and pictures -> one linear map per exit, and how well each fits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from exitsafe.cli import console
from exitsafe.cli.models import load_model
from exitsafe.errors import InputError
from exitsafe.specs.inputs import Samples
from exitsafe.specs.verbs import TranslateSpec
from exitsafe.untrusted import JsonObject

if TYPE_CHECKING:
    from exitsafe.records import Sample

_OTHERWISE = "--images DIR with benign pictures, or --suite NAME_OR_FILE"


def translate_command(spec: TranslateSpec, show: console.Show) -> None:
    """Fit a linear map per exit from its image features to the default exit's: a repair without training.

    Needs pictures only, no labels. exitsafe audit takes the folder by --translators.
    """
    samples = _pictures(spec)
    from exitsafe.baselines import fit_translators
    from exitsafe.exits.translator_files import read_record

    vlm = load_model(spec.model, spec.loading)
    with console.progress_bar("Translators", unit="picture") as progress:
        folder = fit_translators(vlm, samples, exit_layers=spec.exit_layers, out=spec.out, progress=progress)
    record = read_record(folder)
    assert record is not None
    pictures = record["pictures"]
    lines = [
        f"{pictures['count']} pictures; R² on {pictures['held_out']} of them that were held out.",
        f"Translators: {folder}",
        f"Audit it as before: exitsafe audit {spec.model} --translators {folder} --like BEFORE --out AFTER",
    ]
    show({"translators": str(folder), **record}, lambda: [_table(record), *lines])


def _pictures(spec: TranslateSpec) -> list[Sample]:
    """The samples whose pictures to learn from, read before a model is loaded."""
    samples = _of_folder(spec.images) if spec.images is not None else _of_suites(spec)
    if spec.num_images is None or spec.num_images >= len(samples):
        return samples
    from random import Random

    return Random(spec.seed).sample(samples, spec.num_images)


def _of_folder(folder: Path) -> list[Sample]:
    from exitsafe.data.images import check_image
    from exitsafe.data.pairing import list_images
    from exitsafe.records import Sample

    names = list_images(folder)
    for name in names:
        check_image(folder / name, where=f"--images {folder}")
    return [Sample(id=name, prompt="", images=(folder / name,), kind="benign") for name in names]


def _of_suites(spec: TranslateSpec) -> list[Sample]:
    from exitsafe.data.source import find_samples

    wanted = Samples(suites=spec.suites)
    source = find_samples(spec.model, wanted, split="train", seed=spec.seed, otherwise=_OTHERWISE)
    samples = [sample for sample in source.read() if sample.kind != "harmful" and sample.images]
    if not samples:
        raise InputError(f"{', '.join(source.suites)}: no sample that is not harmful has a picture; give --images DIR")
    return samples


def _table(record: JsonObject) -> Any:
    from rich.table import Table

    table = Table(title="R² of the default exit's features", title_justify="left")
    for heading in ("exit", "as they are", "translated", "ridge"):
        table.add_column(heading, justify="left" if heading == "exit" else "right")
    for entry in record["exits"]:
        numbers = (f"{entry['r2_untranslated']:.3f}", f"{entry['r2']:.3f}", f"{entry['ridge']:g}")
        table.add_row(str(entry["exit_layer"]), *numbers)
    return table
