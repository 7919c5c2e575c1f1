"""The lm-eval integration: a loaded VLM at one exit layer as an `LM` for `lm_eval.simple_evaluate`.

It is lm-eval's own `hf-multimodal` (batching, truncation, stopping and log-likelihoods are lm-eval's), run inside
`exit_at`. Tasks without pictures do not use the image encoder: their results are the same at every exit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

from PIL.Image import Image
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from exitsafe.data.images import open_image
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError
from exitsafe.exits.finite import not_finite
from exitsafe.integrations.chat_answers import model_digest
from exitsafe.untrusted import JsonObject

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import CacheHook
    from lm_eval.models.hf_vlms import HFMultimodalLM
except ImportError as error:
    raise InputError('lm-eval is not installed: pip install "exitsafe[lm-eval]"') from error

Answer = TypeVar("Answer")
_CACHE_ENTRY = "exitsafe"  # the names of other entries are hashes


def lm_eval_model(
    vlm: VLM, *, exit_layer: int | None = None, skip_global: bool = False, batch_size: int = 8
) -> HFMultimodalLM:
    """A model at one exit layer for lm-eval.

    With `use_cache`, give each exit its own file: lm-eval looks up answers by the request alone. A file with answers
    of another exit or model is refused; training after loading is not noticed, so use a new file then.

    Args:
        vlm: The model. It must not be used otherwise while lm-eval uses it.
        exit_layer: Encoder blocks to run; None is the default exit.
        skip_global: As in `VLM.exit_at`.
        batch_size: Requests at a time.

    Returns:
        An `lm_eval.api.model.LM`, to pass as `model` to `lm_eval.simple_evaluate`.

    Raises:
        ExitLayerError: If the encoder has no such block.
        InputError: If lm-eval is not installed, or `batch_size` is not a number of 1 or more.
        ModelError: If there is no processor.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size={batch_size}: choose 1 or more")
    exit_layer = vlm.default_exit if exit_layer is None else exit_layer
    assert vlm.tokenizer is not None  # raises if there is no processor
    with vlm.exit_at(exit_layer, skip_global=skip_global):
        return ExitLM(vlm, exit_layer=exit_layer, skip_global=skip_global, batch_size=batch_size)


class ExitLM(HFMultimodalLM):
    """lm-eval's model for pictures and text, running at one exit layer."""

    def __init__(self, vlm: VLM, *, exit_layer: int, skip_global: bool, batch_size: int) -> None:
        self.vlm = vlm
        self.exit_layer = exit_layer
        self.skip_global = skip_global
        super().__init__(vlm.model, batch_size=batch_size, max_length=vlm.context_length)

    @property
    def state(self) -> str:
        """Everything that affects an answer, in one line: model, exit layer and a digest of the rest."""
        digest = model_digest(self.vlm, batch_size=self.batch_size, skip_global=self.skip_global)
        return f"{self.vlm.name}@L{self.exit_layer}#{digest}"

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._at_exit(super().loglikelihood, requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return self._at_exit(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return self._at_exit(super().generate_until, requests, disable_tqdm=disable_tqdm)

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Refuse a cache with answers of another model or exit: lm-eval would take them for this one's."""
        cache = cache_hook.dbdict
        if cache is not None and cache.get(_CACHE_ENTRY, None if len(cache) else self.state) != self.state:
            raise InputError(
                f"{cache.filename} has answers of another model or exit layer than {self.state}; give each its own "
                "use_cache"
            )
        if cache is not None:
            cache[_CACHE_ENTRY] = self.state
        super().set_cache_hook(cache_hook)

    def get_model_info(self) -> JsonObject:
        """lm-eval's own information and the exit layer."""
        return {**super().get_model_info(), "exit_layer": self.exit_layer, "exitsafe_model": self.state}

    def tok_batch_multimodal_encode(
        self, strings: list[str], images: list[list[Image]], **options: object
    ) -> dict[str, Tensor]:
        """As in lm-eval, but without the second start token that some tokenizers add to that of the chat template, and
        with pictures as a viewer shows them."""
        images = [[open_image(image, "of lm-eval") for image in row] for row in images]
        bos = self.tokenizer.bos_token
        if bos and self.tokenizer("").input_ids[:1] == [self.tokenizer.bos_token_id]:
            strings = [string.removeprefix(bos) for string in strings]
        encoded: dict[str, Tensor] = super().tok_batch_multimodal_encode(strings, images, **options)
        return encoded

    def _at_exit(
        self, answer: Callable[..., list[Answer]], requests: list[Instance], **options: object
    ) -> list[Answer]:
        check = self.vlm.model.register_forward_hook(self._check_finite)
        try:
            with self.vlm.exit_at(self.exit_layer, skip_global=self.skip_global):
                return answer(requests, **options)
        finally:
            check.remove()

    def _check_finite(self, module: nn.Module, args: tuple[object, ...], output: CausalLMOutput) -> None:
        """Refuse NaN and infinity, from which lm-eval would score an arbitrary token."""
        assert output.logits is not None
        if not output.logits[:, -1].amax(dim=-1).isfinite().all():
            raise not_finite("logits", exit_layer=self.exit_layer, dtype=self.vlm.base_model.dtype)

    def _create_tokenizer(self, *args: object, **kwargs: object) -> None:
        self.processor = copy.deepcopy(self.vlm.processor)  # lm-eval changes its padding side and adds a padding token
        self.tokenizer = self.processor.tokenizer
