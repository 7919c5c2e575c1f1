"""Chat templates come from strangers: what they write is what transformers writes, and what they do is bounded."""

from __future__ import annotations

import inspect
import json
import signal
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from exitsafe.engine import templates
from exitsafe.engine.load import load_vlm
from exitsafe.engine.templates import TemplateRefusedError, check_template, render
from exitsafe.engine.vlm import VLM
from exitsafe.errors import InputError, ModelError
from exitsafe.records import Sample
from tests.tiny_models import CHAT_TEMPLATE, noise_image, save_tiny, tiny_model, tiny_processor

DATED = "{{ strftime_now('%d %b %Y') }} " + CHAT_TEMPLATE.replace("IMAGE", "<image>")
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how ü"}]}]


@pytest.fixture(autouse=True)
def rendered_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates._Renderer, "ask", inspect.unwrap(templates._Renderer.ask))


def with_template(template: str) -> Any:
    processor: Any = tiny_processor("llava")
    processor.chat_template = template
    return processor


@pytest.mark.parametrize(
    "template", [CHAT_TEMPLATE, "{{ messages | tojson }}{% generation %}{{ eos_token }}{% endgeneration %}"]
)
@pytest.mark.parametrize("opens", [True, False])
def test_the_text_is_that_of_transformers(template: str, opens: bool) -> None:
    processor = with_template(template)
    expected = processor.apply_chat_template(MESSAGES, add_generation_prompt=opens, tokenize=False)
    assert render(processor, MESSAGES, today="2026-01-31", add_generation_prompt=opens) == expected
    tokenizer = processor.tokenizer
    tokenizer.chat_template = template
    assert render(tokenizer, MESSAGES, today="2026-01-31", add_generation_prompt=opens) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOP, r"does not finish within 1 seconds; use a checkpoint that you trust"),
        (DOUBLING, "(needs too much memory|does not finish within 1 seconds); use a checkpoint that you trust"),
        ("{{ 'a' * 5000000 }}", "needs too much memory"),
        ("{{ ''.__class__.__mro__ }}", r"attempts a forbidden operation \(access to attribute '__class__'"),
        (" ", "writes nothing; use a checkpoint"),
        ("{% if %}", r"cannot render this conversation \(Expected an expression"),
        ("{{ raise_exception('never') }}", r"cannot render this conversation \(never\)"),
    ],
)
def test_a_template_that_does_harm_is_stopped(template: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 1.0)
    with pytest.raises(ModelError, match=f"^the chat template {message}"):
        check_template(with_template(template), today="2026-01-31")
    assert render(with_template(CHAT_TEMPLATE), MESSAGES, today="2026-01-31")  # the next is none the worse for it


@pytest.mark.timeout(60)
@pytest.mark.parametrize("template", [LOOP, DOUBLING])
def test_loading_a_checkpoint_with_such_a_template_is_an_error(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "SECONDS", 1.0)
    folder = save_tiny("llava", tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match=r"^the chat template .*replace its chat_template\.jinja"):
        load_vlm(folder)


def test_a_template_may_refuse_some_conversations() -> None:
    refusing = "{% if messages[0]['content'] is string %}{{ raise_exception('parts!') }}{% endif %}" + CHAT_TEMPLATE
    assert check_template(with_template(refusing), today="2026-01-31") is False
    with pytest.raises(TemplateRefusedError, match="parts!"):
        render(with_template(refusing), [{"role": "user", "content": "how"}], today="2026-01-31")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no pictures') }}", r"sample s: the chat template cannot render .*no pictures"),
        ("USER: hello", "sample s: the chat template leaves out the prompt"),
        (
            "{{ messages[0]['content'][-1]['text'] }}",
            "sample s: the chat template writes 0 image placeholders for 1 image",
        ),
    ],
)
def test_what_a_template_leaves_out_is_an_error(template: str, message: str) -> None:
    vlm = VLM(tiny_model("llava"), tiny_processor("llava"), name="tiny")
    vlm.processor.chat_template = template
    with pytest.raises((InputError, ModelError), match=message):
        vlm.encode_prompt(Sample(id="s", prompt="what is", images=(noise_image(0),), kind="benign"))


def test_half_a_surrogate_pair_is_refused_unless_the_conversation_holds_it() -> None:
    """A judge reads one in an answer as a question mark; one that the template adds is the template's fault."""
    said: list[dict[str, Any]] = [{"role": "user", "content": "zorb \ud800"}]
    assert render(with_template("{{ messages[0]['content'] }}"), said, today="2026-01-31") == "zorb \ud800"
    with pytest.raises(TemplateRefusedError, match="writes a lone surrogate"):
        render(with_template("{{ '\\ud83d' }}"), said, today="2026-01-31")


def test_the_date_is_the_callers_and_chance_is_the_same() -> None:
    processor = with_template(DATED)
    assert render(processor, MESSAGES, today="2026-01-31").startswith("31 Jan 2026 ")
    assert check_template(processor, today="2026-01-31") is True
    assert check_template(with_template(CHAT_TEMPLATE), today=datetime.now().date().isoformat()) is False
    drawn = with_template("{{ range(10000) | random }} {{ messages[0]['role'] }}")
    assert render(drawn, MESSAGES, today="2026-01-31") == render(drawn, MESSAGES, today="2026-02-01")


def test_rendering_is_fast() -> None:
    processor = with_template(CHAT_TEMPLATE)
    render(processor, MESSAGES, today="2026-01-31")
    started = time.perf_counter()
    for number in range(200):
        render(processor, [{"role": "user", "content": [{"type": "text", "text": str(number)}]}], today="2026-01-31")
    assert time.perf_counter() - started < 10


def test_an_interrupt_does_not_leave_a_reply_for_the_next_prompt() -> None:
    slow = with_template("{% for i in range(500) %}{% for j in range(9999) %}{% endfor %}{% endfor %}FIRST")
    render(with_template("warm"), MESSAGES, today="2026-01-31")
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        render(slow, MESSAGES, today="2026-01-31")
    for text in ("SECOND", "THIRD"):
        assert render(with_template(text), MESSAGES, today="2026-01-31") == text


def test_a_reply_to_another_request_is_an_error_and_the_next_is_right() -> None:
    process = templates._RENDERER.start()
    assert process.stdin is not None
    stray = {"template": "STRAY", "variables": {}, "messages": [], "today": "2026-01-31", "seconds": 9, "number": 0}
    process.stdin.write(json.dumps({**stray, "add_generation_prompt": True}) + "\n")
    with pytest.raises(ModelError, match="its process replied to another request"):
        render(with_template("OWN"), MESSAGES, today="2026-01-31")
    assert render(with_template("OWN"), MESSAGES, today="2026-01-31") == "OWN"
