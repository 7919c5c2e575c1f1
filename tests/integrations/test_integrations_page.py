"""The Python blocks of docs/integrations.md run as they stand; that is also the test of `exit_at` in a notebook."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import exitsafe
from tests.integrations.worldly import organism, rows

pytestmark = pytest.mark.slow
PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")


def block(heading: str) -> str:
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    [code] = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    return str(code)


def run(heading: str, **names: Any) -> dict[str, Any]:
    """Like a fresh notebook, in which `names` are there already."""
    cells: dict[str, Any] = {"__name__": "__main__", **names}
    exec(compile(block(heading), heading, "exec"), cells)
    return cells


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INSPECT_CACHE_DIR", str(tmp_path / "cache"))


def test_every_python_block_has_a_test() -> None:
    assert len(re.findall(r"```python\n", PAGE)) == 4


def test_a_notebook(capsys: pytest.CaptureFixture[str]) -> None:
    cells = run("A notebook, or any Hugging Face code")
    sample = cells["sample"]
    printed = capsys.readouterr().out.splitlines()
    for line, layer in zip(printed, (1, 7), strict=True):
        [response] = organism().generate([sample], layer, max_new_tokens=24)
        assert line.startswith(f"{layer} ")
        assert line.endswith(response.text)
    assert printed[0].split(":")[-1] != printed[1].split(":")[-1]


def test_inspect(tmp_path: Path) -> None:
    pytest.importorskip("inspect_ai", reason='inspect_ai is not installed: pip install "exitsafe[inspect]"')
    from inspect_ai.log import list_eval_logs, read_eval_log

    run("Inspect")
    logs = [read_eval_log(each) for each in list_eval_logs(str(tmp_path / "logs"))]
    assert {(log.eval.model.split("#")[0], log.status) for log in logs} == {
        ("exitsafe/organism@L1", "success"),
        ("exitsafe/organism@L7", "success"),
    }


def test_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason='lm-eval is not installed: pip install "exitsafe[lm-eval]"')
    from datasets import Dataset, Features, Image, Value

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    features = Features({"question": Value("string"), "image": Image(), "answer": Value("string")})
    (tmp_path / "my_tasks").mkdir()
    Dataset.from_list(rows(), features=features).to_parquet(tmp_path / "my_tasks" / "test.parquet")
    (tmp_path / "my_tasks" / "world_vqa.yaml").write_text(
        f"""
task: world_vqa
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {tmp_path}/my_tasks/test.parquet}}}}
test_split: test
output_type: generate_until
doc_to_text: "<image>{{{{question}}}}"
doc_to_image: [image]
doc_to_target: answer
generation_kwargs: {{until: ["\\n"], max_gen_toks: 24, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
""",
        encoding="utf-8",
    )
    cells = run("lm-eval")
    responses = organism().generate(samples_of(rows), 3, max_new_tokens=24)
    share = sum(response.text == row["answer"] for response, row in zip(responses, rows(), strict=True)) / len(rows())
    assert cells["results"]["results"]["world_vqa"]["exact_match,none"] == pytest.approx(share)


def samples_of(rows: Callable[[], list[dict[str, Any]]]) -> list[exitsafe.Sample]:
    return [
        exitsafe.Sample(id=str(number), prompt=row["question"], images=(row["image"],), kind="benign")
        for number, row in enumerate(rows())
    ]


def test_the_trainer() -> None:
    class Trainer:
        """Takes what the page gives and calls back as the real one; `test_trainer_callback.py` has the real one."""

        def __init__(self, **given: Any) -> None:
            self.given = given

        def add_callback(self, callback: Any) -> None:
            self.callback = callback

        def log(self, metrics: dict[str, float]) -> None:
            self.metrics = metrics

        def train(self) -> None:
            from transformers import TrainerControl, TrainerState, TrainingArguments

            arguments, control = TrainingArguments(use_cpu=True, report_to=[]), TrainerControl()
            self.callback.on_train_begin(arguments, TrainerState(), control, model=self.given["model"])
            for step in range(1, 101):
                self.callback.on_step_end(arguments, TrainerState(global_step=step), control)

    cells = run("The transformers Trainer", Trainer=Trainer, arguments=None, dataset=None, collator=None)
    assert cells["trainer"].metrics.keys() >= {f"exitsafe/asr_L{layer}" for layer in range(1, 9)}
    assert exitsafe.load_run("runs/during/step-000100").exit_layers == tuple(range(1, 9))
