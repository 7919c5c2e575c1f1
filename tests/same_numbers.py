"""Whether two checkouts give the same numbers: answers, verdicts, and every rate with its interval.

    python -m tests.same_numbers ../before . --out /tmp/same          # the demo at seeds 0 and 7, three tiny models

Each checkout runs its own source, in processes of its own; the tiny models and their suite are made once, by this one.
Times are not compared. Ends with status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tests.tiny_models import noise_image, tiny_model, tiny_processor

FAMILIES = ("llava", "llava_next", "mllama")
TIMES = {"seconds", "latency", "tokens_per_second"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="A checkout.")
    parser.add_argument("after", type=Path, help="Another.")
    parser.add_argument("--out", type=Path, required=True, help="A new folder for models and runs.")
    parser.add_argument("--seed", type=int, action="append", help="Seeds of the demo; 0 and 7 by default.")
    given = parser.parse_args()
    checkouts = {"before": given.before.resolve(), "after": given.after.resolve()}
    models = _make_models(given.out / "models")
    differences: list[str] = []
    for seed in given.seed or [0, 7]:
        for name, checkout in checkouts.items():
            _exitsafe(checkout, "demo", "--seed", str(seed), "--out", str(given.out / name / f"demo-{seed}"))
        differences += _compare(given.out, f"demo-{seed}/before", f"demo-{seed}/after")
    for family, model in models.items():
        arguments = ["--suite", str(given.out / "models" / "suite.jsonl"), "--judge", "refusal-prefix"]
        for name, checkout in checkouts.items():
            run = given.out / name / family
            _exitsafe(checkout, "audit", str(model), *arguments, "--max-new-tokens", "8", "--out", str(run))
        differences += _compare(given.out, family)
    print("\n".join(differences) or "no difference")
    return 1 if differences else 0


def _make_models(folder: Path) -> dict[str, Path]:
    folder.mkdir(parents=True)
    with (folder / "suite.jsonl").open("w") as suite:
        for index, kind in enumerate(["harmful", "borderline", "benign", "vqa"] * 4):
            noise_image(index, (30 + 7 * index, 44)).save(folder / f"{index}.png")
            sample: dict[str, Any] = {"id": f"s{index}", "prompt": "what colour is the left shape", "kind": kind}
            sample |= {"images": [f"{index}.png"]} | ({"answers": ["red"]} if kind == "vqa" else {})
            suite.write(json.dumps(sample) + "\n")
    for family in FAMILIES:
        tiny_model(family).save_pretrained(folder / family)
        tiny_processor(family).save_pretrained(folder / family)
    return {family: folder / family for family in FAMILIES}


def _exitsafe(checkout: Path, *arguments: str) -> None:
    print("+", checkout.name, "exitsafe", *arguments, flush=True)
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "exitsafe", *arguments], check=True, env=environment, stdout=subprocess.DEVNULL
    )


def _compare(out: Path, *runs: str) -> Iterator[str]:
    for run in runs:
        before, after = out / "before" / run, out / "after" / run
        counts = []
        for name in ("responses.parquet", "verdicts.parquet"):
            old_rows, new_rows = _rows(before / name), _rows(after / name)
            counts.append(f"{len(new_rows)} {name.partition('.')[0]}")
            if len(old_rows) != len(new_rows):
                yield f"{run}/{name}: {len(old_rows)} rows, then {len(new_rows)}"
            for place, (left, right) in enumerate(zip(old_rows, new_rows, strict=False)):
                if left != right:
                    yield f"{run}/{name} row {place}: {left}, then {right}"
                    break
        old, new = (dict(_numbers(json.loads((each / "summary.json").read_text()))) for each in (before, after))
        print(f"{run}: {', '.join(counts)}, {len(new)} numbers in summary.json", flush=True)
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                yield f"{run}/summary.json {name}: {old.get(name)}, then {new.get(name)}"


def _rows(file: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if name not in TIMES} for row in pq.read_table(file).to_pylist()
    ]


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf by its path; hashes of checkpoints, names and times left out."""
    if isinstance(value, dict):
        for name, entry in value.items():
            if name not in TIMES and name != "model":
                yield from _numbers(entry, f"{path}.{name}")
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _numbers(entry, f"{path}[{index}]")
    elif not (isinstance(value, float) and math.isnan(value)):
        yield path, value


if __name__ == "__main__":
    raise SystemExit(main())
