"""How much memory a judge's weights take, from its model's config alone. Loads no weight and asks no judge."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from exitsafe.doctor.blueprint import META
from exitsafe.judges import Judge, ModelJudge


def judge_bytes(judges: Sequence[Judge], *, on: torch.device | None = None) -> int:
    """Bytes of the weights of judges that rest on a local model; a model that two of them share counts twice.

    Args:
        judges: Any; those without a model, or with one behind an endpoint, take nothing here.
        on: Count only what lies on a device of this type.

    Raises:
        ModelError: If a judge's model cannot be had.
    """
    found = [judge.settings for judge in judges if isinstance(judge, ModelJudge)]
    local = [settings for settings in found if "device" in settings]
    return sum(_weights(settings) for settings in local if on is None or settings["device"] == on.type)


def bytes_by_name(name: str) -> int:
    """Of a model in bfloat16, by the size in its name; 0 if it says none.

    >>> bytes_by_name("Qwen/Qwen3Guard-Gen-0.6B")
    1200000000
    """
    billions = re.search(r"(\d+(?:\.\d+)?)[bB]\b", name)
    return 0 if billions is None else int(float(billions[1]) * 2e9)


def _weights(settings: dict[str, Any]) -> int:
    name, dtype = str(settings["model"]), settings["dtype"]
    revision = settings["revision"] if re.fullmatch(r"[0-9a-f]{40}", str(settings["revision"])) else None
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        wanted = (getattr(config, "dtype", None) or torch.float32) if dtype == "auto" else getattr(torch, dtype)
        with META:
            model = getattr(transformers, config.architectures[0])._from_config(config, dtype=wanted)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):  # judges load what we cannot build
        return bytes_by_name(name)
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
