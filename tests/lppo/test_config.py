"""LPPOConfig: frozen, and every wrong value is refused with the name of the field."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, asdict, fields

import pytest

from exitsafe.errors import InputError
from exitsafe.lppo import LPPOConfig
from exitsafe.lppo.config import UNUSED


def test_frozen_keyword_only_and_copied() -> None:
    mix: dict[str, float] = {"harmful": 1.0}
    config = LPPOConfig(exit_layers=[1, 2], mix=mix)  # type: ignore[arg-type]
    mix["vqa"] = 1.0
    assert config.exit_layers == (1, 2)
    assert config.mix == {"harmful": 1.0}
    with pytest.raises(FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        LPPOConfig("lppo")  # type: ignore[call-arg]


def test_each_method_has_its_defaults_and_refuses_what_it_does_not_use() -> None:
    assert LPPOConfig.for_model("mine", method="sft").learning_rate == 1e-4
    assert LPPOConfig.for_model("mine", method="sft", learning_rate=1e-3).learning_rate == 1e-3
    assert LPPOConfig.for_model("organism", method="sft").learning_rate == LPPOConfig.for_organism().learning_rate
    assert LPPOConfig.for_model("mine", method="grpo").group_size == 4
    assert LPPOConfig.for_model("organism", method="grpo").group_size == 4
    assert LPPOConfig.for_model("mine", method="grpo", num_steps=2).num_steps == 2
    names = {field.name for field in fields(LPPOConfig)}
    for unused in UNUSED.values():
        assert set(unused) <= names
    for method, changes in {
        "sft": {"kl_coef": 0.1, "temperature": 0.5},
        "grpo": {"lam": 0.5, "group_size": 4},
        "lppo": {"refusal": "no"},
    }.items():
        with pytest.raises(InputError, match=f"method='{method}' does not use (kl_coef|temperature|lam|refusal)"):
            LPPOConfig(method=method, **changes)  # type: ignore[arg-type]


def test_for_organism_takes_changes() -> None:
    config = LPPOConfig.for_organism(seed=2, exit_layers=(7,))
    assert (config.seed, config.exit_layers, config.train, config.num_steps) == (2, (7,), "full", 80)


def test_a_models_usual_settings_fit_a_small_batch_and_a_short_run() -> None:
    assert LPPOConfig.for_model("a/model") == LPPOConfig()
    assert LPPOConfig.for_model("organism:text", seed=3) == LPPOConfig.for_organism(seed=3)
    small = LPPOConfig.for_model("a/model", batch_size=8, num_steps=3)
    assert (small.minibatch_size, small.value_warmup_steps) == (8, 2)
    with pytest.raises(InputError, match="minibatch_size=16 exceeds batch_size=8"):
        LPPOConfig.for_model("a/model", batch_size=8, minibatch_size=16)


SENSELESS = {
    "exit_layers": (),
    "mix": {"rude": 1.0},
    "train": "all",
    "constraints": {"rude": 0.1},
}


@pytest.mark.parametrize("name", [f.name for f in fields(LPPOConfig)])
def test_every_field_refuses_a_senseless_value(name: str) -> None:
    value: object = SENSELESS.get(name, -1)
    with pytest.raises(InputError, match=name):
        LPPOConfig(**{**asdict(LPPOConfig()), name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 2.5}, "batch_size=2.5 must be a whole number of at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be a number above 0"),
        ({"gamma": 1.5}, "gamma=1.5 must be a number of at least 0 and at most 1"),
        ({"temperature": float("nan")}, "temperature=nan must be a number above 0"),
        ({"seed": True}, "seed=True must be a whole number"),
        ({"kl_coef": "0.1"}, "kl_coef='0.1' must be a number"),
        ({"minibatch_size": 65}, "minibatch_size=65 exceeds batch_size=64"),
        ({"group_size": 3}, "batch_size=64 is not a multiple of group_size=3"),
        ({"method": "grpo"}, "set group_size to at least 2"),
        (
            {"constraints": {"utility": 1.0}},
            r"constraints=\{'utility': 1.0\} must be over_refusal or utility, each with a number of at least 0 and bel",
        ),
        ({"constraints": {"utility": "5%"}}, r"constraints=\{'utility': '5%'\} must be over_refusal or utility"),
        ({"constraints": [0.1]}, r"constraints=\[0.1\] must be over_refusal or utility, each with a number"),
        (
            {"exit_layers": []},
            r'exit_layers=\[\] must be "all", "default", at least one layer, or text such as "1-8,16"',
        ),
        ({"exit_layers": ["8"]}, r"exit_layers=\['8'\] must be"),
        ({"num_stepps": 3}, "LPPOConfig has no setting 'num_stepps'"),
        ({"kl_target": -1}, "kl_target=-1 must be a number above 0, or none"),
        ({"train": "all"}, "train='all' must be lora or full"),
        ({"include_default": 1}, "include_default=1 must be true or false"),
        ({"value_warmup_steps": 400}, "leaves none of num_steps=400"),
        ({"calibration_samples": 1}, "calibration_samples=1 must be a whole number of at least 2, or 0, or none"),
        ({"mix": {"vqa": 0.0}}, "no kind with a share above 0"),
        ({"mix": {"vqa": float("nan")}}, r"mix=\{'vqa': nan\} must be harmful or borderline or benign or vqa"),
    ],
)
def test_messages_name_the_range(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LPPOConfig(**changes)  # type: ignore[arg-type]
