"""Audits answered by a real vLLM server: the answers of the local engine, at every exit and whatever is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import exitsafe
from exitsafe.data import load_suites
from exitsafe.engine.load import load_vlm
from exitsafe.engine.prompts import Row
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError, ModelError
from exitsafe.records import Sample
from exitsafe.results.run import AuditRun, load_run
from tests.engines.server import python_of
from tests.engines.vllm_server import NAME, servable, vllm_server
from tests.model_folders import save_tiny_folder
from tests.tiny_models import WORDS, noise_image, tiny_llava, tiny_processor

pytestmark = pytest.mark.engines
TIE = 1e-3
"""The largest difference between the two best logits at which an answer may go either way."""
SUITES = [f"organism-{kind}" for kind in ("harmful", "borderline", "benign", "vqa")]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the organism's language model."""
    torch.manual_seed(0)
    parts = r".*language_model.*(q_proj|v_proj|down_proj)"
    model: Any = get_peft_model(load_vlm("organism").base_model, LoraConfig(r=8, target_modules=parts))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.15)
    folder = tmp_path_factory.mktemp("adapters") / "repaired"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    python_of("vllm")
    vlm = load_vlm("organism")
    return servable(vlm.base_model, vlm.processor, tmp_path_factory.mktemp("models") / "organism")


@pytest.fixture(scope="module")
def server(folder: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The organism, and the organism with the adapter as "repaired"."""
    lora = ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"repaired={adapter}"]
    with vllm_server(folder, *lora, log=tmp_path_factory.mktemp("logs") / "vllm.log") as url:
        yield f"{url}/v1#{NAME}"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> AuditRun:
    samples = load_suites(SUITES, limit=12)
    return exitsafe.audit("organism", samples, out=tmp_path_factory.mktemp("runs") / "local")


def texts(run: AuditRun) -> dict[tuple[str, int], tuple[str, int, str]]:
    return {(r.sample_id, r.exit_layer): (r.text, r.num_tokens, r.finish_reason) for r in run.responses()}


def scores(run: AuditRun) -> set[tuple[Any, ...]]:
    return {(v.sample_id, v.exit_layer, v.judge, v.measure, v.score) for v in run.verdicts()}


def test_the_organism_at_every_exit(server: str, local: AuditRun, tmp_path: Path) -> None:
    run = exitsafe.audit("organism", load_suites(SUITES, limit=12), engine=server, out=tmp_path / "run")
    assert texts(run) == texts(local)
    assert scores(run) == scores(local)
    assert len(set(texts(run).values())) > 20
    assert run.settings["engine"]["model"] == NAME


def test_an_adapter_by_its_name_on_the_server(server: str, adapter: Path, tmp_path: Path) -> None:
    vlm = load_vlm("organism", adapter=adapter, offload_decoder=True)
    samples, url = load_suites(SUITES, limit=4), server.partition("#")[0]
    with pytest.raises(ModelError, match="serves a different model from organism with this adapter"):
        exitsafe.audit(vlm, samples, engine=server, out=tmp_path / "base")
    with pytest.raises(InputError, match="add #NAME"):
        exitsafe.audit(vlm, samples, engine=url, out=tmp_path / "none")
    run = exitsafe.audit(vlm, samples, engine=f"{url}#repaired", out=tmp_path / "run")
    own = exitsafe.audit(load_vlm("organism", adapter=adapter), samples, out=tmp_path / "own")
    assert texts(run) == texts(own)


def test_sampled_answers_repeat(server: str, tmp_path: Path) -> None:
    samples = load_suites(SUITES[:1], limit=6)
    runs = [
        exitsafe.audit("organism", samples, engine=server, temperature=1.3, exit_layers=[1, 6], out=tmp_path / name)
        for name in ("one", "two")
    ]
    assert texts(runs[0]) == texts(runs[1])


def test_the_server_itself_as_a_black_box(server: str, local: AuditRun, tmp_path: Path) -> None:
    """It answers from pictures as the default exit does."""
    samples = load_suites(SUITES, limit=12)
    run = exitsafe.audit(server, samples, exit_layers=7, max_new_tokens=24, out=tmp_path / "run")
    assert texts(run) == {row: text for row, text in texts(local).items() if row[1] == 7}
    assert exitsafe.compare(local, run).exit_layers == (7,)


def audit_command(out: Path, url: str, *before: str) -> subprocess.Popen[bytes]:
    flags = ["audit", "organism", "--limit", "12", "--engine", url, "--batch-size", "8", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *(before or ["exitsafe"]), *flags]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


def wait_for_answers(out: Path, process: subprocess.Popen[bytes]) -> None:
    """Until this process has saved some answers."""

    def saved() -> int:
        return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())

    before = saved()
    while saved() < before + 6000:
        assert process.poll() is None, (process.stderr or sys.stderr.buffer).read()
        time.sleep(0.02)


def test_kill_9_of_the_audit_and_of_the_server(folder: Path, local: AuditRun, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with vllm_server(folder, log=tmp_path / "one.log") as url:
        audit = audit_command(out, url)
        wait_for_answers(out, audit)
        audit.kill()
        audit.wait()
        audit = audit_command(out, url)
        wait_for_answers(out, audit)
    _, error = audit.communicate()
    assert audit.returncode in (0, 2)  # it may just have been done
    if audit.returncode == 2:
        last = error.decode().strip().splitlines()[-1]
        assert last.startswith("exitsafe: http://127.0.0.1")
        assert "rerun the same command" in last
    with vllm_server(folder, log=tmp_path / "two.log") as url:
        audit = audit_command(out, url)
        assert audit.wait() == 0
    assert texts(load_run(out)) == texts(local)
    assert scores(load_run(out)) == scores(local)


def test_two_processes_share_the_encoding(server: str, local: AuditRun, tmp_path: Path) -> None:
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "exitsafe"]
    audit = audit_command(tmp_path / "run", server, *launch, *plain)
    _, error = audit.communicate()
    assert audit.returncode == 0, error
    assert texts(load_run(tmp_path / "run")) == texts(local)


def wide(config: Any) -> None:
    """Heads of 32 numbers, the narrowest that vLLM has on a CPU."""
    text = config.get_text_config(decoder=True)
    text.num_attention_heads = text.num_key_value_heads = 2
    if getattr(text, "head_dim", None):
        text.head_dim = 32
    section = {"qwen2_5_vl": [4, 6, 6], "qwen3_vl": [6, 5, 5]}.get(config.model_type)
    if section:
        more = {"mrope_interleaved": True} if config.model_type == "qwen3_vl" else {}
        text.rope_parameters = {**text.rope_parameters, "mrope_section": section, **more}


@pytest.mark.parametrize("kind", ["llava-siglip", "qwen2_5_vl", "qwen3_vl"])
def test_other_families_at_every_exit(kind: str, tmp_path: Path) -> None:
    """Grids, deepstack, pictures of several sizes, and two pictures in a prompt."""
    python_of("vllm")
    made, served = tmp_path / "made", tmp_path / "served"
    if kind == "llava-siglip":
        servable(tiny_llava(siglip=True, head_dim=32), tiny_processor(kind), served)
    else:
        vlm = load_vlm(save_tiny_folder(kind, made, change=wide))
        servable(vlm.base_model, vlm.processor, served)
    vlm = load_vlm(served)
    samples = [
        Sample(
            id=f"s{number}",
            prompt=" ".join(WORDS[number : number + 3 + number % 4]),
            images=tuple(noise_image(10 * number + n, (28 + 14 * n, 30 + 9 * number)) for n in range(count)),
            kind="benign",
        )
        for number, count in enumerate([1, 1, 2, 0, 1, 1, 1, 2])
    ]
    given: dict[str, Any] = {"max_new_tokens": 12}
    own = exitsafe.audit(vlm, samples, out=tmp_path / "own", **given)
    with vllm_server(served, log=tmp_path / "vllm.log", max_model_len=400) as url:
        run = exitsafe.audit(str(served), samples, engine=url, out=tmp_path / "run", **given)
    assert len(set(texts(own).values())) > len(samples)
    other = [row for row, text in texts(own).items() if texts(run)[row] != text]
    gaps = {row: gap_where_they_part(vlm, own, run, samples, *row) for row in other}
    assert all(gap < TIE for gap in gaps.values()), json.dumps({str(row): gap for row, gap in gaps.items()})


def gap_where_they_part(
    vlm: VLM, own: AuditRun, run: AuditRun, samples: list[Sample], sample_id: str, exit_layer: int
) -> float:
    """The difference of the two best logits at the first token in which two answers differ."""
    one, two = (
        vlm.tokenizer.encode(texts(each)[sample_id, exit_layer][0], add_special_tokens=False) for each in (own, run)
    )
    same = next((n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    (sample,) = (each for each in samples if each.id == sample_id)
    prompt = vlm.encode_prompt(sample)
    features = vlm.prompt_features([prompt], [exit_layer])[0][exit_layer]
    row = Row(prompt=prompt, exit_layer=exit_layer, features=features)
    hidden, _, _ = vlm.response_states([row], [torch.tensor([*one[:same], 0])])
    best = vlm.logits(hidden)[0, -1].topk(2).values
    return float(best[0] - best[1])


def test_a_server_without_image_embeddings(folder: Path, tmp_path: Path) -> None:
    samples = load_suites(SUITES[:1], limit=2)
    with (
        vllm_server(folder, log=tmp_path / "vllm.log", mm_embeds=False) as url,
        pytest.raises(ModelError, match=r"\(status 400\)\): start it with vllm serve MODEL --enable-mm-embeds"),
    ):
        exitsafe.audit("organism", samples, engine=url, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
