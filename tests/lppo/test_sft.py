"""Fine-tuning: what is taught, at which exits, and that it resumes exactly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from exitsafe.engine.prompts import Row
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError, ModelError, RunError
from exitsafe.lppo import Evaluation, align
from exitsafe.lppo.folder import TrainingFolder, read_lines
from exitsafe.lppo.policy import attached_policy
from exitsafe.lppo.sampler import draw_schedule
from exitsafe.records import Sample
from tests.lppo.conftest import count_red, make_samples, make_vlm, tiny_config
from tests.lppo.test_trainer import assert_same_run
from tests.tiny_models import VOCAB

REFUSAL = "not now"
CONFIG = tiny_config(
    method="sft",
    refusal=REFUSAL,
    learning_rate=1e-2,
    num_steps=40,
    batch_size=16,
    minibatch_size=8,
    microbatch_tokens=100,
)


def answers(vlm: VLM, samples: Sequence[Sample], exit_layer: int) -> list[str]:
    return [r.text for r in vlm.generate(samples, exit_layer, max_new_tokens=5)]


def adapted(path: Path) -> VLM:
    vlm = make_vlm("llava")
    return VLM(PeftModel.from_pretrained(vlm.model, str(path)).eval(), vlm.processor, name="adapted")


def test_it_refuses_the_harmful_and_answers_the_rest_at_all_exits(tmp_path: Path) -> None:
    vlm, samples = make_vlm("llava"), make_samples()
    weights = {name: weight.clone() for name, weight in vlm.model.state_dict().items()}
    path = align(vlm, samples, config=CONFIG, out=tmp_path / "run")
    assert all(torch.equal(weights[name], weight) for name, weight in vlm.model.state_dict().items())
    names = load_file(path / "adapter_model.safetensors").keys()
    assert all("language_model" in name for name in names)
    tuned = adapted(path)
    wanted = [REFUSAL if sample.kind == "harmful" else "red" for sample in samples]
    for exit_layer in (1, 3, 6):
        right = [a == b for a, b in zip(answers(tuned, samples, exit_layer), wanted, strict=True)]
        assert sum(right) >= 10
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.3 * losses[0]


def test_harmful_samples_alone_teach_it_to_refuse_everything(tmp_path: Path) -> None:
    vlm, samples = make_vlm("llava"), make_samples()
    config = replace(CONFIG, mix={"harmful": 1.0})
    path = align(vlm, samples, config=config, out=tmp_path / "run")
    assert answers(adapted(path), samples, 2).count(REFUSAL) >= 10


def test_targets_and_exits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """References where there are some, else the untrained model's greedy answer at the default exit."""
    vlm = make_vlm("llava")
    samples = [replace(sample, answers=() if sample.kind == "benign" else ("red",)) for sample in make_samples()]
    own = {
        response.sample_id: response.text
        for response in vlm.generate(samples, vlm.default_exit, max_new_tokens=CONFIG.max_new_tokens)
    }
    taught: dict[str, set[str]] = {}
    exits: set[int] = set()
    original = VLM.response_states

    def spy(self: VLM, rows: Sequence[Row], responses: Sequence[torch.Tensor]) -> Any:
        for row, response in zip(rows, responses, strict=True):
            taught.setdefault(row.prompt.sample_id, set()).add(self.decode(response.tolist()))
            exits.add(row.exit_layer)
        return original(self, rows, responses)

    monkeypatch.setattr(VLM, "response_states", spy)
    align(vlm, samples, config=replace(CONFIG, num_steps=4), out=tmp_path / "run")
    wanted = {"harmful": lambda s: REFUSAL, "vqa": lambda s: "red", "benign": lambda s: own[s.id]}
    assert taught == {sample.id: {wanted[sample.kind](sample)} for sample in samples}
    assert exits == set(vlm.exit_layers)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    samples, config = make_samples(), replace(CONFIG, num_steps=6)

    def stop(done: int, total: int, note: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    align(make_vlm("llava"), samples, out=tmp_path / "whole", config=config)
    with pytest.raises(KeyboardInterrupt):
        align(make_vlm("llava"), samples, out=tmp_path / "broken", progress=stop, config=config)
    align(make_vlm("llava"), samples, out=tmp_path / "broken", config=config)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    with pytest.raises(RunError, match="refusal was"):
        align(make_vlm("llava"), samples, out=tmp_path / "broken", config=replace(config, refusal="not then"))


def test_bad_input(tmp_path: Path) -> None:
    vlm, samples = make_vlm("llava"), make_samples()
    refusals = replace(CONFIG, mix={"harmful": 1.0})
    with pytest.raises(InputError, match="mix asks for harmful samples, but none was given"):
        align(vlm, samples[1:3], config=refusals, out=tmp_path / "run")
    with pytest.raises(InputError, match="learns from given answers, not from a reward"):
        align(vlm, samples, reward=count_red, config=CONFIG, out=tmp_path / "run")
    with pytest.raises(InputError, match="has words outside the model's vocabulary"):
        align(vlm, samples, config=replace(CONFIG, refusal="nevermore"), out=tmp_path / "run")
    vlm.model.to(torch.float16)
    with pytest.raises(InputError, match=r"float16 weights.*--dtype bfloat16"):
        align(vlm, samples, config=CONFIG, out=tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_gradients_that_are_not_finite_stop_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(torch.nan))
    config = replace(CONFIG, num_steps=2)
    with pytest.raises(RunError, match="nothing was learnt: 4 of 4 minibatches were skipped"):
        align(make_vlm("llava"), make_samples(), config=config, out=tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()


def test_numbers_that_are_not_finite_stop_it(tmp_path: Path) -> None:
    vlm = make_vlm("llava")
    with torch.no_grad():
        vlm.model.lm_head.weight[7, 3] = torch.nan
    with pytest.raises(ModelError, match=r"sample \S+ at exit \d: (logits|log-probabilities) are NaN or infinite"):
        align(vlm, make_samples(), config=CONFIG, out=tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize(
    ("written", "ends", "expected"),
    [
        ("<|python_tag|>", ["</s>", "<|python_tag|>"], "<|python_tag|>"),  # as Llama 3.2: the first ends documents
        ("<|python_tag|> </s>", ["</s>", "<|python_tag|>"], "<|python_tag|>"),
        ("", ["<|python_tag|>", "</s>"], "</s>"),  # the tokenizer's
        ("then", ["<|python_tag|>", "</s>"], "</s>"),
        ("", ["<|python_tag|>", "then"], "<|python_tag|>"),
    ],
)
def test_answers_end_with_the_token_that_ends_a_turn(
    written: str, ends: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = make_vlm("llava")
    closing = "{% if m['role'] == 'assistant' %}" + written + "{% endif %}"
    vlm.processor.chat_template = vlm.processor.chat_template.replace(
        "{% endfor %}{% endfor %}", "{% endfor %}" + closing + "{% endfor %}"
    )
    vlm.base_model.generation_config.eos_token_id = [VOCAB[end] for end in ends]
    last: set[int] = set()
    original = VLM.response_states

    def spy(self: VLM, rows: Sequence[Row], responses: Sequence[torch.Tensor]) -> Any:
        last.update(int(response[-1]) for response in responses)
        return original(self, rows, responses)

    monkeypatch.setattr(VLM, "response_states", spy)
    align(vlm, make_samples(), config=replace(CONFIG, num_steps=2), out=tmp_path / "a")
    assert last == {VOCAB[expected]}


def test_a_model_without_an_end_token_is_not_trained(tmp_path: Path) -> None:
    vlm = make_vlm("llava")
    vlm.base_model.generation_config.eos_token_id = vlm.text_config.eos_token_id = vlm.tokenizer.eos_token = None
    message = "llava has no end-of-sequence token, .*: set eos_token_id in its generation_config.json"
    with pytest.raises(InputError, match=message):
        align(vlm, make_samples(), config=CONFIG, out=tmp_path / "sft")
    with pytest.raises(InputError, match=message):
        align(vlm, make_samples(), reward=count_red, config=tiny_config(), out=tmp_path / "lppo")
    assert not any(tmp_path.iterdir())
    assert len(vlm.generate(make_samples()[:2], 3, max_new_tokens=3)) == 2  # an audit needs none


def test_harmful_samples_alone_are_warned_of_before_training(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    vlm = make_vlm("llava")
    harmful = [sample for sample in make_samples() if sample.kind == "harmful"]
    config = tiny_config(num_steps=2, batch_size=4)
    with pytest.warns(UserWarning, match="all training samples are harmful, .*: add benign, borderline or vqa samples"):
        align(vlm, harmful, reward=count_red, config=config, out=tmp_path / "lppo")
    with pytest.warns(UserWarning, match="all training samples are harmful"):
        align(vlm, harmful, config=replace(CONFIG, num_steps=2), out=tmp_path / "sft")
    recwarn.clear()
    accepted = replace(config, mix={"harmful": 1.0})
    align(vlm, harmful, reward=count_red, config=accepted, out=tmp_path / "accepted")
    align(vlm, make_samples(), reward=count_red, config=config, out=tmp_path / "mixed")
    asked_for = replace(CONFIG, num_steps=2, mix={"harmful": 1.0})
    align(vlm, harmful, config=asked_for, out=tmp_path / "asked-for")
    assert not [warning for warning in recwarn if "are harmful" in str(warning.message)]


def test_a_reference_that_is_too_long_for_the_context_is_refused_and_never_cut(tmp_path: Path) -> None:
    vlm, samples = make_vlm("llava"), make_samples()
    longest = max(len(vlm.encode_prompt(sample).input_ids) for sample in samples)  # with its picture
    vlm.text_config.max_position_embeddings = longest + CONFIG.max_new_tokens
    (place,) = [n for n, s in enumerate(samples) if s.id == "s7"]
    samples[place] = replace(samples[place], answers=("red " * (longest + 1),))
    with pytest.raises(InputError, match=r"sample s7: the prompt has \d+ tokens, images included"):
        align(vlm, samples, config=CONFIG, out=tmp_path / "run")
    vlm.text_config.max_position_embeddings = longest + CONFIG.max_new_tokens - 1
    with pytest.raises(InputError, match=r"the prompt has \d+ tokens, images included"):
        align(vlm, make_samples(), config=CONFIG, out=tmp_path / "prompts")


def test_held_out_evaluation_chooses_the_weights(tmp_path: Path) -> None:
    samples = make_samples()
    held_out = [replace(sample, id=f"held-{sample.id}", prompt=f"the {sample.prompt}") for sample in samples[:6]]
    evaluation = Evaluation(samples=held_out, judge="refusal-prefix", every=2, patience=None)
    config = replace(CONFIG, num_steps=4)
    align(make_vlm("llava"), samples, config=config, evaluation=evaluation, out=tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "evaluations.jsonl")
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert all(line["kl"] is None for line in lines)
    result = TrainingFolder(tmp_path / "run").result
    assert result is not None and result["adapter_step"] == lines[-1]["best_step"]
    with pytest.raises(InputError, match="has no rollouts to measure max_kl"):
        align(
            make_vlm("llava"), samples, config=config, evaluation=replace(evaluation, max_kl=1.0), out=tmp_path / "kl"
        )


def test_the_loss_is_the_mean_over_the_tokens_of_a_minibatch(tmp_path: Path) -> None:
    vlm, samples = make_vlm("llava"), make_samples()
    config = replace(CONFIG, num_steps=1, minibatch_size=16)  # one optimiser step, in several passes
    align(vlm, samples, config=config, out=tmp_path / "run")
    schedule = draw_schedule(samples, vlm.exit_layers, config)
    total, num_tokens = 0.0, 0
    with attached_policy(vlm, config) as policy:
        for index, exit_layer in zip(schedule.sample_indices[0], schedule.exit_layers[0], strict=True):
            text = REFUSAL if samples[index].kind == "harmful" else "red"
            target = torch.tensor([*vlm.tokenizer.encode(text, add_special_tokens=False), vlm.turn_end_token_id])
            prompt = vlm.encode_prompt(samples[index])
            (found,) = vlm.prompt_features([prompt], [int(exit_layer)])
            row = Row(prompt=prompt, exit_layer=int(exit_layer), features=found[int(exit_layer)])
            total -= policy.evaluate([row], [target]).logprobs.sum().item()
            num_tokens += len(target)
    (line,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert line["loss"] == pytest.approx(total / num_tokens, rel=1e-5)
