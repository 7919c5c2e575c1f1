"""FSDP2: the frozen weights of the language model's blocks, sharded among the processes and gathered when needed.

Trained weights stay whole in every process, so gradients, optimiser, checkpoints and adapter are those of unsharded
processes. A block's weights are gathered by all processes together, so all must run the same number of forward and
backward passes. Passes over known batches are counted beforehand (`minibatches.py`); generation, whose length is not
known, is synchronised here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError
from exitsafe.lppo.config import LPPOConfig
from exitsafe.lppo.parallel import Team
from exitsafe.lppo.policy import is_quantized


def check_launch(vlm: VLM, config: LPPOConfig) -> None:
    """Raise InputError if the processes were started to shard the model in a way that is not supported."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise InputError(
            "training under DeepSpeed is not supported: use FSDP2 (examples/align/fsdp2.yaml), or accelerate launch "
            "--multi_gpu"
        )
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise InputError("training under FSDP needs its second version: set fsdp_version to 2")
    if plugin.cpu_ram_efficient_loading:
        raise InputError(
            "under FSDP each process loads the weights itself: set fsdp_cpu_ram_efficient_loading to false"
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise InputError("training under FSDP cannot offload weights: set fsdp_offload_params to false")
    if config.train != "lora" or is_quantized(vlm.model):
        raise InputError(
            "FSDP is for train='lora' on weights that are not quantised: otherwise use accelerate launch --multi_gpu"
        )
    if not hasattr(vlm.base_model.get_decoder(), "layers"):
        raise InputError(f"FSDP finds no blocks in the decoder of {vlm.family}: use accelerate launch --multi_gpu")


def shard(vlm: VLM, team: Team) -> None:
    """Keep only this process's part of the frozen weights, in blocks that every pass uses.

    This cannot be undone: from here on the model works only with all processes together, inside `in_step`.
    """
    language_model: Any = vlm.base_model.get_decoder()
    # blocks that read images are skipped by texts without one
    skipped = vlm.image_cache_layers
    own_type = team.device.type
    mesh = init_device_mesh(own_type, (team.size,))
    settings: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": FullyShardedDataParallelPlugin().reshard_after_forward,
        "ignored_params": {parameter for parameter in vlm.model.parameters() if parameter.requires_grad},
    }
    blocks = [block for number, block in enumerate(language_model.layers) if number not in skipped]
    for block in blocks:
        fully_shard(block, **settings)
    in_blocks = {parameter for block in blocks for parameter in block.parameters()}
    settings["ignored_params"] = set(vlm.model.parameters()) - in_blocks
    fully_shard(language_model, **settings)  # the root owns no weights: it only connects the blocks


@contextmanager
def in_step(vlm: VLM, team: Team) -> Iterator[None]:
    """Inside, processes with sharded weights may run as many passes without gradient as each needs.

    Each pass starts with a vote; a process that is done joins the passes of the others until all are done.
    """
    if not team.is_sharded:
        yield
        return
    inner = vlm.base_model.model  # every pass calls it, before any sharded block
    vote = inner.register_forward_pre_hook(lambda module, inputs: team.any(True) and None)
    try:
        yield
    finally:
        vote.remove()
    token = torch.full((1, 1), vlm.pad_token_id, device=vlm.device)
    with torch.no_grad():
        while team.any(False):
            vlm.base_model.get_decoder()(input_ids=token, use_cache=False)
