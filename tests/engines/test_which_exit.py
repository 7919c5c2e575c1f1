"""Which exit real servers run; `pytest -s` prints the table."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from exitsafe.cli.which_exit_words import headline
from exitsafe.engine.load import load_vlm
from exitsafe.engine.served_model import find_served
from exitsafe.engine.vlm import VLM
from exitsafe.errors import RunError
from exitsafe.exporting.candidates import CLASS_TOKEN, PADDED_AS_CLIP
from exitsafe.exporting.questions import Questions
from exitsafe.exporting.served import Interview
from exitsafe.exporting.which_exit import ERROR, MAX_NEW_TOKENS, MAX_REQUESTS, WhichExit, identify, which_exit
from exitsafe.organism.architecture import build_model
from tests.engines.gguf_models import Bits, shipped, write_encoder, write_language_model
from tests.engines.llama_server import llama_server
from tests.engines.server import free_port, running
from tests.engines.vllm_server import servable, vllm_server
from tests.tiny_models import tiny_model, tiny_processor

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def organism() -> VLM:
    return load_vlm("organism")


@pytest.fixture(scope="module")
def siglip() -> VLM:
    return VLM(tiny_model("llava-siglip"), tiny_processor("llava-siglip"), name="tiny LLaVA, SigLIP")


@pytest.fixture(scope="module")
def exitsafe_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log"
    command: list[str | Path] = [sys.executable, "-m", "exitsafe", "serve", "organism", "--port", str(port)]
    with running(command, port=port, log=log, env={"OMP_NUM_THREADS": "1"}) as url:
        yield url


def _ask(name: str, vlm: VLM, url: str, *, claimed: int | None = None) -> WhichExit:
    found = which_exit(vlm, find_served(url, what="URL"), claimed=claimed)
    print(f"| {name} | {headline(found)} | {found.decided_after} | {found.requests} | {found.error_level:.0%} |")
    assert found.requests <= 64
    return found


@pytest.mark.parametrize("exit_layer", range(1, 9))
def test_exitsafe_serve_at_every_exit(organism: VLM, exitsafe_url: str, exit_layer: int) -> None:
    url = f"{exitsafe_url}/v1#organism@L{exit_layer}"
    found = _ask(f"exitsafe serve, exit {exit_layer}", organism, url, claimed=exit_layer)
    assert found.is_as_claimed and found.preparation == ""


@pytest.mark.parametrize("exit_layer", [2, 7])
def test_from_answers_alone(organism: VLM, exitsafe_url: str, exit_layer: int) -> None:
    model = find_served(f"{exitsafe_url}/v1#organism@L{exit_layer}", what="URL")
    interview = Interview(model=model, vlm=organism, max_tokens=MAX_NEW_TOKENS)
    interview.has_logprobs = False  # it gives them, but is not asked
    found = identify(
        organism,
        interview,
        Questions(organism),
        claimed=exit_layer,
        error=ERROR,
        max_requests=MAX_REQUESTS,
        progress=lambda done, total, note: None,
    )
    print(f"| answers alone, exit {exit_layer} | {headline(found)} | {found.decided_after} | {found.requests} | 1% |")
    assert found.is_as_claimed and not found.has_logprobs


def test_vllm(organism: VLM, tmp_path: Path) -> None:
    folder = servable(organism.base_model, organism.processor, tmp_path / "model")
    with vllm_server(folder, log=tmp_path / "log") as url:
        found = _ask("vLLM", organism, url, claimed=7)
    assert found.is_as_claimed and found.preparation == ""
    assert found.remarks == ("Its chat template writes a prompt as the reference's does.",)


@contextmanager
def _llama(
    vlm: VLM, folder: Path, exit_layer: int, *, bits: Bits = "F32", feature_layer: bool = True
) -> Iterator[tuple[str, Path]]:
    language_model = write_language_model(vlm, folder / "language_model.gguf", bits=bits)
    encoder = write_encoder(vlm, folder / "mmproj.gguf", exit_layer=exit_layer, feature_layer=feature_layer)
    with llama_server(language_model, encoder, log=folder / "log") as url:
        yield url, language_model


@pytest.mark.parametrize("exit_layer", [1, 3, 6])
def test_llama_cpp_with_siglip_is_exact(siglip: VLM, tmp_path: Path, exit_layer: int) -> None:
    with _llama(siglip, tmp_path, exit_layer) as (url, _):
        found = _ask(f"llama.cpp, SigLIP, exit {exit_layer}", siglip, url, claimed=exit_layer)
    assert found.is_as_claimed and found.nearest.distance < 0.01
    assert found.preparation == PADDED_AS_CLIP


@pytest.mark.parametrize("exit_layer", [1, 3, 6])
def test_a_file_without_feature_layer_runs_one_block_less(siglip: VLM, tmp_path: Path, exit_layer: int) -> None:
    with _llama(siglip, tmp_path, exit_layer, feature_layer=False) as (url, _):
        found = _ask(f"llama.cpp, SigLIP, {exit_layer} blocks in the file", siglip, url, claimed=exit_layer)
    assert (found.exit_layer, found.fault) == (exit_layer - 1, "") and not found.is_as_claimed


@pytest.mark.parametrize("exit_layer", [1, 7])
def test_llama_cpp_with_clip_leaves_the_class_token_in(organism: VLM, tmp_path: Path, exit_layer: int) -> None:
    with _llama(organism, tmp_path, exit_layer) as (url, _):
        found = _ask(f"llama.cpp, CLIP, exit {exit_layer}", organism, url, claimed=exit_layer)
    assert (found.exit_layer, found.fault) == (exit_layer, CLASS_TOKEN)
    assert found.differing is not None and found.differing[0] > 0


def test_both_of_llama_cpps_faults(organism: VLM, tmp_path: Path) -> None:
    with _llama(organism, tmp_path, 7, feature_layer=False) as (url, _):
        found = _ask("llama.cpp, CLIP, 7 blocks in the file", organism, url, claimed=7)
    assert (found.exit_layer, found.fault) == (6, CLASS_TOKEN)


@pytest.mark.parametrize("bits", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("exit_layer", [3, 7])
def test_quantised_language_models(organism: VLM, tmp_path: Path, bits: Bits, exit_layer: int) -> None:
    with _llama(organism, tmp_path, exit_layer, bits=bits) as (url, language_model):
        name = f"llama.cpp, CLIP, exit {exit_layer}, {bits}"
        found = _ask(name, organism, url)
        same = _ask(f"{name}, reference de-quantised", shipped(organism, language_model), url)
    assert (exit_layer, CLASS_TOKEN) in {(each.exit_layer, each.fault) for each in found.candidates}
    assert bits == "Q4_0" or found.verdict == "established"
    assert (same.verdict, same.exit_layer, same.fault) == ("established", exit_layer, CLASS_TOKEN)


def test_another_seed_is_none_of_its_exits(organism: VLM, tmp_path: Path) -> None:
    other = VLM(build_model(seed=1).eval(), organism.processor, name="another seed")
    with _llama(other, tmp_path, 7) as (url, _):
        found = _ask("llama.cpp, another seed of the organism, untrained", organism, url, claimed=7)
    assert (found.verdict, found.exit_layer) == ("excluded", None)


def test_the_same_model_trained_otherwise_is_not_taken_for_it(organism: VLM, tmp_path: Path) -> None:
    """The text organism differs in its last lessons alone, by about as much as weights in 4 bits."""
    with _llama(load_vlm("organism:text"), tmp_path, 7) as (url, _):
        found = _ask("llama.cpp, organism:text", organism, url, claimed=7)
    assert found.verdict != "established" and not found.is_as_claimed


def test_a_text_only_server(organism: VLM, tmp_path: Path) -> None:
    language_model = write_language_model(organism, tmp_path / "language_model.gguf")
    with llama_server(language_model, None, log=tmp_path / "log") as url, pytest.raises(RunError) as error:
        _ask("llama.cpp without an encoder", organism, url)
    print(f"| llama.cpp without an encoder | {str(error.value).partition(' ')[2]} | | | |")
    assert "with a picture" in str(error.value)


def test_the_command(organism: VLM, exitsafe_url: str) -> None:
    command = [sys.executable, "-m", "exitsafe", "verify", f"{exitsafe_url}/v1#organism@L5"]
    command += ["--reference", "organism", "--exit-layer"]
    right, wrong = (subprocess.run([*command, str(layer)], capture_output=True, text=True) for layer in (5, 6))
    assert (right.returncode, wrong.returncode) == (0, 2)
    assert "exit 5, as claimed" in right.stdout and "not 6 as claimed (one block short)" in wrong.stdout
