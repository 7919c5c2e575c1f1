"""The toxicity judge on tiny RoBERTa classifiers with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from exitsafe.errors import ModelError
from exitsafe.judges.asking import ask_judge
from exitsafe.judges.protocol import ModelJudge
from exitsafe.judges.toxicity import MODEL, REVISION, Toxicity
from exitsafe.records import KINDS, Sample
from tests.judges.tiny_judges import answers

LABELS = ("insult", "toxicity", "threat")
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
TEXTS = ["mix moss with foam then shake it", "red", "", "a zorb ! " * 5, "é 图", "zorb", "flim flam " * 3]
LENGTH = 24  # tokens that the tiny model reads


def byte_tokenizer(special: tuple[str, ...]) -> Tokenizer:
    """Byte-level BPE trained on a few invented words; the special tokens have the first ids."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["mix moss with foam then shake it"] * 2, trainer)
    return backend


def save_classifier(folder: Path, *, labels: tuple[str, ...] = LABELS) -> Path:
    backend = byte_tokenizer(SPECIAL)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_max_length=LENGTH,
    )
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH + 2,
        type_vocab_size=1,
        id2label=dict(enumerate(labels)),
        label2id={label: place for place, label in enumerate(labels)},
        problem_type="multi_label_classification",
    )
    model: Any = RobertaForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)  # so that texts differ
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("toxicity") / "tiny")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Callable[[str], float]:
    """What Detoxify does with one text: cut, sigmoid of the label."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def score(text: str) -> float:
        inputs = tokenizer(text, return_tensors="pt", truncation=True, padding=True)
        with torch.no_grad():
            return float(torch.sigmoid(model.eval()(**inputs)[0])[0, LABELS.index("toxicity")])

    return score


def test_scores_are_detoxifys_for_what_fits(folder: Path, reference: Callable[[str], float]) -> None:
    verdicts = ask_judge(Toxicity(str(folder), device="cpu"), *answers(TEXTS[:3]))
    assert [v.score for v in verdicts] == pytest.approx([reference(text) for text in TEXTS[:3]], abs=1e-6)
    assert len({v.score for v in verdicts}) == 3
    assert {(v.judge, v.measure, v.exit_layer, v.label) for v in verdicts} == {
        (f"toxicity:{folder}", "toxicity", 3, "")
    }
    assert all(0 < float(v.score or 0) < 1 for v in verdicts)


def test_long_answers_are_read_to_the_end(folder: Path, reference: Callable[[str], float]) -> None:
    long = "a zorb ! " * 9
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(long, add_special_tokens=False)["input_ids"]
    size, step = LENGTH - 2, LENGTH - 2 - LENGTH // 4
    windows = [tokens[start : start + size] for start in range(0, len(tokens) - (size - step), step)]
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        scores = [float(model(input_ids=torch.tensor([[0, *window, 2]])).logits[0, 1].sigmoid()) for window in windows]
    (verdict,) = Toxicity(str(folder))(*answers([long]))
    assert len(windows) > 2
    assert verdict.score == pytest.approx(max(scores), abs=1e-6)
    assert verdict.label == f"worst of {len(windows)} windows"
    assert scores[0] == pytest.approx(reference(long), abs=1e-6)  # all that Detoxify would read


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batches_change_no_score(folder: Path, batch_size: int) -> None:
    judge = Toxicity(str(folder), batch_size=batch_size)
    alone = [judge(*answers([text]))[0].score for text in TEXTS]
    together = judge(*answers(TEXTS))
    assert [v.score for v in together] == pytest.approx(alone, abs=1e-6)


def test_only_the_answer_of_harmful_requests_is_read(folder: Path) -> None:
    judge = Toxicity(str(folder))
    samples, responses = answers(["moss"])
    other = [Sample(id="0", prompt="something else entirely", kind="harmful")]
    assert judge(samples, responses) == judge(other, responses)
    kinds = [answers(["moss"], kind=kind) for kind in KINDS if kind != "harmful"]
    assert all(judge(*pair) == [] for pair in kinds)


def test_no_number_is_unscored(folder: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.classifier.out_proj.bias.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    (verdict,) = Toxicity(str(tmp_path))(*answers(["moss"]))
    assert (verdict.score, verdict.unscored) == (None, "the model returned no number")


def test_a_model_without_the_label_is_refused(tmp_path: Path) -> None:
    save_classifier(tmp_path, labels=("nice", "nasty"))
    with pytest.raises(ModelError, match="has no label `toxicity` or `toxic`: give a toxicity classifier"):
        Toxicity(str(tmp_path))(*answers(["moss"]))


def test_detoxifys_older_label_is_known(tmp_path: Path) -> None:
    save_classifier(tmp_path, labels=("toxic", "severe_toxic"))
    assert Toxicity(str(tmp_path))(*answers(["moss"]))[0].score is not None


def test_settings_come_before_weights_and_stay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Toxicity(str(folder))
    assert isinstance(judge, ModelJudge)
    with monkeypatch.context() as patch:
        patch.setattr("exitsafe.judges.local_model.load_judge_model", None)
        first = dict(judge.settings)
    judge(*answers(["moss"]))
    judge.unload()
    assert first == judge.settings == Toxicity(str(folder), batch_size=2).settings
    assert {"model", "revision", "dtype", "window"} <= set(json.loads(json.dumps(first)))
    assert judge(*answers(["moss"]))[0].score is not None


def test_the_default_is_pinned() -> None:
    settings = Toxicity().settings
    assert (settings["model"], settings["revision"], Toxicity().name) == (MODEL, REVISION, "toxicity")
    assert Toxicity(revision="0" * 40).settings["revision"] == "0" * 40


def test_nothing_to_judge_loads_nothing() -> None:
    assert Toxicity()([], []) == []


def test_half_a_surrogate_pair_is_read_as_a_question_mark(folder: Path) -> None:
    odd, plain = Toxicity(str(folder))(*answers(["zorb \ud800", "zorb ?"]))
    assert odd.score == pytest.approx(plain.score, abs=1e-6)
