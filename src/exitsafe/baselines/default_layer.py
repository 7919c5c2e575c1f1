"""PPO at the default exit alone, the usual safety training. Does it help the other exits?

Loop, samples, reward and budget are those of L-PPO; only the sampled exit differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from exitsafe.engine.vlm import VLM
from exitsafe.judges import Judge
from exitsafe.lppo import LPPOConfig, Reward, WeightedSum, align
from exitsafe.records import Progress, Sample

DEFAULT_CONFIG = LPPOConfig()


def default_layer_ppo(
    vlm: VLM,
    samples: Sequence[Sample],
    *,
    reward: Reward | Judge | WeightedSum | None = None,
    config: LPPOConfig = DEFAULT_CONFIG,
    out: str | Path,
    progress: Progress | None = None,
) -> Path:
    """`align` with every sample at `vlm.default_exit`; `config.exit_layers` is not used.

    Args, returns and raises: as `align`.
    """
    config = replace(config, exit_layers=(vlm.default_exit,))
    return align(vlm, samples, reward=reward, config=config, out=out, progress=progress)
