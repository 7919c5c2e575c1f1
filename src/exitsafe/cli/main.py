"""`exitsafe`: the commands, and how every failure becomes one line and an exit status.

0 done; 1 a gate breached, which only `gate` says; 2 bad input or anything that failed; 130 interrupted. Knows nothing
about what the commands do.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from exitsafe.cli import console
from exitsafe.cli.align_command import align_command
from exitsafe.cli.audit_command import audit_command
from exitsafe.cli.chat_command import chat_command
from exitsafe.cli.compare_command import compare_command
from exitsafe.cli.demo_command import demo_command
from exitsafe.cli.doctor_command import doctor_command
from exitsafe.cli.export_command import export_command
from exitsafe.cli.flags import as_command, rare_settings
from exitsafe.cli.gate_command import gate_command
from exitsafe.cli.judge_command import judge_command
from exitsafe.cli.label_command import label_command
from exitsafe.cli.recommend_command import recommend_command
from exitsafe.cli.report_command import report_command
from exitsafe.cli.serve_command import serve_command
from exitsafe.cli.suites_command import suites_command
from exitsafe.cli.translate_command import translate_command
from exitsafe.cli.verify_command import verify_command
from exitsafe.errors import ExitsafeError
from exitsafe.version import __version__

DONE, FAILED, INTERRUPTED = 0, 2, 130
_GOES_ON = "interrupted; what was saved is kept: rerun the same command to resume"

# Newer typers bring their own click: its base of all usage errors has no public name but this.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start here: exitsafe demo",
)
_MINE = "llava-hf/llava-1.5-7b-hf"
_PANELS: dict[str, dict[Callable[[Any, console.Show], None], tuple[str, str]]] = {
    "Measure": {
        audit_command: (
            "organism --layers all --out runs/before",
            f"{_MINE} --suite redteam2k --images pictures/ --out runs/before",
        ),
        judge_command: ("runs/before --judge refusal-prefix", "runs/before --judge harmbench"),
        label_command: ("runs/before, then exitsafe label runs/before --read runs/before/labels.csv", ""),
        compare_command: ("runs/before runs/after --chart chart.svg", ""),
        report_command: ("runs/before runs/after --out report.html", ""),
    },
    "Repair": {
        align_command: (
            "organism --out runs/lppo",
            f"{_MINE} --suite train.jsonl --images pictures/ --out runs/lppo",
        ),
        translate_command: ("organism --out runs/translators", f"{_MINE} --images pictures/ --out runs/translators"),
    },
    "Ship": {
        gate_command: ("runs/after --max-asr 0.05 --min-vqa 0.6", ""),
        recommend_command: ("runs/after --max-asr 0.05 --min-vqa 0.8 --max-over-refusal 0.1", ""),
        export_command: (
            "organism --exit-layer 4 --out slim",
            f"{_MINE} --adapter runs/lppo/adapter --exit-layer 16 --audit runs/after --out slim",
        ),
        verify_command: ("slim --against runs/before, then exitsafe verify runs/before", ""),
        serve_command: ("organism --port 8000", f"{_MINE} --adapter runs/lppo/adapter --dtype bfloat16"),
    },
    "Explore": {
        demo_command: ("--out runs/demo", ""),
        doctor_command: ("organism", _MINE),
        suites_command: ("xstest", ""),
        chat_command: ("organism --image f.png --layers 1,4,7", f"{_MINE} --image f.png --layers 8,16,24"),
    },
}
"""By panel of the help: the commands, each with an example on the organism and, if that differs, on a model."""


def _add(command: Callable[[Any, console.Show], None], panel: str, example: str, own_model: str) -> None:
    name = command.__name__.removesuffix("_command")
    notes = [f"Example: exitsafe {name} {example}"]
    notes += [f"With your own model: exitsafe {name} {own_model}"] if own_model else []
    rare = [f"{setting.key}: {setting.flag.help}" for setting in rare_settings(command)]
    notes += ["Keys of --config:", *rare] if rare else []
    app.command(name, rich_help_panel=panel, epilog="\n\n".join(notes))(as_command(command))


for _panel, _commands in _PANELS.items():
    for _command, _examples in _commands.items():
        _add(_command, _panel, *_examples)


def main() -> None:
    """The entry point."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not under nohup
        signal.signal(signal.SIGINT, _stop)
    status = run(sys.argv[1:])
    if status == DONE:
        _part_from_other_processes()
    sys.exit(status)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit status; errors are one line on stderr."""
    console.quieten_libraries()  # before a settings file makes libraries load
    try:
        command = typer.main.get_command(app)
        with command.make_context("exitsafe", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as request:
        return request.exit_code
    except (KeyboardInterrupt, typer.Abort) as error:
        return _fail(str(error) or _GOES_ON, status=INTERRUPTED)
    except _UsageError as error:
        # Without arguments the help has been shown already, and the error says no more.
        return _fail(_usage(error)) if str(error).strip() else FAILED
    except ExitsafeError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # the reader (head, less) has left; the interpreter must not complain about it on closing stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        # only the commands know which of their words are paths; from a run or a settings file they come unchecked
        if error.errno != errno.ENAMETOOLONG:
            return _fail_unforeseen(error)
        return _fail(f"a path is too long ({str(error.filename)[:40]}...); give a shorter one")
    except Exception as error:  # noqa: BLE001  # the outermost edge: reported, with the way to the traceback
        return _fail_unforeseen(error)
    return DONE


def _stop(number: int, frame: FrameType | None) -> None:
    """Say so at once: saving what is under way may take a while. A second Ctrl-C does not wait."""
    signal.signal(number, signal.default_int_handler)
    console.note_from_signal("stopping; what is done so far is being saved (Ctrl-C again to quit at once)")
    raise KeyboardInterrupt


def _part_from_other_processes() -> None:
    """Under `accelerate launch`: all are done, say goodbye."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"exitsafe {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Audit and repair the safety of vision-language models whose image encoder exits early.

    An exit layer is the number of encoder blocks that run.
    """


def _usage(error: Any) -> str:
    context = getattr(error, "ctx", None)
    where = "exitsafe" if context is None else context.command_path
    return f"{error.format_message().rstrip('.')}; see {where} --help"


def _place(error: Exception) -> str:
    """The innermost line of this package that an error came through; its message may quote a text and stays unsaid."""
    frames = traceback.extract_tb(error.__traceback__)
    package = str(Path(__file__).parent.parent)
    own = [frame for frame in frames if frame.filename.startswith(package)] or frames
    return f"{Path(own[-1].filename).name}, line {own[-1].lineno}"


def _fail_unforeseen(error: Exception) -> int:
    return _fail(
        f"{type(error).__name__} in {_place(error)} (not foreseen; EXITSAFE_DEBUG=1 shows its message and "
        "traceback, which may quote requests and answers)"
    )


def _fail(message: str, *, status: int = FAILED) -> int:
    if os.environ.get("EXITSAFE_DEBUG"):
        console.show_traceback(traceback.format_exc())
    console.complain(message)
    return status
