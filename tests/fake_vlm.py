"""A made-up model that answers by rule, and audits of it: no weights, every effect visible."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

import exitsafe
from exitsafe.engine.generation import Completion
from exitsafe.engine.prompts import Prompt, Row
from exitsafe.engine.read_ahead import ReadAhead
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError
from exitsafe.exits.encoder import Encoder
from exitsafe.machine.memory import BatchSize, as_batch_size
from exitsafe.records import KINDS, Response, Sample

PHRASES = ("I cannot help.", "red", "mix moss with foam", "", "blue blue blue blue blue blue")
SAMPLES = [
    Sample(
        id=f"s{number}", prompt="how " * (1 + number % 5), kind=KINDS[number % 4], answers=("red",), source="made up"
    )
    for number in range(12)
]
ENCODER = Encoder(modality="image", path="blocks", num_layers=6, default_exit=5)
NUM_ROWS = len(SAMPLES) * 6


@dataclass(kw_only=True, eq=False)
class FakeVLM:
    """Answers by sample id and exit layer alone, finishing in an order that depends on the batch."""

    name: str = "fake"
    family: str = "llava"
    num_layers: int = 6
    default_exit: int = 5
    encoder: Encoder = ENCODER
    checkpoint_hash: str | None = "c0ffee"
    adapter_hash: str | None = None
    translators: None = None
    adapter: None = None
    trained_on: frozenset[str] = frozenset()
    num_completed: int = 0
    num_encoded: int = 0
    fails_after: int | None = None
    batch_sizes: list[int] = field(default_factory=list)
    is_away: bool = False
    dtype: torch.dtype = torch.float32
    config: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    processor: Any = None
    memory: int = 1000

    @property
    def base_model(self) -> SimpleNamespace:
        config = SimpleNamespace(sub_configs={}, _attn_implementation=self.attention, **self.config)
        return SimpleNamespace(dtype=self.dtype, config=config)

    today: str = "2026-01-31"

    def read_ahead(self, samples: Sequence[Sample], *, max_new_tokens: int | None) -> ReadAhead:
        return ReadAhead(
            hash="abc", today=None, max_new_tokens=256 if max_new_tokens is None else max_new_tokens, num_tokens=8
        )

    def rows_that_fit(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> int:
        return 4

    @contextmanager
    def offloaded(self) -> Iterator[None]:
        self.is_away = True
        yield
        self.is_away = False

    @contextmanager
    def exit_at(self, exit_layer: int, *, skip_global: bool = False) -> Iterator[None]:
        if skip_global:
            raise InputError("skip_global: llava has no global blocks; leave it out")
        yield

    def encode_prompt(self, sample: Sample) -> Prompt:
        self.num_encoded += 1
        return Prompt(sample_id=sample.id, input_ids=torch.zeros(len(sample.prompt)))

    def prompt_features(
        self, prompts: Sequence[Prompt], exit_layers: Sequence[int], *, skip_global: bool
    ) -> list[dict[int, Any]]:
        return [{layer: (torch.zeros(4),) for layer in exit_layers} for _ in prompts]

    def complete(
        self, rows: Sequence[Row], *, max_new_tokens: int, temperature: float, seed: int, batch_size: int | BatchSize
    ) -> Iterator[tuple[int, Completion]]:
        if max_new_tokens < 1:
            raise InputError("max_new_tokens=0: choose 1 or more")
        left = list(range(len(rows)))
        return as_batch_size(batch_size, problem="no memory").halving(lambda size: self._complete(left, size))

    def _complete(self, left: list[int], batch_size: int) -> Iterator[tuple[int, Completion]]:
        self.batch_sizes.append(batch_size)
        for number, place in enumerate(sorted(left, key=lambda place: (place * 7) % 5)):
            if self.num_completed == self.fails_after:
                raise KeyboardInterrupt
            if batch_size > self.memory and number == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            self.num_completed += 1
            left.remove(place)
            seconds = 0.001 * self.num_completed
            yield place, Completion(token_ids=(1,) * (1 + place % 2), finish_reason="stop", seconds=seconds)

    def response(self, row: Row, completion: Completion) -> Response:
        key = f"{row.prompt.sample_id} {row.exit_layer}".encode()
        return Response(
            sample_id=row.prompt.sample_id,
            exit_layer=row.exit_layer,
            text=PHRASES[zlib.crc32(key) % len(PHRASES)],
            num_tokens=zlib.crc32(key) % 7,
            finish_reason=completion.finish_reason,
            seconds=completion.seconds,
        )


def audit_fake(out: Path, vlm: FakeVLM | None = None, **options: Any) -> exitsafe.AuditRun:
    given: dict[str, Any] = {"samples": SAMPLES, "batch_size": 4} | options
    return exitsafe.audit(cast(VLM, vlm or FakeVLM()), out=out, **given)


def content(out: Path) -> dict[str, Any]:
    """What two equal runs share: everything but times."""
    summary = json.loads((out / "summary.json").read_text())
    for part in (*summary["layers"], *summary["bins"].values()):
        part["metrics"].pop("seconds")
    return {
        "summary": json.dumps(summary),
        "verdicts": (out / "verdicts.parquet").read_bytes(),
        "responses": [replace(response, seconds=0.0) for response in exitsafe.load_run(out).responses()],
        "files": sorted(path.name for path in out.iterdir()),
    }
