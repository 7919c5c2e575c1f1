"""Image features of samples at exit layers. Encoder and projector are frozen, so each is computed once.

If the features of all samples at all trained exits fit in memory, they are computed once for the whole run; otherwise
once per step, for that step's samples at that step's exits, with equal results up to rounding. Either way, batches
depend only on the samples and the schedule, never on what happens to be cached, so a resumed run gets the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from exitsafe.engine.prompts import Prompt, Row
from exitsafe.engine.vlm import VLM
from exitsafe.exits.features import Features
from exitsafe.lppo.batch_sizes import ENCODER_BATCH, NO_PICTURE
from exitsafe.machine.memory import BatchSize
from exitsafe.records import Sample

HOST = torch.device("cpu")


class FeatureStore:
    """Samples at exit layers as rows for the language model.

    Args:
        vlm: Whose encoder runs.
        samples: All samples of the run.
        exit_layers: All exits that may be requested.
        max_bytes: Host memory for the features of all samples at all exits.
        batch_size: Samples in an encoder pass; halved when memory runs out.
    """

    def __init__(
        self,
        vlm: VLM,
        samples: Sequence[Sample],
        exit_layers: Sequence[int],
        *,
        max_bytes: float,
        batch_size: BatchSize | None = None,
    ) -> None:
        self._vlm = vlm
        self._samples = samples
        self._index_of = {sample.id: index for index, sample in enumerate(samples)}
        self._batch_size = batch_size or BatchSize(ENCODER_BATCH, problem=NO_PICTURE)
        self._kept: list[dict[int, Row]] | None = None
        if max_bytes > 0:  # otherwise pictures would be encoded at all exits for nothing
            self._kept = self._all_rows(exit_layers, max_bytes)

    def rows(
        self, indices: Sequence[int], exit_layers: Sequence[int], *, places: Sequence[int] | None = None
    ) -> list[Row]:
        """One row per place: sample `indices[i]` at `exit_layers[i]`, in order; equal places share one row.

        Args:
            places: Places that need features now; None for all.
        """
        wanted = list(zip(indices, exit_layers, strict=True))
        prompts = {index: self._prompt(index) for index in dict.fromkeys(indices)}
        bare = {
            (index, layer): Row(prompt=prompts[index], exit_layer=layer, features=None)
            for index, layer in dict.fromkeys(wanted)
        }
        return self.fill([bare[place] for place in wanted], range(len(wanted)) if places is None else places)

    def fill(self, rows: Sequence[Row], places: Sequence[int]) -> list[Row]:
        """Rows of this store, completed with features at `places` and in all rows equal to these."""
        bare: dict[tuple[str, int], Row] = {}
        for place in places:
            row = rows[place]
            if row.features is None and row.prompt.image_inputs:
                bare[_key(row)] = row
        found = self._computed(bare) if self._kept is None else {key: self._read(row) for key, row in bare.items()}
        return [found.get(_key(row), row) for row in rows]

    def _prompt(self, index: int) -> Prompt:
        if self._kept is not None:
            return next(iter(self._kept[index].values())).prompt
        return self._vlm.encode_prompt(self._samples[index])

    def _read(self, row: Row) -> Row:
        assert self._kept is not None
        kept = self._kept[self._index_of[row.prompt.sample_id]][row.exit_layer]
        return replace(row, features=_moved(kept.features, self._vlm.device))

    def _computed(self, bare: Mapping[tuple[str, int], Row]) -> dict[tuple[str, int], Row]:
        found: dict[tuple[str, int], Row] = {}
        for layer in sorted({row.exit_layer for row in bare.values()}):
            asked = [row for row in bare.values() if row.exit_layer == layer]
            features = self._vlm.prompt_features([row.prompt for row in asked], (layer,), batch_size=self._batch_size)
            found |= {_key(row): replace(row, features=kept[layer]) for row, kept in zip(asked, features, strict=True)}
        return found

    def _all_rows(self, exit_layers: Sequence[int], max_bytes: float) -> list[dict[int, Row]] | None:
        """Rows of every sample, by exit layer, with their features in host memory; None if they take more than
        `max_bytes`, which is known only after encoding because pictures differ in size."""
        kept: list[dict[int, Row]] = []
        size = 0
        for start in range(0, len(self._samples), ENCODER_BATCH):
            batch = self._encode(self._samples[start : start + ENCODER_BATCH], exit_layers)
            size += sum(_size(rows) for rows in batch)
            if size > max_bytes:
                return None
            kept += [
                {layer: replace(row, features=_moved(row.features, HOST)) for layer, row in rows.items()}
                for rows in batch
            ]
        return kept

    def _encode(self, samples: Sequence[Sample], exit_layers: Sequence[int]) -> list[dict[int, Row]]:
        prompts = [self._vlm.encode_prompt(sample) for sample in samples]
        features = self._vlm.prompt_features(prompts, exit_layers, batch_size=self._batch_size)
        return [
            {layer: Row(prompt=prompt, exit_layer=layer, features=kept) for layer, kept in found.items()}
            for prompt, found in zip(prompts, features, strict=True)
        ]


def _size(rows: Mapping[int, Row]) -> int:
    """Bytes of a sample's pixels, which its rows share, and of its features at all exits."""
    inputs = next(iter(rows.values())).prompt.image_inputs
    features = [tensor for row in rows.values() for tensor in row.features or ()]
    return sum(tensor.nbytes for tensor in (*inputs.values(), *features))


def _key(row: Row) -> tuple[str, int]:
    """A row's sample and exit."""
    return row.prompt.sample_id, row.exit_layer


def _moved(features: Features | None, device: torch.device) -> Features | None:
    return None if features is None else tuple(tensor.to(device) for tensor in features)
