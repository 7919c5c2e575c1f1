"""The launch configs are read by accelerate's own reader and say what their names say."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    ("name", "processes", "machines", "kind"),
    [
        ("one_gpu", 1, 1, "NO"),
        ("eight_gpus", 8, 1, "MULTI_GPU"),
        ("two_nodes", 16, 2, "MULTI_GPU"),
        ("align/ddp", 4, 1, "MULTI_GPU"),
        ("align/two_machines", 8, 2, "MULTI_GPU"),
        ("align/fsdp2", 4, 1, "FSDP"),
        ("align/fsdp2_keep", 4, 1, "FSDP"),
    ],
)
def test_launch_configs(name: str, processes: int, machines: int, kind: str) -> None:
    config = load_config_from_file(str(EXAMPLES / f"{name}.yaml"))
    assert (config.num_processes, config.num_machines) == (processes, machines)
    assert config.distributed_type == kind
    assert config.mixed_precision == "no"


def test_the_readme_names_every_config() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"({path.relative_to(EXAMPLES)})" in text for path in EXAMPLES.rglob("*.y*ml"))
