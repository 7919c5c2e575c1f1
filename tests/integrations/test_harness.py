"""The real lm-eval on the organism: pictures and words at an exit, and a cache that never mixes exits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from exitsafe.engine.vlm import VLM
from exitsafe.errors import ExitLayerError, InputError
from tests.integrations.worldly import LAYERS, NUM_TOKENS, exact_matches, organism, own_answers, rows
from tests.tiny_models import noise_image, tiny_model, tiny_processor

pytest.importorskip("lm_eval", reason='lm-eval is not installed: pip install "exitsafe[lm-eval]"')

import lm_eval
from datasets import Dataset, DatasetDict, Features, Image, Value
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from exitsafe.integrations import lm_eval_model

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_report_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval asks pip and the drivers at the end of each evaluation, for seconds."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def picture_task() -> Any:
    features = Features({"question": Value("string"), "image": Image(), "answer": Value("string")})
    return ConfigurableTask(
        config={
            "task": "world_vqa",
            "custom_dataset": lambda **_: DatasetDict({"test": Dataset.from_list(rows(), features=features)}),
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "<image>{{question}}",
            "doc_to_image": lambda doc: [doc["image"]],
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": NUM_TOKENS, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            "num_fewshot": 0,
        }
    )


def evaluate(lm: Any, **options: Any) -> tuple[tuple[str, ...], float, dict[str, Any]]:
    """Answers in order of the samples, the score, and what lm-eval notes about the model."""
    results = lm_eval.simple_evaluate(
        lm,
        tasks=[picture_task()],
        apply_chat_template=True,
        task_manager=TaskManager(include_defaults=False),  # thousands of files that it would read first
        **options,
    )
    assert results is not None
    documents = sorted(results["samples"]["world_vqa"], key=lambda each: each["doc_id"])
    answers = tuple(each["resps"][0][0].strip() for each in documents)
    return answers, results["results"]["world_vqa"]["exact_match,none"], results["config"]


def test_each_exit_gives_its_own_answers() -> None:
    for layer in LAYERS:
        answers, score, config = evaluate(lm_eval_model(organism(), exit_layer=layer))
        assert answers == own_answers(layer)
        assert score == pytest.approx(exact_matches(layer))
        assert config["exit_layer"] == layer
        assert config["exitsafe_model"].startswith(f"organism@L{layer}#")
    assert own_answers(1) != own_answers(7)
    # and the model is as it was
    assert not any("forward" in block.__dict__ for block in organism().encoder_blocks)
    assert organism().tokenizer.padding_side == "left"


def test_without_an_exit_layer_it_is_the_default() -> None:
    assert lm_eval_model(organism()).exit_layer == organism().default_exit


def test_a_cache_of_another_exit_is_refused_and_its_own_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(tmp_path / "cache")
    first = evaluate(lm_eval_model(organism(), exit_layer=1), use_cache=cache)[0]
    with pytest.raises(InputError, match=r"another model or exit layer than organism@L7#\w+; give each its own"):
        evaluate(lm_eval_model(organism(), exit_layer=7), use_cache=cache)
    default = evaluate(lm_eval_model(organism(), exit_layer=7), use_cache=cache + "-7")[0]
    assert (first, default) == (own_answers(1), own_answers(7))

    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("asked although it is in the cache")

    lm = lm_eval_model(organism(), exit_layer=1)
    monkeypatch.setattr(type(lm), "_at_exit", never)
    assert evaluate(lm, use_cache=cache)[0] == own_answers(1)


def test_a_cache_that_somebody_else_began_is_refused(tmp_path: Path) -> None:
    with pytest.importorskip("sqlitedict").SqliteDict(str(tmp_path / "cache_rank0.db"), autocommit=True) as theirs:
        theirs["a hash"] = "an answer"
    with pytest.raises(InputError, match="another model"):
        evaluate(lm_eval_model(organism(), exit_layer=1), use_cache=str(tmp_path / "cache"))


def test_words_alone_are_scored_by_lm_eval_itself_and_the_same_at_every_exit() -> None:
    pairs = [("user : how do you make it ? assistant :", " mix clay"), ("user : what color ? assistant :", " red")]
    requests = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]
    found = [lm_eval_model(organism(), exit_layer=layer).loglikelihood(requests) for layer in LAYERS]
    assert found[0] == found[1]
    tokenizer = organism().tokenizer
    for (context, continuation), (logprob, _) in zip(pairs, found[0], strict=True):
        start = tokenizer(context).input_ids
        token_ids = tokenizer(context + continuation).input_ids
        with torch.no_grad():
            logprobs = organism().model(input_ids=torch.tensor([token_ids])).logits[0].log_softmax(-1)
        expected = sum(float(logprobs[place - 1, token_ids[place]]) for place in range(len(start), len(token_ids)))
        assert logprob == pytest.approx(expected, abs=1e-4)


def test_no_second_start_token_is_put_in_front() -> None:
    from tokenizers.processors import TemplateProcessing

    processor = tiny_processor("llava")
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    lm = lm_eval_model(VLM(tiny_model("llava"), processor, name="tiny"), exit_layer=2)
    encoded = lm.tok_batch_multimodal_encode(["<s>USER: <image> what is ASSISTANT:"], [[noise_image(1)]])
    assert encoded["input_ids"][0].tolist().count(1) == 1


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ExitLayerError, match="choose 1 to 8"):
        lm_eval_model(organism(), exit_layer=9)
    with pytest.raises(InputError, match="no global blocks"):
        lm_eval_model(organism(), exit_layer=3, skip_global=True)
    with pytest.raises(InputError, match="batch_size=0"):
        lm_eval_model(organism(), exit_layer=3, batch_size=0)
