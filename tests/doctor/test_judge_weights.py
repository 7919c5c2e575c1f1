"""What judges' models take, from their configs: the bytes of the weights as a judge loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification

from exitsafe.doctor import bytes_by_name, judge_bytes
from exitsafe.judges import load_judges
from exitsafe.judges.reward_model import RewardModel

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def reward_model(tmp_path: Path) -> tuple[Path, int]:
    """A folder, and the bytes of its parameters and buffers."""
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100, n_positions=64, pad_token_id=0)
    config.num_labels = 1
    model: Any = GPT2ForSequenceClassification(config)
    model.save_pretrained(tmp_path / "reward")
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return tmp_path / "reward", sum(tensor.nbytes for tensor in tensors.values())


def test_a_local_model_counts_where_it_lies(reward_model: tuple[Path, int]) -> None:
    folder, size = reward_model
    judges = [RewardModel(str(folder), device="cpu"), *load_judges(["refusal-prefix", "coherence"])]
    assert judge_bytes(judges) == judge_bytes(judges, on=CPU) == size
    assert judge_bytes(judges, on=GPU) == 0


def test_the_type_that_is_asked_for_counts(reward_model: tuple[Path, int]) -> None:
    folder, size = reward_model
    assert 2 * judge_bytes([RewardModel(str(folder), dtype="bfloat16", device="cpu")]) == size


def test_a_model_that_cannot_be_built_counts_by_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "guard-1.5B"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "unheard-of"}')
    assert judge_bytes([RewardModel(str(folder), device="cpu")]) == bytes_by_name("guard-1.5B") == 3_000_000_000


@pytest.mark.parametrize(("name", "size"), [("a/b-8B", 16e9), ("Qwen3Guard-Gen-0.6B", 1.2e9), ("gpt2-large", 0)])
def test_sizes_in_names(name: str, size: float) -> None:
    assert bytes_by_name(name) == size
