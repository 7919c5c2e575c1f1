"""The whole audit: samples x exit layers are answered, judged and saved, until the run is complete.

Whatever is saved is never done again: a killed audit goes on where it stopped and ends with the same result, and
several processes share one run. Knows nothing about how a model answers or a judge decides.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from exitsafe.auditing.audited import open_audited
from exitsafe.auditing.judging import judge_in_turn, judge_rows, judge_settings, unload, warn_of_own_reward
from exitsafe.auditing.sharing import finish, gather, open_run, share
from exitsafe.auditing.ticker import Ticker
from exitsafe.engine.answering import Answering, Task
from exitsafe.engine.black_box import BlackBox
from exitsafe.engine.vllm_server import VLLMServer
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError, RunError
from exitsafe.exits.layers import ExitLayers
from exitsafe.judges import Judge, choose_judges, is_known, load_judges
from exitsafe.judges.asking import check_judges, tell_unscored
from exitsafe.judges.protocol import proxy_of
from exitsafe.judges.registry import replaced_by
from exitsafe.machine.processes import this_process
from exitsafe.records import Progress, Response, Sample
from exitsafe.results.run import AuditRun, load_run, trained_on_line
from exitsafe.results.stopping import blocks_of, settle
from exitsafe.specs.verbs import JudgePass, StopRule
from exitsafe.store.directory import RunDirectory, check_folder
from exitsafe.store.fingerprint import data_fingerprint, sample_info, trained_on_among
from exitsafe.store.reading import judges_of
from exitsafe.untrusted import JsonObject
from exitsafe.version import __version__

ROWS_SAVED_AT_ONCE = 16


def audit(
    vlm: VLM | str | Path,
    samples: Sequence[Sample],
    *,
    judges: Sequence[Judge | str] | None = None,
    exit_layers: ExitLayers = "all",
    out: str | Path,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int | None = None,
    skip_global: bool = False,
    engine: str | VLLMServer | None = None,
    judge_pass: JudgePass = "beside",
    stop_when: StopRule | None = None,
    progress: Progress | None = None,
    origin: JsonObject | None = None,
) -> AuditRun:
    """Measure a model at every exit layer.

    Under `accelerate launch` the processes share the work; each returns the whole run.

    Args:
        vlm: The model, its name as for `load_vlm`, or the URL of a served model, which is asked as it is.
        samples: What to ask, with unique ids.
        judges: Who scores the answers, as judges or by name; the first that has a measure speaks for it. Default:
            the world's rule for an organism's suites, else `qwen3guard`. `vqa` and `coherence` cost nothing and are
            always added, and a run that is resumed keeps its judges. A run may be given further judges later.
        exit_layers: "all", "default", layers, or text with ranges such as "1-8,16". A served model has one: the exit
            that it is claimed to run, or 0, "as served".
        out: The run directory: new, empty, or an unfinished run with the same settings, which goes on.
        max_new_tokens: Longest answer, in tokens. None is 256, or what the longest prompt leaves of the context; an
            organism's answers are short, and None is 24.
        temperature: 0 is greedy.
        seed: With sample id and exit layer, the key of every draw.
        batch_size: Rows under generation at a time; None takes what fits in memory. Halved when memory runs out. It
            changes no draw; in reduced precision rounding depends on it and may flip a token. With an engine, requests
            in flight.
        skip_global: Llama 3.2 Vision only: skip the global blocks as well.
        engine: The URL of a vLLM server that answers from the features computed here (docs/engines.md), with "#NAME"
            for one of its models; or the server itself. A model given by name is then loaded with `offload_decoder`.
        judge_pass: "beside" judges answers as they come; "second" first answers everything, then moves the model
            out of the GPU and judges.
        stop_when: Stop asking harmful samples at a layer once its rate is settled to be below or above a limit.
        progress: Called with rows answered, rows in all, and a note with the running ASR by exit.
        origin: A JSON object that is kept in run.json and not compared, e.g. which suites the samples are from.

    Returns:
        The finished run.

    Raises:
        InputError: On a setting that makes no sense, no samples, or ids that are not unique.
        ExitLayerError: If the encoder has no such block.
        ModelError: If a judge's model is not available, or the engine serves another model.
        RunError: If `out` holds something else or a run with other settings, the disk refuses, memory does not
            suffice for one row, or a judge or the engine fails.
    """
    samples = _check_samples(samples)
    if judge_pass not in get_args(JudgePass):
        raise InputError(f"judge_pass={judge_pass!r} is unknown; choose {' or '.join(get_args(JudgePass))}")
    audited = open_audited(
        vlm,
        samples,
        exit_layers=exit_layers,
        out=out,
        max_new_tokens=max_new_tokens,
        temperature=float(temperature),
        seed=seed,
        batch_size=batch_size,
        skip_global=skip_global,
        engine=engine,
    )
    layers, answering = audited.exit_layers, audited.answering
    check_folder(out)
    chosen = choose_judges(_judges_there(out) if judges is None else judges, samples)
    asr_judge = next((each.name for each in chosen if "asr" in each.measures), None)
    counted = next((proxy_of(each).get("asr") for each in chosen if each.name == asr_judge), None)
    rate = "ASR" if counted is None else f"{counted} (proxy)"
    if stop_when is not None and (asr_judge is None or judge_pass == "second"):
        raise InputError("stop_when needs verdicts on attack success as answers come: a judge that gives them, beside")
    infos = [sample_info(sample) for sample in samples]
    trained_on = trained_on_among(samples, audited.trained_on)
    if trained_on is not None and trained_on["samples"] and this_process().is_main_process:
        warnings.warn(trained_on_line(trained_on["samples"], trained_on["of"]), stacklevel=2)
    if this_process().is_main_process:
        warn_of_own_reward(audited.adapter, chosen)
    replaced = replaced_by(chosen)
    origin = {**(origin or {}), **({"replaced_judges": replaced} if replaced else {})}
    settings = {
        **audited.settings,
        "data": data_fingerprint(infos),
        **({} if trained_on is None else {"trained_on": trained_on}),
        "exit_layers": list(layers),
        "skip_global": skip_global,
        "decoding": answering.decoding,
        "batch_size": "auto" if batch_size is None else batch_size,
        "stop_when": None if stop_when is None else stop_when.model_dump(),
        "judges": [judge_settings(judge) for judge in chosen],
        "versions": {"exitsafe": __version__, **audited.versions},
    }
    process = this_process()
    with open_run(out, settings, origin, process) as run:
        if not run.is_finished:
            num_rows = len(samples) * len(layers)
            steps = 1 + (len(chosen) if judge_pass == "second" else 0)  # a row is answered, and judged by each
            ticker = Ticker(
                progress, total=num_rows * steps, asr_judge=asr_judge, rate=rate, num_processes=process.num_processes
            )
            ticker.done = _num_done(run, chosen if judge_pass == "second" else ())
            ticker.hear(run.saved.verdicts)
            ticker.tick()
            blocks = blocks_of(samples, stop_when, seed=seed)
            for number, block in enumerate(blocks):
                decisions = settle(run.saved.verdicts, blocks[:number], layers, stop_when, judge=asr_judge)
                open_layers = [layer for layer in layers if decisions[layer] is None]
                tasks = share(_unfinished(run, block, open_layers, chosen), process)
                for chunk in answering.chunks(tasks):
                    _answer(answering, chunk, run, ticker=ticker)
                    if judge_pass == "beside":
                        judge_rows(run, _rows(chunk), chosen, ticker=ticker)
                        ticker.tick()
                if stop_when is not None:  # the next block's layers hang on what all processes found
                    gather(run, process)
            if judge_pass == "second":
                gather(run, process)
                with audited.offloaded():
                    rows = _rows(share(_answered(run, samples, layers), process))
                    judge_in_turn(run, rows, chosen, ticker=ticker)
            unload(chosen)
            gather(run, process)
            ticker.complete(_num_done(run, chosen if judge_pass == "second" else ()))
            finish(run, infos, process)
    return _with_warnings(load_run(out))


def judge(
    run: AuditRun | str | Path,
    samples: Sequence[Sample],
    *,
    judges: Sequence[Judge | str],
    retry_unscored: bool = False,
    progress: Progress | None = None,
    origin: JsonObject | None = None,
) -> AuditRun:
    """Let further judges score a finished run's answers; no answer is generated again.

    The run's own judges keep speaking for their measures; the new ones' results stand under `judges` in the summary.

    Args:
        run: A finished run or its directory.
        samples: What it asked, in the same order.
        judges: The new judges, or names. Those that the run has already, with the same settings, are done.
        retry_unscored: Ask these judges again about answers that they could not score, e.g. while an endpoint was down.
        progress: Called with rows judged, rows in all, and a note.
        origin: Entries to put over those of the run's own in run.json, e.g. where the judges were reached.

    Raises:
        RunError: If the samples are not those of the run, it has such a judge with other settings, or a judge fails;
            what it has judged is kept.
        InputError, ModelError: If there is no such judge, or its model cannot be had.
    """
    run = run if isinstance(run, AuditRun) else load_run(run)
    infos = [sample_info(sample) for sample in samples]
    if data_fingerprint(infos)["hash"] != run.settings["data"]["hash"]:
        raise RunError(f"{run.path} asked other samples than these; give those it asked, in the same order")
    chosen = [load_judges([each])[0] if isinstance(each, str) else each for each in judges]
    check_judges(chosen)
    own = {name for name, _ in run.judges}
    given = {each.name: judge_settings(each) for each in chosen}
    kept = [given.pop(each["name"], each) for each in run.settings["judges"]]  # the same ones, or they are refused
    settings = {**run.settings, "judges": [*kept, *given.values()]}
    process = this_process()
    retried = {each.name for each in chosen if each.name in own} if retry_unscored else set()
    with open_run(run.path, settings, origin, process, retried=retried) as directory:
        if not directory.is_finished:
            fresh = [each for each in chosen if each.name in retried or each.name not in own]
            tasks = _answered(directory, samples, run.exit_layers)
            total = len(_rows(tasks)) * len(fresh)
            ticker = Ticker(progress, total=total, asr_judge=None, num_processes=process.num_processes)
            ticker.done = sum(len(directory.saved.judged.get(each.name, ())) for each in fresh)
            ticker.tick()
            judge_in_turn(directory, _rows(share(tasks, process)), fresh, ticker=ticker)
            gather(directory, process)
            finish(directory, infos, process)
    return _with_warnings(load_run(run.path))


def _with_warnings(run: AuditRun) -> AuditRun:
    """The run, after saying which judges left answers without a score, and why."""
    for line in tell_unscored(run.verdicts()):
        warnings.warn(
            f"{run.path}: {line}; no rate includes them (to ask again: exitsafe judge RUN --judge NAME "
            "--retry-unscored)",
            RuntimeWarning,
            stacklevel=3,
        )
    return run


def _judges_there(out: str | Path) -> list[str] | None:
    """The judges of a run that is resumed, which the defaults of today must not change; None for a new run."""
    if not (Path(out) / "run.json").is_file():
        return None
    # a custom judge has to be given again
    return [name for name in judges_of(out) if is_known(name)] or None


def _num_done(run: RunDirectory, judges: Sequence[Judge]) -> int:
    """Rows answered, and rows judged by each of these."""
    return len(run.saved.responses) + sum(len(run.saved.judged.get(each.name, ())) for each in judges)


def _unfinished(
    run: RunDirectory, samples: Sequence[Sample], layers: Sequence[int], judges: Sequence[Judge]
) -> list[Task]:
    """Samples with the layers at which an answer or a verdict is missing."""
    done = [run.saved.responses.keys(), *(run.saved.judged.get(judge.name, set()) for judge in judges)]
    missing = {
        sample.id: tuple(layer for layer in layers if not all((sample.id, layer) in rows for rows in done))
        for sample in samples
    }
    return [Task(sample=sample, exit_layers=missing[sample.id]) for sample in samples if missing[sample.id]]


def _answered(run: RunDirectory, samples: Sequence[Sample], layers: Sequence[int]) -> list[Task]:
    """Samples with the layers at which there is an answer."""
    found = {sample.id: tuple(x for x in layers if (sample.id, x) in run.saved.responses) for sample in samples}
    return [Task(sample=sample, exit_layers=found[sample.id]) for sample in samples if found[sample.id]]


def _rows(tasks: Sequence[Task]) -> list[tuple[Sample, int]]:
    return [(task.sample, layer) for task in tasks for layer in task.exit_layers]


def _answer(answering: Answering | BlackBox, tasks: Sequence[Task], run: RunDirectory, *, ticker: Ticker) -> None:
    """Answer what has no answer and save it as it finishes; an interrupt loses none that is finished."""
    missing = [
        (task, [x for x in task.exit_layers if (task.sample.id, x) not in run.saved.responses]) for task in tasks
    ]
    finished: list[Response] = []
    try:
        for response in answering.answer(
            [Task(sample=task.sample, exit_layers=tuple(layers)) for task, layers in missing if layers]
        ):
            finished.append(response)
            if len(finished) >= ROWS_SAVED_AT_ONCE:
                run.save_responses(finished)
                ticker.tick(len(finished))
                finished = []
    finally:
        run.save_responses(finished)
    ticker.tick(len(finished))


def _check_samples(samples: Sequence[Sample]) -> list[Sample]:
    if not samples:
        raise InputError("no samples to audit; give at least one")
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise InputError(f"sample id {sample.id!r} comes twice; ids must be unique within a run")
        seen.add(sample.id)
    return list(samples)
