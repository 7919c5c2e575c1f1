"""The real lmms-eval on the organism, found by its entry point: right answers at each exit with its cache on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exitsafe.errors import ExitLayerError, InputError
from tests.forks import together
from tests.integrations.worldly import LAYERS, NUM_TOKENS, exact_matches, organism, own_answers, png, rows, samples

pytest.importorskip(
    "lmms_eval.evaluator",
    reason="lmms-eval is not installed; it declares torchvision, which this CPU build of torch has none for: "
    "pip install --no-deps lmms-eval, and loguru",
    exc_type=ImportError,
)

from datasets import Dataset, Features, Image, Value
from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model_manifest
from lmms_eval.tasks import TaskManager

from exitsafe.integrations.lmms_model import ExitsafeLMM

pytestmark = pytest.mark.slow
TASK = """
task: world_vqa
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: FOLDER/test.parquet
test_split: test
output_type: generate_until
doc_to_visual: !function world_words.doc_to_visual
doc_to_text: question
doc_to_target: answer
process_results: !function world_words.process_results
generation_kwargs:
  max_new_tokens: TOKENS
  temperature: 0
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
WORDS = """
def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def process_results(doc, results):
    return {"exact_match": float(results[0] == doc["answer"])}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tasks")
    features = Features({"question": Value("string"), "image": Image(), "answer": Value("string")})
    Dataset.from_list(rows(), features=features).to_parquet(folder / "test.parquet")
    (folder / "world_words.py").write_text(WORDS, encoding="utf-8")
    text = TASK.replace("FOLDER", str(folder)).replace("TOKENS", str(NUM_TOKENS))
    (folder / "world_vqa.yaml").write_text(text, encoding="utf-8")
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(autouse=True)
def own_hub_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def evaluate(model: Any, tasks: Any, *, cache: Path, arguments: str = "") -> tuple[tuple[str, ...], float]:
    results = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=["world_vqa"],
        batch_size=4,
        task_manager=tasks,
        use_cache=str(cache),
        log_samples=True,
    )
    assert results is not None
    documents = sorted(results["samples"]["world_vqa"], key=lambda each: each["doc_id"])
    answers = tuple(each["filtered_resps"][0] for each in documents)
    return answers, results["results"]["world_vqa"]["exact_match,none"]


@pytest.fixture(scope="module")
def model() -> ExitsafeLMM:
    return ExitsafeLMM("organism", exit_layer=1, batch_size=4)


def instance(*arguments: Any, request_type: Any = "generate_until") -> Instance:
    metadata: Any = {"task": "t", "doc_id": 0, "repeats": 1}
    return Instance(request_type=request_type, arguments=arguments, idx=0, metadata=metadata)


def chat(model: ExitsafeLMM, content: Any, options: dict[str, Any], number: int = 0) -> Instance:
    """A request as the chat kind has it, about one document."""
    model.task_dict = {"t": {"test": list(range(8))}}
    return instance("", lambda doc: [{"role": "user", "content": content}], options, number, "t", "test")


def question(number: int = 0) -> list[dict[str, Any]]:
    sample = samples()[number]
    return [{"type": "image", "url": sample.images[0]}, {"type": "text", "text": sample.prompt}]


# first, since forks may not take the locks of a data set that this process has loaded
@pytest.mark.slow
def test_two_processes_share_the_documents(tasks: Any, tmp_path: Path) -> None:
    def work(number: int) -> None:
        arguments = "pretrained=organism,exit_layer=1"
        results = simple_evaluate(
            "exitsafe", model_args=arguments, tasks=["world_vqa"], task_manager=tasks, log_samples=True
        )
        assert (results is None) == bool(number)
        if results is not None:
            documents = sorted(results["samples"]["world_vqa"], key=lambda each: each["doc_id"])
            assert tuple(each["filtered_resps"][0] for each in documents) == own_answers(1)

    together(2, work)


def test_each_exit_gives_its_own_answers_with_the_cache_on(
    tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert get_model_manifest("exitsafe").chat_class_path == "exitsafe.integrations.lmms_model.ExitsafeLMM"
    arguments = {1: "pretrained=organism,exit_layer=1", 7: "pretrained=organism"}
    for layer in LAYERS:
        answers, score = evaluate("exitsafe", tasks, cache=tmp_path, arguments=arguments[layer])
        assert answers == own_answers(layer)
        assert score == pytest.approx(exact_matches(layer))
    assert own_answers(1) != own_answers(7)

    def never(*args: Any) -> Any:
        raise AssertionError("asked although it is in the cache")

    monkeypatch.setattr(ExitsafeLMM, "generate_until", never)
    for layer in reversed(LAYERS):
        assert evaluate("exitsafe", tasks, cache=tmp_path, arguments=arguments[layer])[0] == own_answers(layer)
    with pytest.raises(AssertionError, match="asked although"):
        evaluate("exitsafe", tasks, cache=tmp_path, arguments="pretrained=organism,exit_layer=2")


def test_models_given_as_objects_do_not_mix_in_the_cache_either(tasks: Any, tmp_path: Path) -> None:
    """lmms-eval writes the object into the key: by its name, not by where it lies in memory."""
    for layer in LAYERS:
        given = ExitsafeLMM("organism", exit_layer=layer, batch_size=4)
        assert repr(given).startswith(f"exitsafe/organism@L{layer}#")
        assert evaluate(given, tasks, cache=tmp_path)[0] == own_answers(layer)


def test_conversations_pictures_in_files_and_stop_texts(model: ExitsafeLMM, tmp_path: Path) -> None:
    sample = samples()[0]
    (tmp_path / "a.png").write_bytes(png(sample))
    in_file = [{"type": "image", "url": str(tmp_path / "a.png")}, {"type": "text", "text": sample.prompt}]
    options = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "top_p": None, "num_beams": 1}
    found = model.generate_until(
        [
            chat(model, in_file, options),
            chat(model, question(), {**options, "until": ["with"]}),
            chat(model, question(), {**options, "until": "then"}),
            chat(model, sample.prompt, options),
        ]
    )
    whole = own_answers(1)[0]
    assert [each.text for each in found[:3]] == [whole, whole.split(" with")[0], whole.split(" then")[0]]
    [alone] = organism().generate(
        [type(sample)(id="s", prompt=sample.prompt, kind="benign")], 1, max_new_tokens=NUM_TOKENS
    )
    assert found[3].text == alone.text
    assert found[1].token_counts.output_tokens == 3
    assert found[0].token_counts.input_tokens == len(organism().encode_prompt(sample).input_ids)


def test_repeated_requests_draw_anew_and_the_same_ones_the_next_time(model: ExitsafeLMM) -> None:
    requests = [chat(model, question(), {"max_new_tokens": NUM_TOKENS, "temperature": 4.0})] * 4
    texts = [each.text for each in model.generate_until(requests)]
    assert len(set(texts)) > 1
    assert [each.text for each in model.generate_until(requests)] == texts


@pytest.mark.parametrize(
    ("options", "temperature"),
    [
        ({}, 0.0),
        ({"temperature": 0.5}, 0.5),
        ({"temperature": 0.5, "do_sample": False, "top_p": 0.9}, 0.0),
        ({"do_sample": True}, 1.0),
    ],
)
def test_temperatures(model: ExitsafeLMM, options: dict[str, Any], temperature: float) -> None:
    request = model._chat(organism().encode_prompt(samples()[0]), options)
    assert (request.temperature, request.exit_layer) == (temperature, 1)
    assert request.max_new_tokens == organism().context_length - len(request.prompt.input_ids)  # 256 do not fit


@pytest.mark.parametrize(
    ("content", "options", "complaint"),
    [
        (question(), {"num_beams": 4}, "does not support the generation option num_beams=4"),
        (question(), {"temperature": 1.0, "top_p": 0.5}, "does not support the generation option top_p=0.5"),
        ([{"type": "video", "url": "a.mp4"}], {}, "contains video"),
        ([{"type": "image", "url": "http://localhost/a.png"}], {}, "has a picture of type str"),
        ("mix " * 200, {}, "leaves no room"),
    ],
)
def test_what_cannot_be_met_is_refused(
    model: ExitsafeLMM, content: Any, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint) as caught:
        model.generate_until([chat(model, content, options)])
    assert samples()[0].prompt not in str(caught.value)


def test_log_likelihoods(model: ExitsafeLMM) -> None:
    model.task_dict = {"t": {"test": list(samples())}}

    def pictures(sample: Any) -> list[Any]:
        return list(sample.images)

    def target(sample: Any) -> str:
        return str(sample.answers[0])

    found = model.loglikelihood(
        [
            instance(samples()[0].prompt, target, pictures, 0, "t", "test", request_type="loglikelihood"),
            instance(samples()[0].prompt, own_answers(7)[0], pictures, 0, "t", "test", request_type="loglikelihood"),
            instance("", own_answers(1)[0], request_type="loglikelihood"),
        ]
    )
    assert found[0][1]
    assert not found[1][1]
    assert found[0][0] > found[1][0]
    assert found[2][0] < found[0][0]  # not asked for


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"exit_layer": 9}, "choose 1 to 8"),
        ({"exitlayer": 3}, "no model argument 'exitlayer'"),
        ({"batch_size": "many"}, "batch_size=many"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"skip_global": True}, "no global blocks"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises((InputError, ExitLayerError), match=complaint):
        ExitsafeLMM("organism", **arguments)
