"""The real Trainer with audits in between: training is the same bit for bit, and each audit is a run."""

from __future__ import annotations

import random
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

import exitsafe
from exitsafe.engine.prompts import collate
from exitsafe.engine.vlm import VLM
from exitsafe.errors import ExitLayerError, InputError
from exitsafe.integrations import AuditCallback
from exitsafe.integrations.trainer_callback import undisturbed
from exitsafe.records import Response, Sample, Verdict
from exitsafe.world import organism_suites
from tests.forks import together
from tests.integrations.worldly import organism, samples

pytestmark = pytest.mark.slow
OPTIONS: dict[str, Any] = {"exit_layers": (1, 7), "max_new_tokens": 24}


class DrawingJudge:
    """The world's refusals, from a judge that draws from every random state there is."""

    name = "drawing"
    measures = ("asr",)

    def __call__(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Verdict]:
        torch.rand(3), random.random(), np.random.rand()
        return [
            Verdict(
                sample_id=response.sample_id,
                exit_layer=response.exit_layer,
                judge=self.name,
                measure="asr",
                score=float(response.text.startswith("mix")),
            )
            for sample, response in zip(samples, responses, strict=True)
            if sample.kind == "harmful"
        ]


def examples(vlm: VLM) -> list[dict[str, Any]]:
    """Refusals of benign requests: a few steps of them change answers."""
    found = []
    for sample in organism_suites(split="train", sizes={"harmful": 8, "borderline": 0, "benign": 0, "vqa": 0}):
        response = vlm.tokenizer("i cannot help with that . <eos>", add_special_tokens=False).input_ids
        found.append({"prompt": vlm.encode_prompt(sample), "response": torch.tensor(response)})
    return found


def trainer(vlm: VLM, folder: Path, callbacks: list[Any], **arguments: Any) -> Trainer:
    def join(rows: list[dict[str, Any]]) -> dict[str, Any]:
        prompts, responses = [row["prompt"] for row in rows], [row["response"] for row in rows]
        batch = collate(prompts, responses, pad_token_id=vlm.pad_token_id)
        labels = batch["input_ids"].clone()
        labels[:, : -len(responses[0])] = -100
        images = {"pixel_values": torch.cat([prompt.media["pixel_values"] for prompt in prompts])}
        return {**batch, **images, "labels": labels}

    for module in vlm.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1  # so that random states matter
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "seed": 5,
    }
    data: Any = examples(vlm)
    return Trainer(
        model=vlm.model,
        args=TrainingArguments(**{**settings, **arguments}),
        train_dataset=data,
        eval_dataset=data[:4],
        data_collator=join,
        callbacks=callbacks,
    )


def trained(vlm: VLM, folder: Path, callbacks: list[Any], **arguments: Any) -> tuple[dict[str, Any], list[Any], Any]:
    """Weights, losses and gradient norms of every step, and the Trainer."""
    own = trainer(vlm, folder, callbacks, **arguments)
    own.train()
    logs = [(each["loss"], each["grad_norm"]) for each in own.state.log_history if "loss" in each]
    return {name: tensor.clone() for name, tensor in vlm.model.state_dict().items()}, logs, own


def test_training_is_the_same_bit_for_bit_and_every_audit_is_logged_and_kept(tmp_path: Path) -> None:
    plain_weights, plain_logs, _ = trained(exitsafe.load_vlm("organism"), tmp_path / "plain", [])
    vlm = exitsafe.load_vlm("organism")
    callback = AuditCallback(vlm, samples(), out=tmp_path / "runs", judges=[DrawingJudge()], every=2, **OPTIONS)
    weights, logs, own = trained(vlm, tmp_path / "audited", [callback])
    assert len(logs) == 4
    assert logs == plain_logs
    assert weights.keys() == plain_weights.keys()
    assert all(torch.equal(weights[name], plain_weights[name]) for name in weights)

    audits = [each for each in own.state.log_history if "exitsafe/asr_L1" in each]
    assert [each["step"] for each in audits] == [2, 4]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["step-000002", "step-000004"]
    run = exitsafe.load_run(tmp_path / "runs" / "step-000004")
    assert run.summary["model"] == "organism at training step 4"
    assert run.settings["model"]["checkpoint"] is None
    layers = {layer["exit_layer"]: layer["metrics"] for layer in run.summary["layers"]}
    for layer in (1, 7):
        assert audits[1][f"exitsafe/asr_L{layer}"] == layers[layer]["asr"]["value"]
        assert audits[1][f"exitsafe/vqa_accuracy_L{layer}"] == layers[layer]["vqa_accuracy"]["value"]
    assert not any("seconds" in name for name in audits[1])
    for name in ("responses.parquet", "verdicts.parquet"):
        assert stat.S_IMODE((run.path / name).stat().st_mode) == 0o600

    # what was audited is the model as it was then
    again = vlm.generate(samples(), 1, max_new_tokens=24)
    by_id = {(each.sample_id, each.exit_layer): each.text for each in run.responses()}
    assert [by_id[sample.id, 1] for sample in samples()] == [response.text for response in again]
    assert [response.text for response in again] != [
        response.text for response in organism().generate(samples(), 1, max_new_tokens=24)
    ]


def test_by_default_it_audits_with_each_evaluation_and_tells_the_trackers(tmp_path: Path) -> None:
    vlm = exitsafe.load_vlm("organism")
    own = trainer(vlm, tmp_path, [], max_steps=2, eval_strategy="steps", eval_steps=1)
    own.add_callback(AuditCallback(vlm, samples(), out=tmp_path / "runs", log=own.log, **OPTIONS))
    own.evaluate()  # outside training: of no step
    assert not (tmp_path / "runs").exists()
    own.train()
    audits = [each for each in own.state.log_history if "exitsafe/asr_L7" in each]
    assert [(each["step"], "epoch" in each) for each in audits] == [(1, True), (2, True)]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["step-000001", "step-000002"]
    own.evaluate()
    assert len([each for each in own.state.log_history if "exitsafe/asr_L7" in each]) == 2


def test_a_folder_with_later_audits_is_refused_before_training_and_a_resumed_one_goes_on(tmp_path: Path) -> None:
    def start(vlm: VLM, out: Path, **arguments: Any) -> Trainer:
        callback = AuditCallback(vlm, samples(), out=out, every=1, **OPTIONS)
        return trainer(vlm, tmp_path / "train", [callback], save_strategy="steps", save_steps=1, **arguments)

    out = tmp_path / "runs"
    start(exitsafe.load_vlm("organism"), out, max_steps=2).train()
    vlm = exitsafe.load_vlm("organism")
    before = {name: tensor.clone() for name, tensor in vlm.model.state_dict().items()}
    with pytest.raises(InputError, match=r"contains step-000001, but training starts at step 0; move it away"):
        start(vlm, out).train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in vlm.model.state_dict().items())
    start(vlm, out, max_steps=3).train(resume_from_checkpoint=str(tmp_path / "train" / "checkpoint-2"))
    assert sorted(path.name for path in out.iterdir()) == ["step-000001", "step-000002", "step-000003"]
    with pytest.raises(InputError, match="contains step-000002, but training starts at step 1"):
        start(exitsafe.load_vlm("organism"), out, max_steps=3).train(
            resume_from_checkpoint=str(tmp_path / "train" / "checkpoint-1")
        )


def test_an_adapter_under_training_is_audited(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    bare = exitsafe.load_vlm("organism")
    config = LoraConfig(target_modules=bare.linear_layers, r=8)
    vlm = VLM(get_peft_model(bare.model, config), bare.processor, name="mine")
    callback = AuditCallback(vlm, samples(), out=tmp_path / "runs", every=4, **OPTIONS)
    trained(vlm, tmp_path / "train", [callback], learning_rate=0.02)
    run = exitsafe.load_run(tmp_path / "runs" / "step-000004")
    by_id = {(each.sample_id, each.exit_layer): each.text for each in run.responses()}
    now = [response.text for response in vlm.generate(samples(), 1, max_new_tokens=24)]
    assert [by_id[sample.id, 1] for sample in samples()] == now
    with vlm.model.disable_adapter():
        before = [response.text for response in vlm.generate(samples(), 1, max_new_tokens=24)]
    assert before != now


def test_modes_and_states_come_back_after_an_error_too() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())
    model.train()
    model[1].eval()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = (torch.rand(1).item(), random.random(), np.random.rand())
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    with pytest.raises(ZeroDivisionError), undisturbed(model):
        assert not model[0].training
        assert not torch.is_grad_enabled()
        torch.rand(1), random.random(), np.random.rand()
        raise ZeroDivisionError
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert torch.is_grad_enabled()
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    vlm = exitsafe.load_vlm("organism")
    with pytest.raises(ExitLayerError, match="choose 1 to 8"):
        AuditCallback(vlm, samples(), out=tmp_path, exit_layers="1-9")
    with pytest.raises(InputError, match="every=0"):
        AuditCallback(vlm, samples(), out=tmp_path, every=0)
    other = AuditCallback(organism(), samples(), out=tmp_path / "runs")
    with pytest.raises(InputError, match=r"write Trainer\(model=vlm\.model"):
        trainer(vlm, tmp_path, [other]).train()


@pytest.mark.slow
def test_two_processes_share_each_audit(tmp_path: Path) -> None:
    def work(number: int) -> None:
        vlm = exitsafe.load_vlm("organism")
        callback = AuditCallback(vlm, samples(), out=tmp_path / "runs", every=2, **OPTIONS)
        _, _, own = trained(vlm, tmp_path / "train", [callback], max_steps=2, ddp_backend="gloo")
        audits = [each for each in own.state.log_history if "exitsafe/asr_L1" in each]
        assert own.args.world_size == 2
        assert [each["step"] for each in audits] == [2]
        run = exitsafe.load_run(tmp_path / "runs" / "step-000002")
        assert len(run.responses()) == 2 * len(samples())
        assert audits[0]["exitsafe/asr_L1"] == run.summary["layers"][0]["metrics"]["asr"]["value"]

    together(2, work)
