"""The legacy judge against a local server that answers as Perspective's documentation says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from exitsafe.errors import ExitsafeError, InputError, RunError
from exitsafe.judges import perspective
from exitsafe.judges.asking import ask_judge
from exitsafe.judges.endpoint import MOST_FAILURES
from exitsafe.judges.perspective import Perspective
from exitsafe.judges.protocol import ModelJudge
from exitsafe.records import KINDS, Kind, Response, Sample, Verdict

KEY = "zorb-key"
Script = Callable[[str, int], tuple[int, bytes, dict[str, str]]]


def scored(value: object) -> tuple[int, bytes, dict[str, str]]:
    score = {"value": value, "type": "PROBABILITY"}
    return 200, json.dumps({"attributeScores": {"TOXICITY": {"summaryScore": score}}, "languages": ["en"]}).encode(), {}


def refused(status: int, reason: str = "X", wait: str = "0.01") -> tuple[int, bytes, dict[str, str]]:
    body = {"error": {"code": status, "message": "mix moss", "details": [{"reason": reason}]}}
    return status, json.dumps(body).encode(), {"Retry-After": wait}


@contextmanager
def serving(script: Script) -> Iterator[tuple[str, list[dict[str, Any]], list[str]]]:
    """The address, the requests seen and the keys that came with them."""
    seen: list[dict[str, Any]] = []
    keys: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        wbufsize = -1

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body | {"path": self.path})
            keys.append(self.headers.get("X-Goog-Api-Key", ""))
            status, content, headers = script(body["comment"]["text"], len(seen) - 1)
            try:
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(content))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                pass  # the client has given up

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen, keys
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def open_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSPECTIVE_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(perspective, "_today", lambda: date(2026, 12, 31))


def judged(script: Script, *texts: str, kind: Kind = "harmful", **settings: Any) -> list[Verdict]:
    samples = [Sample(id=str(n), prompt="p", kind=kind, answers=("x",)) for n in range(len(texts))]
    responses = [
        Response(sample_id=str(n), exit_layer=4, text=text, num_tokens=1, finish_reason="stop", seconds=0.0)
        for n, text in enumerate(texts)
    ]
    with serving(script) as (url, _, _):
        return ask_judge(Perspective(url, **{"requests_per_minute": 1e6, **settings}), samples, responses)


def test_scores_come_from_the_summary() -> None:
    verdicts = judged(lambda text, _: scored({"moss": 0.25, "foam": 1}[text]), "moss", "foam", "moss")
    assert [v.score for v in verdicts] == [0.25, 1.0, 0.25]
    assert {(v.judge, v.measure, v.label, v.exit_layer) for v in verdicts} == {("perspective", "toxicity", "legacy", 4)}


def test_the_request_is_the_documented_one_with_the_key_in_a_header() -> None:
    with serving(lambda text, _: scored(0.5)) as (url, seen, keys):
        sample = Sample(id="a", prompt="secret prompt", kind="harmful")
        same = Response(sample_id="a", exit_layer=1, text="moss", num_tokens=1, finish_reason="stop", seconds=0.0)
        judge = Perspective(url)
        judge([sample, sample], [same, same])
    assert seen == [
        {
            "comment": {"text": "moss", "type": "PLAIN_TEXT"},
            "requestedAttributes": {"TOXICITY": {}},
            "languages": ["en"],
            "doNotStore": True,
            "path": "/v1alpha1/comments:analyze",
        }
    ]
    assert keys == [KEY]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "harmful"])
def test_other_kinds_are_not_sent(kind: Kind) -> None:
    assert judged(lambda text, _: scored(0.5), "moss", kind=kind) == []


@pytest.mark.parametrize(
    ("text", "answer", "reason"),
    [
        ("", scored(0.5), "Perspective takes no empty text"),
        (" \n", scored(0.5), "Perspective takes no empty text"),
        ("moss", refused(400), "Perspective refused the answer (status 400)"),
        ("moss", refused(429), "Perspective failed (status 429)"),
        ("moss", refused(503), "Perspective failed (status 503)"),
        ("moss", refused(429, wait="999"), "Perspective failed (status 429)"),
        ("moss", scored(1.5), "Perspective's answer is not in the expected format"),
        ("moss", scored("high"), "Perspective's answer is not in the expected format"),
        ("moss", (200, b"<html>", {}), "Perspective's answer is not in the expected format"),
        ("moss", (200, b'{"attributeScores": {}}', {}), "Perspective's answer is not in the expected format"),
        ("moss", (200, b'{"attributeScores": {"TOXICITY": {"summaryScore": {"value": NaN}}}}', {}), None),
    ],
)
def test_what_has_no_score_has_a_reason(text: str, answer: Any, reason: str | None) -> None:
    (verdict,) = judged(lambda _, number: answer, text, max_retries=1)
    assert (verdict.score, verdict.unscored) == (None, reason or "Perspective's answer is not in the expected format")


def test_passing_faults_are_tried_again_after_the_wait_asked_for() -> None:
    times: list[float] = []

    def script(_: str, number: int) -> tuple[int, bytes, dict[str, str]]:
        times.append(time.monotonic())
        return scored(0.5) if number else refused(429, wait="0.8")

    (verdict,) = judged(script, "moss")
    assert verdict.score == 0.5
    assert times[1] - times[0] >= 0.75  # our own first wait is 0.5


def test_a_timeout_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(_: str, number: int) -> tuple[int, bytes, dict[str, str]]:
        threading.Event().wait(1.0)
        return scored(0.5)

    (verdict,) = judged(slow, "moss", timeout=0.2, max_retries=0)
    assert verdict.unscored == "Perspective timed out"


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (refused(403), InputError, r"refuses the key \(status 403\): set PERSPECTIVE_API_KEY"),
        (refused(401), InputError, r"refuses the key \(status 401\)"),
        (refused(400, "API_KEY_INVALID"), InputError, r"refuses the key \(status 400\)"),
        (refused(404), RunError, r"any more \(status 404\): use the judge toxicity"),
    ],
)
def test_what_would_fail_every_time_stops(answer: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        judged(lambda _, number: answer, "moss", "foam")
    assert KEY not in str(caught.value)
    assert "moss" not in str(caught.value)


def test_failures_without_end_stop() -> None:
    texts = [f"moss {number}" for number in range(MOST_FAILURES + 5)]
    with pytest.raises(RunError, match=rf"\(status 500\), {MOST_FAILURES} times in a row; the responses are saved"):
        judged(lambda _, number: refused(500), *texts, max_retries=0)


def test_requests_keep_their_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("exitsafe.judges.perspective.time.sleep", waits.append)
    judged(lambda text, _: scored(0.5), "moss", "foam", "zorb", requests_per_minute=60)
    assert waits == pytest.approx([0, 1, 2], abs=0.5)  # each from now on; nothing really waited


def test_after_the_last_day_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perspective, "_today", lambda: date(2027, 1, 1))
    for use in (lambda: Perspective().settings, lambda: judged(lambda text, _: scored(0.5), "moss")):
        with pytest.raises(RunError, match=r"^Perspective closed on 31 December 2026: use the judge toxicity$"):
            use()


def test_settings_show_what_is_missing_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Perspective()
    assert isinstance(judge, ModelJudge)
    assert judge.settings == Perspective(requests_per_minute=600).settings
    assert KEY not in json.dumps(judge.settings)
    with monkeypatch.context() as patch:
        patch.delenv("PERSPECTIVE_API_KEY")
        with pytest.raises(ExitsafeError, match="set PERSPECTIVE_API_KEY, or use the judge toxicity"):
            _ = judge.settings
    monkeypatch.setattr("exitsafe.judges.perspective.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "exitsafe\[endpoint\]"'):
        _ = judge.settings
    judge.unload()


def test_answers_without_a_score_stop_though_their_status_is_200() -> None:
    with pytest.raises(
        RunError, match=rf"not in the expected format, {MOST_FAILURES} times in a row; the responses are saved"
    ):
        judged(lambda text, _: (200, b"<html>moss</html>", {}), *map(str, range(MOST_FAILURES + 5)))
