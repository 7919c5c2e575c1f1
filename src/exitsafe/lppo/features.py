"""Image features of samples at exit layers, computed once: encoder and projector never change in training.

If the features of all samples at all trained exits fit in memory, or else in the room allowed on disk, they are
computed once for the whole run, the same bits in both places; otherwise once per step, for that step's samples at
that step's exits, equal to rounding. Either way what is computed together depends on the samples and the schedule
alone, never on what happens to be cached, so that a resumed run sees the same bits. Knows nothing about rewards or
training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from exitsafe.lppo.tensor_file import TensorFile
from exitsafe.records import Sample
from exitsafe.vlm import VLM, Features, Row
from exitsafe.vlm.prompts import Prompt

ENCODER_BATCH = 16  # fixed: rounding may depend on what runs side by side
HOST = torch.device("cpu")


class FeatureStore:
    """Samples, as rows that the language model can read.

    Args:
        vlm: Whose encoder runs.
        samples: All samples of the run.
        exit_layers: All exits that may be asked for.
        max_bytes: Host memory for keeping the features of everything.
        max_disk_bytes: Room in `folder` for the same, where memory does not suffice.
        folder: For a file that is gone when the store is.

    Raises:
        RunError: If the disk is full.
    """

    def __init__(
        self,
        vlm: VLM,
        samples: Sequence[Sample],
        exit_layers: Sequence[int],
        *,
        max_bytes: float,
        max_disk_bytes: float = 0.0,
        folder: Path | None = None,
    ) -> None:
        self._vlm = vlm
        self._samples = samples
        self._index_of = {sample.id: index for index, sample in enumerate(samples)}
        self._kept: list[dict[int, Row]] | None = None
        if max_bytes > 0:  # else no picture is encoded at all exits for nothing
            self._kept = self._all_rows(exit_layers, max_bytes)
        if self._kept is None and folder is not None and max_disk_bytes > 0:
            self._kept = self._all_rows(exit_layers, max_disk_bytes, TensorFile(folder))

    def rows(
        self, indices: Sequence[int], exit_layers: Sequence[int], *, places: Sequence[int] | None = None
    ) -> list[Row]:
        """One row per place: sample `indices[i]` at `exit_layers[i]`, in order; places that ask the same share one.

        Args:
            places: Those whose features are wanted now; None for all.
        """
        wanted = list(zip(indices, exit_layers, strict=True))
        prompts = {index: self._prompt(index) for index in dict.fromkeys(indices)}
        bare = {
            (index, layer): Row(prompt=prompts[index], exit_layer=layer, features=None)
            for index, layer in dict.fromkeys(wanted)
        }
        return self.fill([bare[place] for place in wanted], range(len(wanted)) if places is None else places)

    def fill(self, rows: Sequence[Row], places: Sequence[int]) -> list[Row]:
        """The rows of this store again, with the features of those at `places`, and of all that ask the same."""
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
            features = self._vlm.prompt_features([row.prompt for row in asked], (layer,), batch_size=ENCODER_BATCH)
            found |= {_key(row): replace(row, features=kept[layer]) for row, kept in zip(asked, features, strict=True)}
        return found

    def _all_rows(
        self, exit_layers: Sequence[int], max_bytes: float, file: TensorFile | None = None
    ) -> list[dict[int, Row]] | None:
        """Rows of every sample, by exit layer, with their features in the host's memory or in a file; None if they
        take more than `max_bytes`: pictures differ in size, so this shows when it has come to that."""
        kept: list[dict[int, Row]] = []
        size = 0
        for start in range(0, len(self._samples), ENCODER_BATCH):
            batch = self._encode(self._samples[start : start + ENCODER_BATCH], exit_layers)
            size += sum(_size(rows) for rows in batch)
            if size > max_bytes:
                return None
            kept += _in_memory(batch) if file is None else _in_file(batch, file)
        return kept

    def _encode(self, samples: Sequence[Sample], exit_layers: Sequence[int]) -> list[dict[int, Row]]:
        prompts = [self._vlm.encode_prompt(sample) for sample in samples]
        features = self._vlm.prompt_features(prompts, exit_layers, batch_size=ENCODER_BATCH)
        return [
            {layer: Row(prompt=prompt, exit_layer=layer, features=kept) for layer, kept in found.items()}
            for prompt, found in zip(prompts, features, strict=True)
        ]


def _size(rows: Mapping[int, Row]) -> int:
    """Bytes of a sample's pixels, which its rows share, and of its features at all exits."""
    inputs = next(iter(rows.values())).prompt.image_inputs
    features = [tensor for row in rows.values() for tensor in row.features or ()]
    return sum(tensor.nbytes for tensor in (*inputs.values(), *features))


def _in_memory(batch: Sequence[dict[int, Row]]) -> list[dict[int, Row]]:
    return [{layer: replace(row, features=_moved(row.features, HOST)) for layer, row in rows.items()} for rows in batch]


def _in_file(batch: Sequence[dict[int, Row]], file: TensorFile) -> list[dict[int, Row]]:
    """The rows with all that is large about them in a file: features, and the prompts' pixels."""
    prompts = [next(iter(rows.values())).prompt for rows in batch]
    pixels = iter(file.keep([tensor for prompt in prompts for tensor in prompt.image_inputs.values()]))
    features = iter(file.keep([tensor for rows in batch for row in rows.values() for tensor in row.features or ()]))
    kept = []
    for prompt, rows in zip(prompts, batch, strict=True):
        light = replace(prompt, image_inputs={name: next(pixels) for name in prompt.image_inputs})
        kept.append(
            {
                layer: replace(row, prompt=light, features=row.features and tuple(next(features) for _ in row.features))
                for layer, row in rows.items()
            }
        )
    return kept


def _key(row: Row) -> tuple[str, int]:
    """What a row asks: which sample at which exit."""
    return row.prompt.sample_id, row.exit_layer


def _moved(features: Features | None, device: torch.device) -> Features | None:
    return None if features is None else tuple(tensor.to(device) for tensor in features)
