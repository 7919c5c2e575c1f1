"""The real inspect_ai on the organism: right answers at each exit with its cache on, and clear words otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

from exitsafe.engine.load import load_vlm
from exitsafe.errors import InputError
from tests.integrations.worldly import (
    LAYERS,
    NUM_TOKENS,
    data_url,
    exact_matches,
    organism,
    own_answers,
    png,
    samples,
)

pytest.importorskip("inspect_ai", reason='inspect_ai is not installed: pip install "exitsafe[inspect]"')

import inspect_ai
from inspect_ai import Task
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.dataset import MemoryDataset
from inspect_ai.dataset import Sample as InspectSample
from inspect_ai.log import EvalLog
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    ContentAudio,
    ContentImage,
    ContentText,
    GenerateConfig,
    Model,
    get_model,
)
from inspect_ai.scorer import exact
from inspect_ai.solver import generate
from inspect_ai.tool import ToolInfo

from exitsafe.integrations import inspect_model
from exitsafe.integrations.shared_worker import SharedWorker

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSPECT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("INSPECT_LOG_DIR", str(tmp_path / "logs"))


def task() -> Task:
    return Task(
        dataset=MemoryDataset(
            [
                InspectSample(
                    id=sample.id,
                    input=[
                        ChatMessageUser(content=[ContentImage(image=data_url(sample)), ContentText(text=sample.prompt)])
                    ],
                    target=sample.answers[0],
                )
                for sample in samples()
            ]
        ),
        solver=generate(cache=True),
        scorer=exact(),
    )


def run(models: Sequence[str], folder: Path, **options: Any) -> list[EvalLog]:
    logs: list[EvalLog] = inspect_ai.eval(
        task(), model=list(models), display="none", log_dir=str(folder), max_tokens=NUM_TOKENS, **options
    )
    return logs


def answers(log: EvalLog) -> tuple[str, ...]:
    by_id = {each.id: each.output.completion for each in log.samples or []}
    return tuple(by_id[sample.id] for sample in samples())


def say(model: Model, *messages: ChatMessage, **config: Any) -> Any:
    settings = {"max_tokens": NUM_TOKENS, **config}
    return anyio.run(lambda: model.generate(list(messages), config=GenerateConfig(**settings)))


def ask(number: int = 0) -> ChatMessageUser:
    sample = samples()[number]
    return ChatMessageUser(content=[ContentImage(image=data_url(sample)), ContentText(text=sample.prompt)])


def test_each_exit_gives_its_own_answers_with_the_cache_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["exitsafe/organism@L1", "exitsafe/organism"]  # the second without an exit: the default, 7
    first = run(names, tmp_path / "first")
    for layer, log in zip(LAYERS, first, strict=True):
        assert (log.status, answers(log)) == ("success", own_answers(layer))
        assert log.eval.model.startswith(f"exitsafe/organism@L{layer}#")
        assert log.results is not None
        assert log.results.scores[0].metrics["mean"].value == pytest.approx(exact_matches(layer))
        usage = log.stats.model_usage[log.eval.model]
        responses = organism().generate(samples(), layer, max_new_tokens=NUM_TOKENS)
        assert usage.output_tokens == sum(response.num_tokens for response in responses)
        assert usage.input_tokens == sum(len(organism().encode_prompt(sample).input_ids) for sample in samples())
        assert {each.output.stop_reason for each in log.samples or []} == {"stop"}
    assert answers(first[0]) != answers(first[1])

    def never(self: Any, question: Any) -> Any:
        raise AssertionError("asked although it is in the cache")

    monkeypatch.setattr(SharedWorker, "ask", never)
    again = run([*reversed(names), "exitsafe/organism@L7"], tmp_path / "again")
    assert [answers(log) for log in again] == [own_answers(7), own_answers(1), own_answers(7)]
    other = run(["exitsafe/organism@L2"], tmp_path / "other")  # no answer of another exit stands in for it
    assert other[0].status == "error"


def test_the_name_holds_everything_that_decides_an_answer() -> None:
    plain, in_batches = get_model("exitsafe/organism@L3"), get_model("exitsafe/organism@L3", batch_size=2)
    half = get_model("exitsafe/organism@L3", dtype="bfloat16")
    other = get_model("exitsafe/organism:text@L3")
    assert len({str(model) for model in (plain, in_batches, half, other)}) == 4
    assert str(get_model(str(plain))) == str(plain)  # as a log has it
    path = Path(inspect_model.__file__).parents[1] / "world" / "weights" / "organism"
    assert str(get_model(f"exitsafe/{path}@L3")).startswith(f"exitsafe/{path}@L3#")


def test_an_adapter_changes_name_and_answers(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = load_vlm("organism")
    config = LoraConfig(target_modules=base.linear_layers, r=4, init_lora_weights=False)
    get_peft_model(base.model, config).save_pretrained(str(tmp_path / "adapter"))
    plain = get_model("exitsafe/organism@L1")
    adapted = get_model("exitsafe/organism@L1", adapter=str(tmp_path / "adapter"))
    assert str(plain) != str(adapted)
    said = [say(model, ask(), cache=True).completion for model in (plain, adapted)]
    repaired = load_vlm("organism", adapter=tmp_path / "adapter")
    [expected] = repaired.generate(samples()[:1], 1, max_new_tokens=NUM_TOKENS)
    assert said == [own_answers(1)[0], expected.text]
    assert said[0] != said[1]


def test_exits_of_one_model_share_its_weights_and_its_connections() -> None:
    first, second = (get_model(f"exitsafe/organism@L{layer}").api for layer in LAYERS)
    other = get_model("exitsafe/organism:text@L1").api
    assert isinstance(first, inspect_model.ExitsafeAPI)
    assert isinstance(second, inspect_model.ExitsafeAPI)
    assert first.worker is second.worker
    assert first.connection_key() == second.connection_key() != other.connection_key()
    assert first.max_connections() == 64


def test_turns_files_and_stop_texts(tmp_path: Path) -> None:
    model = get_model("exitsafe/organism@L1")
    sample = samples()[0]
    (tmp_path / "a.png").write_bytes(png(sample))
    api = model.api
    in_file = ChatMessageUser(content=[ContentImage(image=str(tmp_path / "a.png")), ContentText(text=sample.prompt)])
    config = GenerateConfig(max_tokens=NUM_TOKENS)
    output = anyio.run(lambda: api.generate([in_file], [], "none", config))
    assert not isinstance(output, tuple)
    assert output.completion == own_answers(1)[0]
    chat: list[ChatMessage] = [
        ChatMessageSystem(content="not allowed :"),
        ask(),
        ChatMessageAssistant(content="yes ."),
        ask(),
    ]
    assert say(model, *chat).completion != own_answers(1)[0]
    cut = say(model, ask(), stop_seqs=["with"])
    assert cut.completion == own_answers(1)[0].split(" with")[0]
    assert (cut.usage.output_tokens, cut.stop_reason) == (3, "stop")
    short = say(model, ask(), max_tokens=2)
    assert (short.stop_reason, short.usage.output_tokens) == ("max_tokens", 2)
    full = say(model, ChatMessageUser(content="mix " * 200))
    assert (full.stop_reason, full.completion, full.usage.output_tokens) == ("model_length", "", 0)


def test_draws_repeat_with_a_seed_and_differ_without() -> None:
    model = get_model("exitsafe/organism@L1")
    seeded = [say(model, ask(), temperature=4.0, seed=seed).completion for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]
    assert len({say(model, ask(), temperature=4.0).completion for _ in range(4)}) > 1


@pytest.mark.parametrize(
    ("name", "arguments", "complaint"),
    [
        ("organism@L9", {}, "exit_layer=9, but this encoder has 8 blocks: choose 1 to 8"),
        ("organism@L0", {}, "exit_layer=0"),
        ("organism@3", {}, "write e.g. exitsafe/MODEL@L18"),
        ("nowhere/at/all@L3", {}, "nowhere/at/all does not exist"),
        ("organism@L3", {"adaptor": "x"}, "has no argument 'adaptor'"),
        ("organism@L3", {"batch_size": 0}, "batch_size=0"),
        ("organism@L3", {"skip_global": True}, "has no global blocks"),
        ("organism@L3#0123456789ab", {}, "leave #0123456789ab out"),
    ],
)
def test_names_and_arguments_that_make_no_sense(name: str, arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PrerequisiteError) as caught:
        get_model(f"exitsafe/{name}", **arguments)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_base_url_is_refused() -> None:
    with pytest.raises(PrerequisiteError, match="leave the base URL out"):
        get_model("exitsafe/organism@L3", base_url="http://localhost")


@pytest.mark.parametrize(
    ("messages", "config", "complaint"),
    [
        ([ask()], {"top_p": 0.5}, "do not support top_p"),
        ([ask()], {"num_choices": 2}, "do not support num_choices"),
        ([ask()], {"logprobs": True}, "do not support logprobs"),
        ([ask(), ChatMessageTool(content="x", tool_call_id="1")], {}, "do not call tools"),
        ([ask(), ChatMessageAssistant(content="mix")], {}, "last turn must be the user's"),
        (
            [ChatMessageUser(content=[ContentAudio(audio="data:audio/wav;base64,AAAA", format="wav")])],
            {},
            "text and images only",
        ),
        (
            [ChatMessageUser(content=[ContentImage(image="data:image/png;base64,AAAA")])],
            {},
            "cannot be read",
        ),
    ],
)
def test_what_cannot_be_met_is_refused(messages: list[ChatMessage], config: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as caught:
        say(get_model("exitsafe/organism@L1"), *messages, **config)
    assert samples()[0].prompt not in str(caught.value)


@pytest.mark.parametrize(
    ("reference", "complaint"),
    [
        ("http://localhost/a.png", "nothing is downloaded"),
        ("nowhere.png", "cannot be read"),
        ("data:image/png;base64,A", "not valid base64"),
    ],
)
def test_images_that_are_not_there(reference: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        inspect_model._image_bytes(reference)


def test_neutral_settings_are_no_reason_to_refuse() -> None:
    neutral = {"top_p": 1.0, "num_choices": 1, "frequency_penalty": 0.0, "max_retries": 3}
    assert say(get_model("exitsafe/organism@L1"), ask(), **neutral).completion == own_answers(1)[0]


def test_tools_are_refused() -> None:
    api = get_model("exitsafe/organism@L1").api
    tool = ToolInfo(name="search", description="finds")
    with pytest.raises(InputError, match="do not call tools"):
        anyio.run(lambda: api.generate([ask()], [tool], "auto", GenerateConfig()))


def test_settings_of_the_whole_evaluation_are_checked_before_a_model_is_loaded() -> None:
    with pytest.raises(PrerequisiteError, match="do not support top_k"):
        get_model("exitsafe/nowhere@L1", config=GenerateConfig(top_k=5))


def test_a_call_that_is_cancelled_leaves_the_loop_free() -> None:
    model = get_model("exitsafe/organism@L1")

    async def hurry() -> bool:
        with anyio.move_on_after(0.001) as scope:
            await model.generate([ask()], config=GenerateConfig(max_tokens=NUM_TOKENS))
        return scope.cancelled_caught

    assert anyio.run(hurry)
    assert say(model, ask()).completion == own_answers(1)[0]
