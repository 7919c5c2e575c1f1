"""What judges with local weights share: which weights, loading them, replies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoModelForSequenceClassification, GenerationConfig

from exitsafe.errors import InputError, ModelError
from exitsafe.judges import local_model
from exitsafe.judges.local_model import (
    JudgeModel,
    greedy_replies,
    load_judge_model,
    longest_first,
    model_identity,
    pad_rows,
    pad_token_id,
    why_unread,
)
from tests.judges.tiny_judges import save_guard, teach, tiny_guard, tiny_guard_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROMPTS = ["moss?", "is foam round and is moss round?", "zorb", "foam foam foam foam foam foam foam foam"]
REPLIES = dict(zip(PROMPTS, ["yes it is", "no", "it is not so", "yes"], strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that knows a reply to each prompt."""
    tokenizer = tiny_guard_tokenizer([*REPLIES, *REPLIES.values()], specials=["<s>", "</s>"], eos="</s>")
    model = tiny_guard("llama", tokenizer)
    teach(model, tokenizer, REPLIES)
    return save_guard(model, tokenizer, tmp_path_factory.mktemp("judge"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty local cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def put_into_cache(hub: Path, folder: Path) -> None:
    cached = hub / "models--some--judge"
    shutil.copytree(folder, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)


def test_a_folder_is_known_by_its_contents(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert model_identity(str(tmp_path / "copy")) == model_identity(str(folder))
    (tmp_path / "copy" / "config.json").write_text("{}")
    assert model_identity(str(tmp_path / "copy")) != model_identity(str(folder))


def test_a_hub_id_is_known_by_its_commit(hub: Path, folder: Path) -> None:
    assert model_identity("some/judge", COMMIT) == COMMIT
    put_into_cache(hub, folder)
    assert model_identity("some/judge") == model_identity("some/judge", "main") == COMMIT


def test_a_cached_model_loads_offline_at_the_commit_named(
    hub: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_into_cache(hub, folder)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    judge = JudgeModel("some/judge")
    assert judge.settings == {"model": "some/judge", "revision": COMMIT, "dtype": "auto", "device": "cpu"}
    (hub / "models--some--judge" / "refs" / "main").write_text("f" * 40)
    model, tokenizer = judge.load()
    assert greedy_replies(model, tokenizer, ["zorb"], max_new_tokens=8, batch_size=1) == ["it is not so"]


def hub_error(kind: Any) -> Any:
    def fail(*args: Any, local_files_only: bool = False, **kwargs: Any) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        raise kind("no\nsecond line", response=SimpleNamespace(headers={}, request=None))

    return fail


@pytest.mark.parametrize(
    ("kind", "way_out"),
    [
        (GatedRepoError, "some/judge is gated: accept the licence at .*some/judge and log in with `hf auth login`"),
        (RepositoryNotFoundError, "not on the Hub or is private"),
        (RevisionNotFoundError, "no revision v9"),
        (HfHubHTTPError, "cannot find some/judge: no"),
    ],
)
def test_what_the_hub_refuses_is_said_with_the_way_out(
    kind: type[Exception], way_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_model, "hf_hub_download", hub_error(kind))
    with pytest.raises(ModelError, match=way_out) as caught:
        model_identity("some/judge", "v9")
    assert "\n" not in str(caught.value)


def test_a_proxy_that_refuses_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    client_error = HfHubHTTPError.__mro__[1]
    assert client_error not in (OSError, Exception)

    def fail(*args: Any, local_files_only: bool = False, **kwargs: Any) -> str:
        raise LocalEntryNotFoundError("not cached") if local_files_only else client_error("403 Forbidden")

    monkeypatch.setattr(local_model, "hf_hub_download", fail)
    with pytest.raises(ModelError, match="cannot find some/judge: 403 Forbidden"):
        model_identity("some/judge")


def test_a_model_out_of_reach_is_said_with_the_way_out(hub: Path, tmp_path: Path) -> None:
    for name, way_out in [
        ("some/judge", "`hf download some/judge`"),
        ("./not/a/folder", "give a Hub id or a folder"),
        ("a b", "give a Hub id or a folder"),
        (str(tmp_path), "has no config.json"),
    ]:
        with pytest.raises(ModelError, match=way_out) as caught:
            JudgeModel(name).load()
        assert "\n" not in str(caught.value)


def test_only_safetensors_are_loaded(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "pickled")
    model, _ = load_judge_model(None, str(folder))
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot load the judge model"):
        load_judge_model(None, str(tmp_path / "pickled"))


def test_code_of_a_checkpoint_never_runs(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "odd", "auto_map": {"AutoConfig": "code.Odd", "AutoModelForCausalLM": "code.Odd"}}
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    (tmp_path / "odd" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Odd: pass\n")
    with pytest.raises(ModelError, match="cannot load the judge model"):
        load_judge_model(None, str(tmp_path / "odd"))
    assert not (tmp_path / "ran").exists()


def test_dtype_and_device_are_checked_before_anything_loads() -> None:
    for wrong, way_out in [({"dtype": "float31"}, "choose auto, float32"), ({"device": "gpu"}, "choose auto, cpu")]:
        with pytest.raises(InputError, match=way_out):
            load_judge_model(None, "some/judge", **wrong)


def test_dtype_is_kept(folder: Path) -> None:
    assert load_judge_model(None, str(folder))[0].dtype == torch.float32
    assert load_judge_model(None, str(folder), dtype="bfloat16")[0].dtype == torch.bfloat16


def test_a_class_can_be_asked_for(folder: Path) -> None:
    model, _ = load_judge_model(AutoModelForSequenceClassification, str(folder))
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert not model.training


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_replies_are_those_of_each_prompt_alone(folder: Path, batch_size: int) -> None:
    model, tokenizer = load_judge_model(None, str(folder))
    replies = greedy_replies(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size)
    assert dict(zip(PROMPTS, replies, strict=True)) == REPLIES
    assert greedy_replies(model, tokenizer, [], max_new_tokens=12, batch_size=batch_size) == []


def test_half_a_surrogate_pair_does_not_stop_a_judge(folder: Path) -> None:
    model, tokenizer = load_judge_model(None, str(folder))
    odd, plain = greedy_replies(model, tokenizer, ["zorb \ud800", "zorb ?"], max_new_tokens=4, batch_size=2)
    assert odd == plain is not None


def test_left_padding_changes_no_logit(folder: Path) -> None:
    """Nor would a wrong mask or positions that count the padding pass here."""
    model, tokenizer = load_judge_model(None, str(folder))
    rows = [tokenizer(text)["input_ids"] for text in PROMPTS]
    input_ids, mask = pad_rows(rows, pad_token_id(tokenizer), side="left")
    config = GenerationConfig(max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
    generated = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=config)
    for row, logits in zip(rows, generated.logits[0], strict=True):
        alone = model(input_ids=torch.tensor([row])).logits[0, -1]
        torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)


def test_settings_saved_with_a_checkpoint_change_no_reply(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "loud")
    loud = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 9.0, "min_new_tokens": 9, "eos_token_id": 1}
    (tmp_path / "loud" / "generation_config.json").write_text(json.dumps(loud))
    model, tokenizer = load_judge_model(None, str(tmp_path / "loud"))
    assert greedy_replies(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=4) == list(REPLIES.values())


def test_a_prompt_must_fit_with_its_reply(folder: Path) -> None:
    model, tokenizer = load_judge_model(None, str(folder))
    (row,) = tokenizer(["zorb"])["input_ids"]
    model.config.max_position_embeddings = len(row) + 8
    assert greedy_replies(model, tokenizer, ["zorb"], max_new_tokens=8, batch_size=1) == ["it is not so"]
    replies = greedy_replies(model, tokenizer, ["zorb", PROMPTS[1]], max_new_tokens=9, batch_size=1)
    assert replies == [None, None]


def test_running_out_of_memory_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_judge_model(None, str(folder))
    generate = model.generate

    def small_only(*, input_ids: torch.Tensor, **inputs: Any) -> Any:
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return generate(input_ids=input_ids, **inputs)

    monkeypatch.setattr(model, "generate", small_only)
    assert greedy_replies(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=4) == list(REPLIES.values())


def test_longest_rows_go_first_and_results_keep_their_places() -> None:
    seen: list[list[int]] = []

    def lengths(batch: Any) -> list[int]:
        seen.append([len(row) for row in batch])
        return [10 * len(row) for row in batch]

    assert longest_first(lengths, [[1], [1] * 4, [1] * 2, [1] * 4], batch_size=2) == [10, 40, 20, 40]
    assert seen == [[4, 4], [2, 1]]


def test_padding_on_either_side() -> None:
    ids, mask = pad_rows([[5], [6, 7]], 9, side="left")
    assert (ids.tolist(), mask.tolist()) == ([[9, 5], [6, 7]], [[0, 1], [1, 1]])
    ids, mask = pad_rows([[5], [6, 7]], 9, side="right")
    assert (ids.tolist(), mask.tolist()) == ([[5, 9], [6, 7]], [[1, 0], [1, 1]])


def test_unloading_frees_and_the_next_load_loads_again(folder: Path) -> None:
    judge = JudgeModel(str(folder))
    first, _ = judge.load()
    assert judge.load()[0] is first
    judge.unload()
    assert judge.load()[0] is not first


def test_no_reply_is_made_of_numbers_that_are_not_finite(folder: Path) -> None:
    """NaN counts as the most likely token: its text would be read as the judge's word."""
    model, tokenizer = load_judge_model(None, str(folder))
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = torch.nan
    replies = greedy_replies(model, tokenizer, PROMPTS, max_new_tokens=4, batch_size=4)
    assert {why_unread(reply) for reply in replies} == {"the model returned no number"}
