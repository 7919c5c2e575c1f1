"""Base of the judges that use a sequence classifier: token rows in, a number per row out, and a verdict from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from exitsafe.judges.local_model import NOT_FINITE, JudgeModel, longest_first, pad_rows
from exitsafe.records import Response, Verdict
from exitsafe.untrusted import JsonObject


class Classifier:
    """A judge of one measure that uses a sequence classifier.

    Args:
        name: Name of the judge.
        measure: What it measures.
        model: A Hub id or local folder.
        revision: A branch, tag or commit of the Hub id.
        dtype: "auto" (as saved), or e.g. "bfloat16".
        device: "auto" (this process's GPU, else the CPU), or e.g. "cuda:1".
        batch_size: Rows at a time; halved when memory runs out.
        settings: What decides the verdicts besides the weights.
    """

    def __init__(
        self,
        name: str,
        measure: str,
        *,
        model: str,
        revision: str | None,
        dtype: str,
        device: str,
        batch_size: int,
        settings: Mapping[str, object],
    ) -> None:
        self.name, self.measures, self.batch_size = name, (measure,), batch_size
        self._weights = JudgeModel(
            model, auto_class=AutoModelForSequenceClassification, revision=revision, dtype=dtype, device=device
        )
        self._settings = settings

    @property
    def settings(self) -> JsonObject:
        """What decides the verdicts."""
        return {**self._weights.settings, **self._settings}

    def unload(self) -> None:
        """Free the memory; the next call loads again."""
        self._weights.unload()

    def scores(self, rows: Sequence[list[int]], *, pad_id: int | None, read: Callable[[Tensor], Tensor]) -> list[float]:
        """A score for each row.

        Args:
            rows: Token ids.
            pad_id: The token to pad with; None if the model has none.
            read: Logits (B, labels) -> scores (B,).
        """
        model, _ = self._weights.load()
        config = model.config.get_text_config()
        own_id = config.pad_token_id

        def score(batch: Sequence[list[int]]) -> list[float]:
            # Models that read the last token search for the last one that is not padding and ignore the attention
            # mask: a model without a padding token gets one that no row contains.
            config.pad_token_id = _unused_token(batch) if pad_id is None else pad_id
            input_ids, attention_mask = pad_rows(batch, config.pad_token_id, side="right")
            try:
                with torch.inference_mode():
                    logits = model(
                        input_ids=input_ids.to(model.device), attention_mask=attention_mask.to(model.device)
                    ).logits
            finally:
                config.pad_token_id = own_id
            found: list[float] = read(logits.float()).tolist()
            return found

        return longest_first(score, rows, batch_size=self.batch_size)

    def verdict(self, response: Response, score: float | None, *, label: str = "", unscored: str = "") -> Verdict:
        """A verdict with this score; unscored without one, or if it is NaN or infinite."""
        if score is not None and not math.isfinite(score):
            score, unscored = None, NOT_FINITE
        return Verdict.of(
            response,
            judge=self.name,
            measure=self.measures[0],
            label=label,
            score=score,
            unscored=unscored if score is None else None,
        )


def _unused_token(rows: Sequence[list[int]]) -> int:
    used = set().union(*rows)
    return next(token for token in range(len(used) + 1) if token not in used)
