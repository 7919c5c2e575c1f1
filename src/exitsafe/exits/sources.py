"""Where a model or an adapter is loaded from: a local folder or a Hub id, told apart without asking the Hub.

Does not import torch, so that the command line can reject a wrong name at once.
"""

from __future__ import annotations

import re
from pathlib import Path

from exitsafe.errors import ModelError
from exitsafe.specs.inputs import is_url


def check_model_source(source: str) -> None:
    """Check that a source may be a model.

    Raises:
        ModelError: If it is a folder that does not exist or contains no model, a server, or not a valid Hub id.
    """
    if is_url(source):
        raise ModelError("a served model can only be audited and verified: give a Hub id or a folder of its weights")
    where = Path(source)
    if not where.is_dir() and not may_be_on_the_hub(source):
        raise ModelError(f"{source} does not exist: give a Hub id or a folder written by save_pretrained")
    if where.is_dir() and not (where / "config.json").is_file():
        if (where / "adapter_config.json").is_file():
            raise ModelError(f"{source} is an adapter: give its base model, and {source} as --adapter")
        if (where / "metrics.jsonl").is_file():
            raise ModelError(f"{source} is a training run: give its base model, and {where / 'adapter'} as --adapter")
        raise ModelError(f"{source} has no config.json: give a Hub id or a folder written by save_pretrained")


def check_adapter_source(adapter: str) -> None:
    """Check that a source may be an adapter.

    Raises:
        ModelError: If it is a folder that does not exist, or a training run instead of the adapter in it.
    """
    folder = Path(adapter)
    if (folder / "metrics.jsonl").is_file() and not (folder / "adapter_config.json").is_file():
        hint = f"did you mean {folder / 'adapter'}?" if (folder / "adapter").is_dir() else "let it finish first"
        raise ModelError(f"{adapter} is a training run, not an adapter: {hint}")
    if not folder.is_dir() and not may_be_on_the_hub(adapter):
        raise ModelError(f"adapter {adapter} does not exist; if it is an align run's, let the run finish first")


def unreachable(name: str, error: BaseException | None) -> str | None:
    """What to do about a Hub id that failed to load because the Hub cannot be reached; None for other errors.

    Args:
        name: The id.
        error: The error raised; its causes are searched as well.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    while error is not None:
        if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError):
            return (
                f"{name} is neither a local folder nor in the Hub cache, and the Hub cannot be reached: check the "
                f"name, or run `hf download {name}` with network access"
            )
        error = error.__cause__
    return None


def may_be_on_the_hub(name: str) -> bool:
    """Whether a name is a valid Hub id, NAME or OWNER/NAME; below an existing folder it is taken for a local path.

    >>> may_be_on_the_hub("llava-hf/llava-1.5-7b-hf"), may_be_on_the_hub("./slim")
    (True, False)
    """
    is_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None
    return is_id and not ("/" in name and Path(name).parent.is_dir())
