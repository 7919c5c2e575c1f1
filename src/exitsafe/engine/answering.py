"""Many (sample, exit layers) tasks in, responses out, with as many rows at a time as fit in memory.

Samples are processed in chunks whose features, for all layers, fit in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from exitsafe.engine.generation import Completion
from exitsafe.engine.prompts import Row
from exitsafe.engine.read_ahead import DEFAULT_NEW_TOKENS, ReadAhead
from exitsafe.exits.features import tensors_in
from exitsafe.machine.memory import MOST_ROWS, BatchSize, free_memory
from exitsafe.records import Response, Sample

if TYPE_CHECKING:
    from exitsafe.engine.vllm_server import VLLMServer
    from exitsafe.engine.vlm import VLM

BATCHES_AT_ONCE = 16  # per chunk of samples: enough that its last, partly empty batch costs little
FEATURE_BYTES = 2 * 2**30  # for the features of one chunk, all layers
_FIRST_ROWS = 16  # the first chunk only shows how large features are
_NO_MEMORY = (
    "out of memory while answering a single row; finished answers are saved: rerun with a smaller max_new_tokens, a "
    "smaller dtype, or quantization"
)


class Decoding(TypedDict):
    """Decoding settings, as keyword arguments of `VLM.complete`."""

    max_new_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """A sample to answer at some exit layers."""

    sample: Sample
    exit_layers: tuple[int, ...]


class Answering:
    """Answers tasks with one set of decoding settings.

    Args:
        vlm: The model.
        max_new_tokens, temperature, seed: As in `VLM.generate`; `check` replaces None.
        batch_size: Rows generated at a time; None uses as many as fit. Halved permanently when memory runs out. With a
            server, requests in flight.
        skip_global: As in `VLM.exit_at`.
        engine: A server that answers instead of the model.
    """

    def __init__(
        self,
        vlm: VLM,
        *,
        max_new_tokens: int | None,
        temperature: float,
        seed: int,
        batch_size: int | None = None,
        skip_global: bool = False,
        engine: VLLMServer | None = None,
    ) -> None:
        self.vlm = vlm
        self.engine = engine
        self._wanted = max_new_tokens
        longest = DEFAULT_NEW_TOKENS if max_new_tokens is None else max_new_tokens
        self.decoding: Decoding = {"max_new_tokens": longest, "temperature": temperature, "seed": seed}
        self.skip_global = skip_global
        self.is_auto = batch_size is None
        self.rows = BatchSize(MOST_ROWS if batch_size is None else batch_size, problem=_NO_MEMORY)
        self._num_samples = 0

    def check(self, samples: Sequence[Sample], *, exit_layer: int) -> ReadAhead:
        """Find invalid settings and prompts before the work starts.

        Raises as `VLM.complete`, `VLM.read_ahead` and `VLLMServer.check`.
        """
        self.vlm.complete([], **self.decoding, batch_size=self.rows.most)
        with self.vlm.exit_at(exit_layer, skip_global=self.skip_global):
            pass
        found = self.vlm.read_ahead(samples, max_new_tokens=self._wanted)
        self.decoding["max_new_tokens"] = found.max_new_tokens
        if self.engine is not None:
            self.engine.check(self.vlm, samples, num_tokens=found.num_tokens + found.max_new_tokens)
        return found

    def chunks(self, tasks: Sequence[Task]) -> Iterator[list[Task]]:
        """The tasks in chunks whose features fit in memory; `answer` measures the size for the next chunk."""
        queue = sorted(
            tasks, key=lambda task: (len(task.sample.videos), len(task.sample.images), len(task.sample.prompt))
        )
        if queue and not self._num_samples:
            self._num_samples = max(1, min(_FIRST_ROWS, self.rows.most) // len(queue[0].exit_layers))
        while queue:
            chunk, queue = queue[: self._num_samples], queue[self._num_samples :]
            yield chunk

    def answer(self, tasks: Sequence[Task]) -> Iterator[Response]:
        """Responses in the order of finishing. When memory runs out, only unfinished rows are repeated.

        Raises:
            RunError: If memory runs out with a single row.
        """
        # fewer samples have fewer features: halved separately from the rows generated at a time
        for rows in BatchSize(max(1, len(tasks)), problem=_NO_MEMORY).batches(self._prepare, tasks):
            for place, completion in self._complete(rows, tasks):
                yield self.vlm.response(rows[place], completion)

    def _complete(self, rows: Sequence[Row], tasks: Sequence[Task]) -> Iterator[tuple[int, Completion]]:
        if self.engine is not None:
            samples = {task.sample.id: task.sample for task in tasks}
            return self.engine.complete(self.vlm, rows, samples, **self.decoding, most_at_once=self.rows.size)
        if self.is_auto:
            self.rows.fits = self._rows_that_fit(rows)
        return self.vlm.complete(rows, **self.decoding, batch_size=self.rows)

    def _prepare(self, tasks: Sequence[Task]) -> list[Row]:
        """Rows, longest prompts first, with features for all layers from one encoder pass per prompt."""
        prompts = [self.vlm.encode_prompt(task.sample) for task in tasks]
        wanted = sorted({layer for task in tasks for layer in task.exit_layers})
        features = self.vlm.prompt_features(prompts, wanted, skip_global=self.skip_global)
        rows = [
            Row(prompt=prompt, exit_layer=layer, features=by_layer[layer])
            for task, prompt, by_layer in zip(tasks, prompts, features, strict=True)
            for layer in task.exit_layers
        ]
        self._num_samples = self._samples_that_fit(rows, num_samples=len(tasks))
        return sorted(rows, key=lambda row: -len(row.prompt.input_ids))

    def _rows_that_fit(self, rows: Sequence[Row]) -> int:
        if self.engine is not None:
            return self.rows.most
        prompts = [row.prompt for row in rows]
        return self.vlm.rows_that_fit(prompts, max_new_tokens=self.decoding["max_new_tokens"])

    def _samples_that_fit(self, rows: Sequence[Row], *, num_samples: int) -> int:
        """The size of the next chunk: enough rows for full batches, if their features fit in memory."""
        num_bytes = sum(tensor.nbytes for row in rows for tensor in tensors_in(row.features))
        most = min(FEATURE_BYTES, free_memory(self.vlm.device) // 4) * num_samples // max(1, num_bytes)
        size = min(self.rows.most, self._rows_that_fit(rows)) if self.is_auto else self.rows.most
        return max(1, min(BATCHES_AT_ONCE * size * num_samples // len(rows), most))
