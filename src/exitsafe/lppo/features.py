"""Image features of samples at exit layers, computed once: encoder and projector never change in training.

If the features of all samples at all trained exits fit in memory, they are computed once for the whole run;
otherwise once per step, for that step's samples at that step's exits. Either way what is computed together
depends on the samples and the schedule alone, never on what happens to be cached, so that a resumed run sees the
same bits. Knows nothing about rewards or training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from exitsafe.records import Sample
from exitsafe.vlm import VLM, Features, Row

ENCODER_BATCH = 16  # fixed: rounding may depend on what runs side by side
HOST = torch.device("cpu")


class FeatureStore:
    """Samples, as rows that the language model can read.

    Args:
        vlm: Whose encoder runs.
        samples: All samples of the run.
        exit_layers: All exits that may be asked for.
        max_bytes: Host memory for keeping the features of everything.
    """

    def __init__(self, vlm: VLM, samples: Sequence[Sample], exit_layers: Sequence[int], *, max_bytes: float) -> None:
        self._vlm = vlm
        self._samples = samples
        self._kept: list[dict[int, Row]] | None = None
        if self._size_of_all(exit_layers) <= max_bytes:
            self._kept = self._all_rows(exit_layers)

    def rows(self, indices: Sequence[int], exit_layers: Sequence[int]) -> list[Row]:
        """One row per place: sample `indices[i]` at `exit_layers[i]`, in order."""
        if self._kept is not None:
            kept = [self._kept[i][exit_layer] for i, exit_layer in zip(indices, exit_layers, strict=True)]
            return [replace(row, features=_moved(row.features, self._vlm.device)) for row in kept]
        rows: dict[int, Row] = {}
        for exit_layer in sorted(set(exit_layers)):
            places = [place for place, layer in enumerate(exit_layers) if layer == exit_layer]
            found = self._encode([self._samples[indices[place]] for place in places], (exit_layer,))
            rows |= {place: by_layer[exit_layer] for place, by_layer in zip(places, found, strict=True)}
        return [rows[place] for place in range(len(indices))]

    def _all_rows(self, exit_layers: Sequence[int]) -> list[dict[int, Row]]:
        """Rows of every sample, by exit layer, with their features in the host's memory."""
        rows = []
        for start in range(0, len(self._samples), ENCODER_BATCH):
            for found in self._encode(self._samples[start : start + ENCODER_BATCH], exit_layers):
                rows.append({layer: replace(row, features=_moved(row.features, HOST)) for layer, row in found.items()})
        return rows

    def _encode(self, samples: Sequence[Sample], exit_layers: Sequence[int]) -> list[dict[int, Row]]:
        prompts = [self._vlm.encode_prompt(sample) for sample in samples]
        features = self._vlm.prompt_features(prompts, exit_layers, batch_size=ENCODER_BATCH)
        return [
            {layer: Row(prompt=prompt, exit_layer=layer, features=kept) for layer, kept in found.items()}
            for prompt, found in zip(prompts, features, strict=True)
        ]

    def _size_of_all(self, exit_layers: Sequence[int]) -> int:
        """Bytes, judged by the largest of the samples with the most images."""
        probes = sorted(self._samples, key=lambda sample: -len(sample.images))[:ENCODER_BATCH]
        rows = [found[exit_layers[0]] for found in self._encode(probes, exit_layers[:1])]
        largest = max(
            sum(tensor.nbytes for tensor in row.prompt.image_inputs.values())
            + len(exit_layers) * sum(tensor.nbytes for tensor in row.features or ())
            for row in rows
        )
        return largest * len(self._samples)


def _moved(features: Features | None, device: torch.device) -> Features | None:
    return None if features is None else tuple(tensor.to(device) for tensor in features)
