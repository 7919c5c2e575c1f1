"""The real Inspect, lmms-eval and lm-eval against a real server: right answers at each exit, from their caches too."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import ROOT, blocks
from tests.serve.process import serve
from tests.serve.served import data_url
from tests.serve.worldly import LAYERS, NUM_TOKENS, exact_matches, organism, own_answers, rows, samples

pytestmark = pytest.mark.slow
MODELS = ("organism@L1", "organism")
"""One exit, and the default one: `LAYERS`."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running process: its URL and its log."""

    url: str
    log: Path

    def num_answered(self) -> int:
        """How many requests it has answered."""
        return len(re.findall(r"^chatcmpl-\S+ \S+ 200 ", self.log.read_text(), re.M))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("serve") / "log"
    with serve(log=log) as (_, ready):
        yield Server(url=ready["url"], log=log)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same task for lmms-eval and lm-eval."""
    from datasets import Dataset, Features, Image, Value

    folder = tmp_path_factory.mktemp("tasks")
    features = Features({"question": Value("string"), "image": Image(), "answer": Value("string")})
    Dataset.from_list(rows(), features=features).to_parquet(folder / "test.parquet")
    for name, special in (("lmms", LMMS_TASK), ("lm_eval", LM_EVAL_TASK)):
        (folder / name).mkdir()
        text = (COMMON_TASK + special).replace("FOLDER", str(folder)).replace("TOKENS", str(NUM_TOKENS))
        (folder / name / "world_vqa.yaml").write_text(text, encoding="utf-8")
    (folder / "lmms" / "world_words.py").write_text(LMMS_WORDS, encoding="utf-8")
    return folder


COMMON_TASK = """
task: world_vqa
dataset_path: parquet
dataset_kwargs: {data_files: {test: FOLDER/test.parquet}}
test_split: test
output_type: generate_until
doc_to_target: answer
"""
LMMS_TASK = """
doc_to_visual: !function world_words.doc_to_visual
doc_to_text: question
process_results: !function world_words.process_results
generation_kwargs: {max_new_tokens: TOKENS, temperature: 0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
LMMS_WORDS = """
def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def process_results(doc, results):
    return {"exact_match": float(results[0] == doc["answer"])}
"""
LM_EVAL_TASK = """
doc_to_text: "{{question}}"
doc_to_image: [image]
generation_kwargs: {until: ["\\n"], max_gen_toks: TOKENS, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def run(program: str, given: dict[str, Any], folder: Path, **environment: str) -> Any:
    """What a program prints last, as JSON; in a process of its own, since these tools change global settings."""
    variables = os.environ | {"HF_HOME": str(folder / "hub"), "HF_DATASETS_OFFLINE": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(given)],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def check_answers(ask: Any, server: Server, *, models: Sequence[str] = MODELS) -> None:
    """Ask at both exits with an empty cache, then again from the cache, in the other order; then another exit."""
    before = server.num_answered()
    for model, layer in zip(models, LAYERS, strict=True):
        answers, score = ask(model)
        assert tuple(answers) == own_answers(layer)
        assert score == pytest.approx(exact_matches(layer))
    assert own_answers(1) != own_answers(7)
    asked = server.num_answered()
    assert asked == before + 2 * len(samples())
    for model, layer in reversed(list(zip(models, LAYERS, strict=True))):
        answers, score = ask(model)
        assert tuple(answers) == own_answers(layer)
        assert score == pytest.approx(exact_matches(layer))
    assert server.num_answered() == asked, "the second time, all answers come from the cache"


INSPECT = """
import json, sys
import inspect_ai
from inspect_ai import Task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageUser, ContentImage, ContentText
from inspect_ai.scorer import exact
from inspect_ai.solver import generate

given = json.loads(sys.argv[1])
world = [
    Sample(
        id=number,
        input=[ChatMessageUser(content=[ContentImage(image=row["image"]), ContentText(text=row["question"])])],
        target=row["answer"],
    )
    for number, row in enumerate(given["rows"])
]
task = Task(dataset=MemoryDataset(world), solver=generate(cache=True), scorer=exact())
[log] = inspect_ai.eval(
    task, model=given["model"], display="none", log_dir=given["logs"], max_tokens=given["max_tokens"]
)
assert log.status == "success", log.error
answers = {each.id: each.output.completion for each in log.samples}
score = log.results.scores[0].metrics["mean"].value
print(json.dumps([[answers[number] for number in sorted(answers)], score]))
"""


def test_inspect(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("inspect_ai")
    world = [
        {"question": sample.prompt, "answer": sample.answers[0], "image": data_url(sample.images[0])}
        for sample in samples()
    ]

    def ask(model: str) -> Any:
        given = {
            "model": f"openai-api/exitsafe/{model}",
            "rows": world,
            "logs": str(tmp_path / "logs"),
            "max_tokens": NUM_TOKENS,
        }
        variables = {"EXITSAFE_BASE_URL": server.url, "EXITSAFE_API_KEY": "none"}
        return run(INSPECT, given, tmp_path, INSPECT_CACHE_DIR=str(tmp_path / "cache"), **variables)

    check_answers(ask, server)


LMMS = """
import json, sys
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

given = json.loads(sys.argv[1])
results = simple_evaluate(
    model="openai",
    model_args=f"base_url={given['url']},api_key=none,model_version={given['model']}",
    tasks=["world_vqa"],
    task_manager=TaskManager(include_path=given["tasks"], include_defaults=False),
    use_cache=given["cache"],
    log_samples=True,
)
documents = sorted(results["samples"]["world_vqa"], key=lambda each: each["doc_id"])
answers = [each["filtered_resps"][0] for each in documents]
print(json.dumps([answers, results["results"]["world_vqa"]["exact_match,none"]]))
"""


def test_lmms_eval(server: Server, tasks: Path, tmp_path: Path) -> None:
    pytest.importorskip(
        "lmms_eval.evaluator",
        reason="lmms-eval is not installed: pip install --no-deps lmms-eval, and loguru",
        exc_type=ImportError,
    )

    def ask(model: str) -> Any:
        given = {"url": server.url, "model": model, "tasks": str(tasks / "lmms"), "cache": str(tmp_path / "cache")}
        return run(LMMS, given, tmp_path)

    check_answers(ask, server)


LM_EVAL = """
import json, sys
import lm_eval.evaluator
from lm_eval.tasks import TaskManager

lm_eval.evaluator.add_env_info = lambda results: None  # it asks pip and the drivers, for seconds
given = json.loads(sys.argv[1])
results = lm_eval.simple_evaluate(
    "local-chat-completions",
    model_args=f"base_url={given['url']}/chat/completions,model={given['model']},num_concurrent=4",
    tasks=["world_vqa"],
    task_manager=TaskManager(include_path=given["tasks"], include_defaults=False),
    apply_chat_template=True,
    use_cache=given["cache"],
    log_samples=True,
)
documents = sorted(results["samples"]["world_vqa"], key=lambda each: each["doc_id"])
answers = [each["resps"][0][0] for each in documents]
print(json.dumps([answers, results["results"]["world_vqa"]["exact_match,none"]]))
"""


def test_lm_eval(server: Server, tasks: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")

    def ask(model: str) -> Any:
        cache = str(tmp_path / model)  # lm-eval keys its cache by the request alone: a file for each exit
        return run(
            LM_EVAL, {"url": server.url, "model": model, "tasks": str(tasks / "lm_eval"), "cache": cache}, tmp_path
        )

    check_answers(ask, server)


def test_the_pages_own_client_code_runs(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    samples()[3].images[0].save("f.png")  # type: ignore[union-attr]
    [block] = [each for each in blocks(ROOT / "docs" / "serve.md") if "from openai import OpenAI" in each.text]
    exec(block.text.replace("http://127.0.0.1:8000/v1", server.url), {})
    said = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert said.keys() == set(MODELS)
    question = type(samples()[3])(
        id="s", prompt="what color is the left shape ?", images=samples()[3].images, kind="benign"
    )
    for model, layer in zip(MODELS, LAYERS, strict=True):
        assert said[model] == organism().generate([question], layer)[0].text
