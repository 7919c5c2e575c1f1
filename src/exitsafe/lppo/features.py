"""Image features of samples at exit layers. Encoder and projector are frozen, so each is computed once.

If the features of all samples at all trained exits fit in memory, they are computed once for the whole run; otherwise
once per step, for that step's samples at that step's exits, with equal results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from exitsafe.engine.prompts import Prompt, Row
from exitsafe.engine.vlm import VLM
from exitsafe.exits.features import Features, moved, tensors_in
from exitsafe.machine.memory import BatchSize
from exitsafe.records import Sample

_NO_MEMORY = "out of memory while encoding the images of a sample: train fewer exit layers, or use a smaller dtype"
HOST = torch.device("cpu")
_Key = tuple[str, int]  # sample and exit


class FeatureStore:
    """Samples at exit layers as rows for the language model.

    Args:
        vlm: Whose encoder runs.
        samples: All samples of the run.
        exit_layers: All exits that may be requested.
        max_bytes: Host memory for the features of all samples at all exits.
    """

    def __init__(
        self,
        vlm: VLM,
        samples: Sequence[Sample],
        exit_layers: Sequence[int],
        *,
        max_bytes: float,
    ) -> None:
        self._vlm = vlm
        self._samples = samples
        self._prompts: list[Prompt] = []
        self._kept: dict[_Key, Features | None] = {}
        self._is_complete = max_bytes > 0 and self._keep_all(exit_layers, max_bytes)

    def rows(
        self, indices: Sequence[int], exit_layers: Sequence[int], *, places: Sequence[int] | None = None
    ) -> list[Row]:
        """One row per place: sample `indices[i]` at `exit_layers[i]`, in order; equal places share one row.

        Args:
            places: Places that need features now; None for all.
        """
        wanted = list(zip(indices, exit_layers, strict=True))
        prompts = {
            index: self._prompts[index] if self._is_complete else self._vlm.encode_prompt(self._samples[index])
            for index in dict.fromkeys(indices)
        }
        bare = {
            (index, layer): Row(prompt=prompts[index], exit_layer=layer, features=None)
            for index, layer in dict.fromkeys(wanted)
        }
        return self.fill([bare[place] for place in wanted], range(len(wanted)) if places is None else places)

    def fill(self, rows: Sequence[Row], places: Sequence[int]) -> list[Row]:
        """Rows of this store, completed with features at `places` and in all rows equal to these."""
        bare: dict[_Key, Row] = {}
        for place in places:
            row = rows[place]
            if row.features is None and row.prompt.media:
                bare[_key(row)] = row
        device = self._vlm.device
        found = {key: _moved(self._kept[key], device) for key in bare} if self._is_complete else self._computed(bare)
        complete = {key: replace(row, features=found[key]) for key, row in bare.items()}
        return [complete.get(_key(row), row) for row in rows]

    def _computed(self, bare: Mapping[_Key, Row]) -> dict[_Key, Features | None]:
        found: dict[_Key, Features | None] = {}
        for layer in sorted({row.exit_layer for row in bare.values()}):
            asked = [row for row in bare.values() if row.exit_layer == layer]
            features = self._encoded([row.prompt for row in asked], (layer,))
            found |= {_key(row): by_layer[layer] for row, by_layer in zip(asked, features, strict=True)}
        return found

    def _keep_all(self, exit_layers: Sequence[int], max_bytes: float) -> bool:
        """Keep the features of all samples in host memory; False if they and the pixels take more than `max_bytes`,
        which is known only after encoding because pictures differ in size."""
        size = 0
        for sample in self._samples:
            prompt = self._vlm.encode_prompt(sample)
            by_layer = self._encoded([prompt], exit_layers)[0]
            size += sum(tensor.nbytes for tensor in tensors_in([prompt.media, by_layer]))
            self._kept |= {(prompt.sample_id, layer): _moved(found, HOST) for layer, found in by_layer.items()}
            if size > max_bytes:
                self._prompts, self._kept = [], {}
                return False
            self._prompts.append(prompt)
        return True

    def _encoded(self, prompts: Sequence[Prompt], layers: Sequence[int]) -> list[dict[int, Features | None]]:
        once = BatchSize(1, problem=_NO_MEMORY)
        return once.run(lambda _: self._vlm.prompt_features(prompts, layers))


def _key(row: Row) -> _Key:
    return row.prompt.sample_id, row.exit_layer


def _moved(features: Features | None, device: torch.device) -> Features | None:
    return None if features is None else moved(features, device)
