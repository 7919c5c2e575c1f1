"""Judges the answers of a run and saves the verdicts as they arrive.

A judge with a model may be in memory beside the audited model, or have the memory to itself in a second pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from exitsafe.auditing.ticker import Ticker
from exitsafe.judges import Judge, JudgeOptions, ModelJudge, load_judges
from exitsafe.judges.asking import ask_judge
from exitsafe.judges.protocol import proxy_of
from exitsafe.judges.registry import FREE_JUDGES, SECOND_JUDGE
from exitsafe.records import Sample
from exitsafe.store.directory import RunDirectory
from exitsafe.untrusted import JsonObject, UnreadableError, read_json
from exitsafe.world.profile import WORLD

ROWS_AT_ONCE = 256  # in a second pass; verdicts are saved after each
Rows = Sequence[tuple[Sample, int]]
"""Samples with exit layers that have an answer."""


def judge_rows(run: RunDirectory, rows: Rows, judges: Sequence[Judge], *, ticker: Ticker) -> int:
    """Let each judge judge the answers that it has not judged yet; returns the number judged, over all judges."""
    num_asked = 0
    for judge in judges:
        done = run.saved.judged.get(judge.name, set())
        new = [(sample, layer) for sample, layer in rows if (sample.id, layer) not in done]
        if not new:  # calling it would load its model
            continue
        responses = [run.saved.responses[sample.id, layer] for sample, layer in new]
        verdicts = ask_judge(judge, [sample for sample, _ in new], responses)
        run.save_judgement(judge.name, [(sample.id, layer) for sample, layer in new], verdicts)
        ticker.hear(verdicts)
        num_asked += len(new)
    return num_asked


def judge_in_turn(run: RunDirectory, rows: Rows, judges: Sequence[Judge], *, ticker: Ticker) -> None:
    """Let one judge after the other judge all rows, so that only one model is in memory at a time."""
    for judge in judges:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[start : start + ROWS_AT_ONCE]
            ticker.tick(judge_rows(run, some, [judge], ticker=ticker))
        unload([judge])


def unload(judges: Sequence[Judge]) -> None:
    """Free the memory of judges that hold a model."""
    for judge in judges:
        if isinstance(judge, ModelJudge):
            judge.unload()


def available_judges(names: Sequence[str], options: JudgeOptions | None = None) -> list[Judge]:
    """Judges by name; raises now, before the audited model is loaded, if one is not available."""
    judges = load_judges(names, options=options)
    for judge in judges:
        judge_settings(judge)
    return judges


def judge_settings(judge: Judge) -> JsonObject:
    """What a run records about a judge."""
    return {
        "name": judge.name,
        "measures": list(judge.measures),
        "settings": judge.settings if isinstance(judge, ModelJudge) else {},
        **({"proxy": dict(proxy)} if (proxy := proxy_of(judge)) else {}),
    }


def warn_of_own_reward(adapter: Path | None, judges: Sequence[Judge]) -> None:
    """Warn about a judge that was the training reward or uses its model: it measures what was optimised, not safety.

    `world-rule` is exempt, since it defines safety in the organism's world.

    Args:
        adapter: The model's adapter, inside its training run.
        judges: The judges to use.
    """
    record = None if adapter is None else adapter.parent / "run.json"
    if record is None or not record.is_file():
        return
    try:
        trained = read_json(record)["settings"]
        rewards = str(trained["reward"]).split("+")
        models = {str(settings["model"]) for settings in trained.get("reward_models", {}).values()}
    except (UnreadableError, KeyError, TypeError, AttributeError):  # another program's run.json
        return
    for judge in judges:
        was_reward = judge.name in rewards and judge.name not in (*FREE_JUDGES, WORLD.judge)
        if was_reward or getattr(judge, "settings", {}).get("model") in models:
            warnings.warn(
                f"judge {judge.name} was the reward that {adapter} was trained on, so its verdicts show how well that "
                "was optimised, not whether the model is safe: judge the runs before and after training with another "
                f"model too, e.g. exitsafe judge RUN --judge {SECOND_JUDGE}",
                stacklevel=3,
            )
