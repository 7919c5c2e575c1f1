"""The README.md of a slim checkpoint, as the Hub reads it: what it is, how to load it, what was measured.

Numbers, ids and names only; no prompt and no answer. Knows nothing about models or runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from yaml import YAMLError

from exitsafe.exporting.manifest import ADAPTER, Audited, AuditedJudge, AuditedSuite, Exported
from exitsafe.results.metrics import BY_NAME, NO_PROXY, meaning_of, title_of
from exitsafe.results.numbers import brief_estimate, count, interval
from exitsafe.show.table import Column, Row, Table
from exitsafe.stats import Estimate
from exitsafe.world.profile import WORLD, is_organism

_LIBRARY, _TASK = "transformers", "image-text-to-text"
_TAGS = ["exitsafe", "early-exit", "safety"]
_ACTIVE = re.compile(r"[<>`|\[\]\\\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def write_card(*, name: str, license_id: str | None, exported: Exported) -> str:
    """The card's text.

    Args:
        name: Of the slim model.
        license_id: What it is under, if that is known.
        exported: What the manifest says.
    """
    base, audit = exported.base, None if exported.audit is None else _harmless(exported.audit)
    data = ModelCardData(
        base_model=base.name if is_hub_id(base.name) else None,
        license=license_id,
        library_name=_LIBRARY,
        pipeline_tag=_TASK,
        tags=list(_TAGS),
        model_name=name,
        eval_results=None if audit is None else _eval_results(audit),
    )
    if data.eval_results is None:
        data.model_name = None  # it names the results only
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        _what_it_is(exported),
        _how_to_load(name, exported),
        _what_was_measured(audit),
        _limits(exported),
        f"## How it was made\n\n```\n{exported.command}\n```\n\n{_sizes(exported)}",
    ]
    return "\n\n".join(parts) + "\n"


def _harmless(audit: Audited) -> Audited:
    """What a run says, without what a Markdown renderer, a table or a terminal would act on."""
    return Audited.model_validate(_without_markup(audit.model_dump()))


def _without_markup(value: object) -> object:
    if isinstance(value, str):
        return _ACTIVE.sub("\N{REPLACEMENT CHARACTER}", " ".join(value.split()))
    if isinstance(value, Mapping):
        return {_without_markup(name): _without_markup(inner) for name, inner in value.items()}
    return [_without_markup(inner) for inner in value] if isinstance(value, list | tuple) else value


def license_of(name: str, *, folder: Path | None, revision: str | None) -> str | None:
    """The license that the whole model's own card names; None if there is no card within reach or it names none.

    Args:
        name: What the model was loaded from.
        folder: Its folder, if it is local.
        revision: The commit of a Hub model.
    """
    if is_organism(name):
        return WORLD.licence
    try:
        if folder is not None:
            card = folder / "README.md"
        elif is_hub_id(name):
            card = Path(hf_hub_download(name, "README.md", revision=revision))
        else:
            return None
        found = ModelCard.load(card, ignore_metadata_errors=True).data.get("license") if card.is_file() else None
    except (
        OSError,
        ValueError,
        HfHubHTTPError,
        HFValidationError,
        YAMLError,
    ):  # no card, no network, no readable header
        return None
    return found if isinstance(found, str) else None


def is_hub_id(name: str) -> bool:
    """Whether a model's name is that of a repository on the Hub."""
    return name.count("/") == 1 and not Path(name).is_absolute() and not name.startswith((".", "~"))


def public_name(name: str) -> str:
    """A Hub id or an organism as it is; of a folder its last part, the rest is nobody's business."""
    return name if is_hub_id(name) and not Path(name).is_dir() else Path(name).name


def _eval_results(audit: Audited) -> list[EvalResult]:
    """One per suite and metric, for the header's model-index."""
    suites = {suite.name: suite.hub for suite in audit.data.suites}
    results = []
    for found in audit.results:
        hub = suites.get(found.suite)
        proxy = _proxy(audit, found.metric, judge=found.judge)
        counts, band = count(found.n, found.unscored), interval(found.metric, found.low, found.high)
        results.append(
            EvalResult(
                task_type=_TASK,
                dataset_type=hub.id if hub else found.suite,
                dataset_name=found.suite,
                dataset_config=hub.configs[0] if hub and hub.configs and len(hub.configs) == 1 else None,
                dataset_split=hub.split if hub else None,
                dataset_revision=hub.revision if hub else None,
                metric_type=f"{found.metric}_proxy" if proxy else found.metric,
                metric_value=round(found.value, 6),
                metric_name=f"{title_of(BY_NAME[found.metric], proxy)} by {found.judge} at exit {audit.exit_layer} "
                f"({counts}, 95% CI {band})",
            )
        )
    return results


def _what_it_is(exported: Exported) -> str:
    base = exported.base
    lines = [
        f"`{base.name}` with the first {exported.exit_layer} of its {base.num_layers} {base.encoder} encoder blocks; "
        f"the others are gone. The whole model reads the features after block {base.default_exit}.",
    ]
    if exported.skip_global:
        lines.append("The global blocks behind the encoder are gone too.")
    if exported.adapter == "merged":
        lines.append("An adapter (safety alignment or other fine-tuning) is merged into its weights.")
    elif exported.adapter == "kept":
        lines.append(
            f"**It comes with an adapter in `{ADAPTER}/`, which must be loaded too: without it this is the model "
            "before its repair.**"
        )
    if base.translators is not None:
        lines.append("The linear map that translates this exit's features is merged into the projector.")
    return " ".join(lines)


def _how_to_load(name: str, exported: Exported) -> str:
    lines = [
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        f'model = AutoModelForImageTextToText.from_pretrained("{name}")  # its folder, or its id on the Hub',
        f'processor = AutoProcessor.from_pretrained("{name}")',
    ]
    if exported.adapter == "kept":
        lines[0:0] = ["from peft import PeftModel"]
        lines.append(f'model = PeftModel.from_pretrained(model, "{name}", subfolder="{ADAPTER}")')
    return "## How to load it\n\nStock transformers, no code of its own:\n\n```python\n" + "\n".join(lines) + "\n```"


def _what_was_measured(audit: Audited | None) -> str:
    if audit is None:
        return (
            "## Safety\n\n**No audit was given when this model was exported: nothing is known here about its safety at "
            "this exit.** Safety training of the whole model may not hold at another exit; audit it with exitsafe."
        )
    places = [audit.at_default] if audit.at_default else []
    headings = ("at this exit (95% interval)", "n", "whole model")[: 2 + len(places)]
    table = Table(
        title="",
        columns=(Column(heading="", is_number=False), *(Column(heading=heading) for heading in headings)),
        rows=tuple(
            Row(cells=(_title(audit, metric), *_cells(metric, found, *(place.get(metric) for place in places))))
            for metric, found in audit.metrics.items()
        ),
    )
    suites = [f"- {_suite(suite)}" for suite in audit.data.suites]
    judges = [f"- {_judge(judge)}" for judge in audit.judges]
    decoding = audit.decoding
    how = "greedy" if decoding.temperature == 0 else f"temperature {decoding.temperature:g}"
    before = f" *Whole model*: the same model at its default exit, {audit.default_exit}." if audit.at_default else ""
    early = (
        " The audit stopped asking where an exit's side of its limit was settled; intervals stay valid under that."
        if audit.stopped_early
        else ""
    )
    return "\n".join(
        [
            f"## Audit at exit {audit.exit_layer}",
            "",
            *[f"**{line[:1].upper()}{line[1:]}.**\n" for line in audit.cautions],
            table.markdown(),
            "",
            f"Run `{audit.run}`, finished {audit.finished}, of the whole model cut short at this exit. Rates "
            "with Wilson intervals, means with the bootstrap clustered by sample; what a judge could not read is "
            f"unscored and counted.{before}{early}",
            "",
            *[
                f"- {_title(audit, metric)}: {meaning_of(BY_NAME[metric], _proxy(audit, metric))}"
                for metric in audit.metrics
            ],
            "",
            f"Data, {audit.data.samples} samples (hash `{audit.data.hash[:16]}`):",
            "",
            *suites,
            "",
            "Judges; the first that measures a metric reports it:",
            "",
            *judges,
            "",
            f"Answers: {how}, at most {decoding.max_new_tokens} tokens. Versions: "
            f"{', '.join(f'{name} {number}' for name, number in audit.versions.items())}.",
        ]
    )


def _proxy(audit: Audited, metric: str, *, judge: str | None = None) -> Mapping[str, str]:
    """What the judge that reports a metric, or this one, counts instead; empty if it reads answers."""
    measure = BY_NAME[metric].measure
    speakers = [each for each in audit.judges if measure in each.measures and judge in (None, each.name)]
    return speakers[0].proxy if speakers and measure in speakers[0].proxy else NO_PROXY


def _title(audit: Audited, metric: str) -> str:
    return title_of(BY_NAME[metric], _proxy(audit, metric))


def _cells(metric: str, here: Estimate, *elsewhere: Estimate | None) -> tuple[str, ...]:
    """What was measured at this exit, on how many answers, and in the whole model."""
    return brief_estimate(metric, here), f"{here.n:,}", *(brief_estimate(metric, found) for found in elsewhere)


def _suite(suite: AuditedSuite) -> str:
    hub = f", `{suite.hub.id}` at revision `{suite.hub.revision or 'unknown'}`" if suite.hub else ""
    return f"{suite.name}: {suite.samples}{hub}"


def _judge(judge: AuditedJudge) -> str:
    at = f" at `{judge.revision}`" if judge.revision else ""
    return f"{judge.name} ({', '.join(judge.measures)})" + (f", {judge.model}{at}" if judge.model else "")


def _limits(exported: Exported) -> str:
    audit = exported.audit
    lines = [
        "- No result of the whole model or of another exit applies here.",
        "- A changed model is another model: quantised, fine-tuned further or in another precision, it may answer "
        "differently; `exitsafe verify` says how often.",
    ]
    if audit is not None:
        lines[0:0] = [
            "- The numbers hold for the prompts, judges and decoding named above. Other requests, languages and "
            "attacks were not tried; judges err; a low rate does not prove that the model is safe.",
        ]
        if audit.decoding.temperature == 0:
            lines.insert(1, "- Answers were greedy: sampling may bring out what greedy answers do not.")
    return "## Limits\n\n" + "\n".join(lines)


def _sizes(exported: Exported) -> str:
    before, after = exported.sizes["before"], exported.sizes["after"]
    largest = exported.check["largest_difference"]
    differ = f"differ from the whole model's by at most {largest:.2g}" if largest else "are the whole model's"
    return (
        f"{exported.date[:10]}, exitsafe {exported.exitsafe}. Parameters {before['parameters']:,} before, "
        f"{after['parameters']:,} after; {exported.dtype}. On a synthetic picture the logits at this exit {differ}. "
        "`exitsafe.json` holds the hashes of what it was made from and of every file."
    )
