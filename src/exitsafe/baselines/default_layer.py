"""PPO at the default exit alone: safety training as usual. Does it help the other exits?

The same loop, samples, reward and budget as L-PPO; the sampled exit is the only difference.
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
    """`align` with every sample at `vlm.default_exit`, whatever `config.exit_layers` says.

    Args, returns and raises: as `align`.
    """
    config = replace(config, exit_layers=(vlm.default_exit,))
    return align(vlm, samples, reward=reward, config=config, out=out, progress=progress)
