"""The Python files of examples/ run, with fewer samples and steps."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import exitsafe
from exitsafe.engine.prompts import collate
from exitsafe.results.run import load_run
from exitsafe.world import organism_suites

EXAMPLES = Path(__file__).parents[2] / "examples"
TRANSFER = EXAMPLES / "transfer.py"


def test_transfer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(TRANSFER))["main"]
    given = main.__globals__
    brief = {"num_steps": 1, "value_warmup_steps": 0, "batch_size": 8, "minibatch_size": 8}
    given |= {"TRAIN": given["TRAIN"][::16], "TEST": given["TEST"][::64], "TRAIN_EXITS": ("1", "all")}
    given |= {"CONFIG": replace(given["CONFIG"], **brief)}
    main(tmp_path)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["trained", "nothing", "1", "all"]
    assert {len(row.split()) for row in rows[1:]} == {9}
    assert load_run(tmp_path / "audit-1").settings["model"]["adapter"] is not None


@pytest.mark.slow
def test_audit_callback(tmp_path: Path) -> None:
    """Each evaluation is an audit of the weights of its step, and the training is the same bit for bit."""
    callback = runpy.run_path(str(EXAMPLES / "audit_callback.py"))["AuditCallback"]
    plain, audited = exitsafe.load_vlm("organism"), exitsafe.load_vlm("organism")
    held_out = organism_suites(split="heldout", sizes={"harmful": 2, "borderline": 0, "benign": 0, "vqa": 0})
    losses = []
    for vlm, callbacks in ((plain, []), (audited, [callback(audited, held_out, tmp_path / "runs")])):
        own = trainer(vlm, tmp_path, callbacks)
        own.train()
        losses.append([each["loss"] for each in own.state.log_history if "loss" in each])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    weights = plain.model.state_dict()
    assert all(torch.equal(weights[name], each) for name, each in audited.model.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["step-000002", "step-000004"]
    run = load_run(tmp_path / "runs" / "step-000004")
    assert run.settings["model"]["checkpoint"] is None
    trained = audited.generate(held_out, 1, max_new_tokens=24)
    assert [each.text for each in run.responses() if each.exit_layer == 1] == [each.text for each in trained]
    assert [row for row in own.state.log_history if row.keys() == {f"asr_L{layer}" for layer in range(1, 9)}]


def trainer(vlm: exitsafe.VLM, folder: Path, callbacks: list[Any]) -> Trainer:
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
    refusal = torch.tensor(vlm.tokenizer("i cannot help with that . <eos>", add_special_tokens=False).input_ids)
    samples = organism_suites(split="train", sizes={"harmful": 8, "borderline": 0, "benign": 0, "vqa": 0})
    data: Any = [{"prompt": vlm.encode_prompt(sample), "response": refusal} for sample in samples]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=1e-3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=5,
    )
    return Trainer(
        model=vlm.model,
        args=arguments,
        train_dataset=data,
        eval_dataset=data[:4],
        data_collator=join,
        callbacks=callbacks,
    )
