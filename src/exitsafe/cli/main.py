"""`exitsafe`: the commands, and how every failure becomes one line and an exit status.

0 done; 1 a gate breached, which only `gate` says; 2 bad input or anything that failed; 130 interrupted. Knows nothing
about what the commands do.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from exitsafe import __version__
from exitsafe.cli import console
from exitsafe.cli.align_command import align_command
from exitsafe.cli.audit_command import audit_command
from exitsafe.cli.chat_command import chat_command
from exitsafe.cli.compare_command import compare_command
from exitsafe.cli.demo_command import demo_command
from exitsafe.cli.doctor_command import doctor_command
from exitsafe.cli.export_command import export_command
from exitsafe.cli.frontier_command import frontier_command
from exitsafe.cli.gate_command import gate_command
from exitsafe.cli.judge_command import judge_command
from exitsafe.cli.label_command import label_command
from exitsafe.cli.organism_command import organism_app
from exitsafe.cli.report_command import report_command
from exitsafe.cli.rerun_command import rerun_command
from exitsafe.cli.suites_command import suites_command
from exitsafe.cli.transfer_command import transfer_command
from exitsafe.cli.translate_command import translate_command
from exitsafe.cli.verify_command import verify_command
from exitsafe.errors import ExitsafeError

DONE, FAILED, INTERRUPTED = 0, 2, 130
_GOES_ON = "interrupted; what was saved is kept: the same command goes on from there"

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
app.command("audit", epilog="Example: exitsafe audit organism --layers all --out runs/before")(audit_command)
app.command("align", epilog="Example: exitsafe align organism --out runs/lppo")(align_command)
app.command("compare", epilog="Example: exitsafe compare runs/before runs/after --chart chart.svg")(compare_command)
app.command(
    "frontier", epilog="Example: exitsafe frontier runs/after --max-asr 0.05 --min-vqa 0.8 --max-over-refusal 0.1"
)(frontier_command)
app.command("gate", epilog="Example: exitsafe gate runs/after --max-asr 0.05 --min-vqa 0.6")(gate_command)
app.command("translate", epilog="Example: exitsafe translate organism --out runs/translators")(translate_command)
app.command("transfer", epilog='Example: exitsafe transfer organism --train-sets "1;7;all" --out runs/transfer')(
    transfer_command
)
app.command("judge", epilog="Example: exitsafe judge runs/before --judge refusal-prefix")(judge_command)
app.command(
    "label", epilog="Example: exitsafe label runs/before, then exitsafe label runs/before --read runs/before/labels.csv"
)(label_command)
app.command("rerun", epilog="Example: exitsafe rerun runs/before")(rerun_command)
app.command("export", epilog="Example: exitsafe export organism --exit-layer 4 --out slim")(export_command)
app.command("verify", epilog="Example: exitsafe verify slim --against runs/before")(verify_command)
app.command("report", epilog="Example: exitsafe report runs/before runs/after --out report.html")(report_command)
app.command("suites", epilog="Example: exitsafe suites xstest")(suites_command)
app.command("doctor", epilog="Example: exitsafe doctor organism")(doctor_command)
app.command("chat", epilog="Example: exitsafe chat organism --image f.png --layers 1,4,7")(chat_command)
app.command("demo", epilog="Example: exitsafe demo --out runs/demo")(demo_command)
app.add_typer(organism_app, name="organism")


def main() -> None:
    """The entry point."""
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
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_show_version)
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
