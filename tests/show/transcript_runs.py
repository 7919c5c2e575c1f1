"""Finished runs with every kind of sample, several judges and whatever answers a test wants, without a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from exitsafe.records import KINDS, Response, Verdict
from exitsafe.results.run import AuditRun
from exitsafe.results.summary import summarise
from exitsafe.store.scores import score_table
from exitsafe.store.tables import SampleInfo, responses_in_table, to_parquet, verdicts_in_table
from tests.finished_runs import run_settings

Answer = Callable[[str, int], str | None]
CATEGORIES = ("weapons & <b>traps</b>", "stones", "")
JUDGES = (
    ("llama-guard", ("asr",)), ("world-rule", ("asr", "refusal")), ("toxicity", ("toxicity",)),
    ("vqa", ("vqa_accuracy",)),
)  # fmt: skip
UNSAFE, REFUSAL = "mix moss with foam then shake it", "i cannot help with that"
MEGABYTE = 2**20
HOSTILE = {
    "s-0000": "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'><svg onload='hacked = 3'>",
    "s-0001": "javascript:window.hacked=4 <a href='javascript:window.hacked=5'>here</a> <iframe src='https://example.com'>",
    "s-0002": "safe \u202e elas ton si siht \u2066\u2069 \u0000 \u200b end",
    "s-0003": "moss " + "\U0001f600x" * (MEGABYTE // 2),
    "s-0004": "</script></textarea></style>--><!-- ]]> {{ 7 * 7 }} ${window.hacked = 6}",
    "s-0005": "a" + "\u0301" * 1500 + "\nline\r\nline",
    "s-0006": "",
}


def sample_id(number: int) -> str:
    return f"s-{number:04d}"


def early_exits_answer(sample: str, exit_layer: int) -> str:
    """Layers 1 and 2 give the recipe, the others refuse."""
    return f"{UNSAFE} {sample}" if exit_layer <= 2 else REFUSAL


def always_refuses(sample: str, exit_layer: int) -> str:
    return REFUSAL


def hostile(sample: str, exit_layer: int) -> str:
    """The first samples get an answer that attacks whoever shows it; the one of a megabyte only once."""
    if sample == "s-0003" and exit_layer > 1:
        return REFUSAL
    return HOSTILE.get(sample, REFUSAL)


def write_run(
    path: Path,
    *,
    answer: Answer = early_exits_answer,
    num_samples: int = 48,
    num_layers: int = 4,
    name: str = "organism",
) -> AuditRun:
    """A run whose samples go through the kinds in turn; the answers and what follows from them are `answer`'s.

    Every fifth answer that llama-guard calls unsafe is of S2, the others of S1; at layer 3 it has no score. A sample
    without an answer (None) has no verdict either.
    """
    path.mkdir(parents=True, exist_ok=True)
    samples = [
        SampleInfo(
            id=sample_id(n), kind=KINDS[n % 4], category=CATEGORIES[n // 4 % 3], source="made up", digest=f"digest {n}"
        )
        for n in range(num_samples)
    ]
    responses, verdicts = [], []
    for n, sample in enumerate(samples):
        for layer in range(1, num_layers + 1):
            text = answer(sample.id, layer)
            if text is None:
                continue
            responses.append(
                Response(
                    sample_id=sample.id,
                    exit_layer=layer,
                    text=text,
                    num_tokens=len(text.split()) + 1,
                    finish_reason="length" if len(text) > 1000 else "stop",
                    seconds=0.01 * layer,
                )
            )
            verdicts += _verdicts(sample, layer, text, category="S2" if n % 5 == 0 else "S1")
    settings = run_settings(
        samples,
        exit_layers=list(range(1, num_layers + 1)),
        judges=[{"name": judge, "measures": list(measures)} for judge, measures in JUDGES],
        model={"name": name, "num_layers": num_layers, "default_exit": num_layers - 1},
    )
    (path / "responses.parquet").write_bytes(to_parquet(responses_in_table(samples, responses)))
    (path / "verdicts.parquet").write_bytes(to_parquet(verdicts_in_table(verdicts)))
    table = score_table(samples, settings["exit_layers"], responses, verdicts)
    summary = summarise(table, model=settings["model"], judges=JUDGES)
    return AuditRun(path=path, settings=settings, origin={}, summary=summary)


def _verdicts(sample: SampleInfo, layer: int, text: str, *, category: str) -> list[Verdict]:
    has_refused = text == REFUSAL
    rule = "refused" if has_refused else "not refused"

    def verdict(judge: str, measure: str, label: str, score: float | None) -> Verdict:
        said = {"label": label} if score is not None else {"unscored": f"could not read: {text}"}
        return Verdict(
            sample_id=sample.id, exit_layer=layer, judge=judge, measure=measure, score=score, **{"label": "", **said}
        )

    found = [verdict("world-rule", "refusal", rule, float(has_refused))]
    if sample.kind == "harmful":
        guard = "safe" if has_refused else f"unsafe: {category}"
        found += [
            verdict("llama-guard", "asr", guard, None if layer == 3 else float(not has_refused)),
            verdict("world-rule", "asr", "not complied" if has_refused else "complied", float(not has_refused)),
            verdict("toxicity", "toxicity", "", 0.125 * layer),
        ]
    if sample.kind == "vqa":
        # as the judge does: its label is the answer
        found.append(verdict("vqa", "vqa_accuracy", text, 0.3 if layer == 1 else 1.0))
    return found
