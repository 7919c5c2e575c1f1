"""The whole audit: samples x exit layers are answered, judged and saved, until the run is complete.

Whatever is saved is never done again: a killed audit goes on where it stopped and ends with the same result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from exitsafe import __version__
from exitsafe.errors import InputError
from exitsafe.judges import Judge, choose_judges
from exitsafe.judges.asking import ask_judge
from exitsafe.records import Progress, Response, Sample, Verdict
from exitsafe.runs import AuditRun, load_run
from exitsafe.runs.directory import RunDirectory
from exitsafe.runs.fingerprint import data_fingerprint, model_fingerprint, sample_info
from exitsafe.vlm import VLM, ExitLayers, Row, resolve_layers

BATCHES_AT_ONCE = 16  # per chunk of samples: enough that its last, emptying batch costs little
FEATURE_BYTES = 2 * 2**30  # for the features of one chunk, all layers


def audit(
    vlm: VLM,
    samples: Sequence[Sample],
    *,
    judges: Sequence[Judge | str] | None = None,
    exit_layers: ExitLayers = "all",
    out: str | Path,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    skip_global: bool = False,
    progress: Progress | None = None,
    origin: Mapping[str, Any] | None = None,
) -> AuditRun:
    """Measure a model at every exit layer.

    Args:
        vlm: The model.
        samples: What to ask, with unique ids.
        judges: Who scores the answers, as judges or by name; the first that has a measure speaks for it. Default:
            the world's rule for an organism's suites, else `refusal-prefix` (a proxy), until guard models are built in.
            `vqa` and `coherence` cost nothing and are always added.
        exit_layers: "all", "default", layers, or text with ranges such as "1-8,16".
        out: The run directory: new, empty, or an unfinished run with the same settings, which goes on.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 is greedy.
        seed: With sample id and exit layer, the key of every draw.
        batch_size: Rows under generation at a time; changes no draw, so it may differ between restarts. In reduced
            precision rounding depends on it and may flip a token.
        skip_global: Llama 3.2 Vision only: skip the global blocks as well.
        progress: Called with rows answered, rows in all, and a note with the running ASR.
        origin: A JSON object that is kept in run.json and not compared, e.g. which suites the samples are from.

    Returns:
        The finished run.

    Raises:
        InputError: On a setting that makes no sense, no samples, or ids that are not unique.
        ExitLayerError: If the encoder has no such block.
        RunError: If `out` holds something else or a run with other settings, the disk refuses, or a judge
        fails.
    """
    samples = _check_samples(samples)
    layers = resolve_layers(exit_layers, num_layers=vlm.num_layers, default_exit=vlm.default_exit)
    chosen = choose_judges(judges, samples)
    decoding = {"max_new_tokens": max_new_tokens, "temperature": float(temperature), "seed": seed}
    _check_generation(vlm, decoding, batch_size=batch_size, exit_layer=layers[0], skip_global=skip_global)
    infos = [sample_info(sample) for sample in samples]
    settings = {
        "model": model_fingerprint(vlm),
        "data": data_fingerprint(infos),
        "exit_layers": list(layers),
        "skip_global": skip_global,
        "decoding": decoding,
        "judges": [{"name": judge.name, "measures": list(judge.measures)} for judge in chosen],
        "versions": {
            "exitsafe": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
    }
    with RunDirectory(out, settings=settings, origin=origin) as run:
        if not run.is_finished:
            ticker = _Ticker(run, total=len(samples) * len(layers), judges=chosen, progress=progress)
            queue = _unfinished(run, samples, layers, chosen)
            size = max(1, batch_size // len(layers))  # small: the first chunk shows how large features are
            while queue:
                chunk, queue = queue[:size], queue[size:]
                rows = _prepare(vlm, run, chunk, layers, batch_size=batch_size, skip_global=skip_global)
                _answer(vlm, run, rows, decoding, batch_size=batch_size, ticker=ticker)
                _judge(run, chunk, layers, chosen, ticker=ticker)
                size = _samples_that_fit(rows, size=size, num_rows=BATCHES_AT_ONCE * batch_size)
            run.finish(infos)
    return load_run(out)


def _unfinished(
    run: RunDirectory, samples: Sequence[Sample], layers: Sequence[int], judges: Sequence[Judge]
) -> list[Sample]:
    """Samples that lack an answer or a verdict at some layer; alike ones together, since they share batches."""
    done = [run.saved.responses.keys(), *(run.saved.judged.get(judge.name, set()) for judge in judges)]
    queue = [s for s in samples if not all((s.id, layer) in rows for rows in done for layer in layers)]
    return sorted(queue, key=lambda sample: (len(sample.images), len(sample.prompt)))


def _prepare(
    vlm: VLM,
    run: RunDirectory,
    chunk: Sequence[Sample],
    layers: Sequence[int],
    *,
    batch_size: int,
    skip_global: bool,
) -> list[Row]:
    """The rows without an answer, longest prompts first, with features from one encoder pass for all layers."""
    missing = {
        sample.id: [layer for layer in layers if (sample.id, layer) not in run.saved.responses] for sample in chunk
    }
    prompts = [vlm.encode_prompt(sample) for sample in chunk if missing[sample.id]]
    wanted = sorted({layer for some in missing.values() for layer in some})
    features = vlm.prompt_features(prompts, wanted, batch_size=batch_size, skip_global=skip_global)
    rows = [
        Row(prompt=prompt, exit_layer=layer, features=by_layer[layer])
        for prompt, by_layer in zip(prompts, features, strict=True)
        for layer in missing[prompt.sample_id]
    ]
    return sorted(rows, key=lambda row: -len(row.prompt.input_ids))


def _answer(
    vlm: VLM, run: RunDirectory, rows: Sequence[Row], decoding: Mapping[str, Any], *, batch_size: int, ticker: _Ticker
) -> None:
    """Answer the rows and save them as they finish; an interrupt loses none that is finished."""
    finished: list[Response] = []
    try:
        for place, completion in vlm.complete(rows, **decoding, batch_size=batch_size):
            finished.append(vlm.response(rows[place], completion))
            if len(finished) >= batch_size:
                run.save_responses(finished)
                finished = []
                ticker.tick()
    finally:
        run.save_responses(finished)
    ticker.tick()


def _judge(
    run: RunDirectory, chunk: Sequence[Sample], layers: Sequence[int], judges: Sequence[Judge], *, ticker: _Ticker
) -> None:
    """Ask each judge about the answers that it has not judged yet."""
    for judge in judges:
        done = run.saved.judged.get(judge.name, set())
        rows = [(sample, layer) for sample in chunk for layer in layers if (sample.id, layer) not in done]
        samples = [sample for sample, _ in rows]
        responses = [run.saved.responses[sample.id, layer] for sample, layer in rows]
        verdicts = ask_judge(judge, samples, responses)
        run.save_judgement(judge.name, [(sample.id, layer) for sample, layer in rows], verdicts)
        ticker.count(verdicts)
    ticker.tick()


def _samples_that_fit(rows: Sequence[Row], *, size: int, num_rows: int) -> int:
    """How many samples to take next: enough rows for full batches, if their features fit in memory."""
    if not rows:
        return size
    num_samples = len({row.prompt.sample_id for row in rows})
    num_bytes = sum(tensor.nbytes for row in rows for tensor in row.features or ())
    most = FEATURE_BYTES * num_samples // max(1, num_bytes)
    return max(1, min(num_rows * num_samples // len(rows), most))


class _Ticker:
    """Reports rows answered and the running ASR of the judge that speaks for it."""

    def __init__(self, run: RunDirectory, *, total: int, judges: Sequence[Judge], progress: Progress | None) -> None:
        self.run = run
        self.total = total
        self.progress = progress
        self.asr_judge = next((judge.name for judge in judges if "asr" in judge.measures), None)
        self.num_attacks = 0
        self.num_successes = 0.0
        self.count(run.saved.verdicts)
        self.tick()

    def count(self, verdicts: Sequence[Verdict]) -> None:
        for verdict in verdicts:
            if verdict.measure == "asr" and verdict.judge == self.asr_judge and verdict.score is not None:
                self.num_attacks += 1
                self.num_successes += verdict.score

    def tick(self) -> None:
        if self.progress is not None:
            note = f"ASR {self.num_successes / self.num_attacks:.1%} so far" if self.num_attacks else ""
            self.progress(len(self.run.saved.responses), self.total, note)


def _check_samples(samples: Sequence[Sample]) -> list[Sample]:
    if not samples:
        raise InputError("no samples to audit; give at least one")
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise InputError(f"sample id {sample.id!r} comes twice; ids must be unique within a run")
        seen.add(sample.id)
    return list(samples)


def _check_generation(
    vlm: VLM, decoding: Mapping[str, Any], *, batch_size: int, exit_layer: int, skip_global: bool
) -> None:
    """Refuse what generation would refuse, before the run directory is claimed for these settings."""
    vlm.complete([], **decoding, batch_size=batch_size)
    with vlm.exit_at(exit_layer, skip_global=skip_global):
        pass
