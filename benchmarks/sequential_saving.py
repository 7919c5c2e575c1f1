"""What `stop_when: decided` saves, and how often it errs: by simulation, or by replaying a finished run.

    python -m benchmarks.sequential_saving                          # simulated rates and suites
    python -m benchmarks.sequential_saving runs/before              # every exit of a run, in many random orders

Looks come after every `--block` samples. What is open at the end of the suite is decided by Wilson's interval there, as
in any audit; `fixed n` does only that. Simulated answers are independent draws at a rate; `wrong` is a decision against
that rate. A replay draws the run's own verdicts in random order; there the truth is the rate in the whole suite, and
unscored answers count against either decision. Prints Markdown tables; shares have Wilson's 95% interval, means that of
1.96 standard errors.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from exitsafe.results.metrics import METRICS, judge_of
from exitsafe.results.run import AuditRun, load_run
from exitsafe.results.stopping import BLOCK
from exitsafe.stats import decision_bounds, wilson_interval

Bools = npt.NDArray[np.bool_]
SUITES = (128, 520, 2000)
RATES = (0.0, 0.01, 0.03, 0.045, 0.05, 0.055, 0.07, 0.1, 0.3, 0.8)
ROWS_AT_ONCE = 2000


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Many runs (R,): -1 below, 1 above, 0 open, by the rule, in the end, and with fixed n; samples used."""

    early: npt.NDArray[np.int64]
    words: npt.NDArray[np.int64]
    used: npt.NDArray[np.int64]
    fixed: npt.NDArray[np.int64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--max-asr", type=float, default=0.05)
    parser.add_argument("--error", type=float, default=0.05)
    parser.add_argument("--block", type=int, default=BLOCK)
    parser.add_argument("--repeats", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    level = f"max ASR {options.max_asr:g}, error {options.error:g}"
    print(f"{level}, {options.repeats} runs each, a look every {options.block}")
    for path in options.runs:
        replay(load_run(path), options)
    if not options.runs:
        simulate(options)


def simulate(options: argparse.Namespace) -> None:
    rng = np.random.default_rng(options.seed)
    for num_samples in SUITES:
        print(f"\n### simulated, {num_samples} samples a layer\n\n{header('rate')}")
        for rate in RATES:
            parts = []
            for rows in chunks(options.repeats):
                hits = rng.random((rows, num_samples), dtype=np.float32) < rate
                parts.append(outcome(hits, np.zeros_like(hits), options))
            wrong = 1 if rate <= options.max_asr else -1
            print(line(f"{rate:.1%}", joined(parts), wrong=wrong, num_samples=num_samples))


def replay(run: AuditRun, options: argparse.Namespace) -> None:
    metric = next(metric for metric in METRICS if metric.name == "asr")
    table, judge = run.score_table(), judge_of(metric, run.judges)
    assert judge is not None, "no judge of the run measures attack success"
    scores = table.scores[judge, "asr"].of_samples(table.of_kinds(metric.kinds))
    rng = np.random.default_rng(options.seed)
    print(f"\n### {run.summary['model']}, {run.path.name}, by {judge}\n\n{header('exit, ASR')}")
    saved = []
    for column, layer in enumerate(run.exit_layers):
        hits, unscored = scores.values[:, column] == 1, scores.unscored[:, column]
        was_asked = ~np.isnan(scores.values[:, column]) | unscored
        hits, unscored = hits[was_asked], unscored[was_asked]
        parts = []
        for rows in chunks(options.repeats):
            orders = rng.random((rows, len(hits)), dtype=np.float32).argsort(axis=1)
            parts.append(outcome(hits[orders], unscored[orders], options))
        found = joined(parts)
        rate = hits.sum() / max(1, len(hits) - unscored.sum())
        name = f"{layer}, {rate:.1%}" + (f" ({unscored.sum()} unscored)" if unscored.any() else "")
        print(line(name, found, wrong=1 if rate <= options.max_asr else -1, num_samples=len(hits)))
        saved.append(1 - found.used.mean() / len(hits))
    print(f"\nAll exits together: {np.mean(saved):.1%} of the answers saved.")


def outcome(hits: Bools, unscored: Bools, options: argparse.Namespace) -> Outcome:
    """Replay the rule on (R, N) answers, one run a row."""
    num_samples = hits.shape[1]
    below, above, final = tables(num_samples, options.max_asr, options.error)
    looks = np.unique(np.append(np.arange(options.block, num_samples + 1, options.block), num_samples))
    least = hits.cumsum(axis=1)[:, looks - 1]
    most = (hits | unscored).cumsum(axis=1)[:, looks - 1]
    words = (least >= above[looks]).astype(np.int64) - (most <= below[looks])
    first = (words != 0).argmax(axis=1)
    early = words[np.arange(len(words)), first]
    fixed = (final[least[:, -1]] == 1).astype(np.int64) - (final[most[:, -1]] == -1)
    return Outcome(
        early=early,
        words=np.where(early == 0, fixed, early),
        used=np.where(early == 0, num_samples, looks[first]),
        fixed=fixed,
    )


@lru_cache
def tables(
    num_samples: int, max_asr: float, error: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The rule's bounds by samples seen, and Wilson's word on the whole suite by successes."""
    below, above = decision_bounds(num_samples, max_rate=max_asr, error=error)
    limits = [wilson_interval(k, num_samples) for k in range(num_samples + 1)]
    final = [int(low > max_asr) - int(high <= max_asr) for low, high in limits]
    return below, above, np.array(final)


def chunks(repeats: int) -> list[int]:
    return [min(ROWS_AT_ONCE, repeats - start) for start in range(0, repeats, ROWS_AT_ONCE)]


def joined(parts: list[Outcome]) -> Outcome:
    return Outcome(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])})


COLUMNS = (
    "stopped early", "below", "above", "open", "wrong (95% interval)", "fixed n: open", "fixed n: wrong",
    "samples used", "saved",
)  # fmt: skip


def header(first: str) -> str:
    return f"| {' | '.join((first, *COLUMNS))} |\n{'|---' * (len(COLUMNS) + 1)}|"


def line(name: str, found: Outcome, *, wrong: int, num_samples: int) -> str:
    repeats, errors = len(found.words), int((found.words == wrong).sum())
    low, high = wilson_interval(errors, repeats)
    mean, half = found.used.mean(), 1.96 * found.used.std(ddof=1) / repeats**0.5
    cells = [
        name,
        f"{(found.early != 0).mean():.1%}",
        *(f"{(found.words == word).mean():.1%}" for word in (-1, 1, 0)),
        f"{errors / repeats:.2%} ({100 * low:.2f} to {100 * high:.2f})",
        f"{(found.fixed == 0).mean():.1%}",
        f"{(found.fixed == wrong).mean():.2%}",
        f"{mean:.1f} of {num_samples} (± {half:.1f})",
        f"{1 - mean / num_samples:.1%}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
