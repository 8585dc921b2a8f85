"""The command line: `hpclr COMMAND`. Commands are loaded when they are called, so that help is instant."""

import importlib
import os
import sys
import time
import traceback
import warnings
from typing import NoReturn

import click

from hpclr.errors import HpclrError, exit_code_of
from hpclr.output import end_at_once, let_go_of_dead_streams, printable, say
from hpclr.version import __version__

COMMANDS = {
    "train": ("hpclr.cli.train:train", "Train a run file, or continue where it stopped."),
    "launch": ("hpclr.cli.launch:launch", "Train with several processes on this machine."),
    "sweep": ("hpclr.cli.sweep:sweep", "Train the runs of a grid or list of values, here or as one job array."),
    "compare": ("hpclr.cli.compare:compare", "Train with several methods and seeds, and compare them: table, picture."),
    "plan": ("hpclr.cli.plan:plan", "Say what a run will take: memory, time, energy, and how sure that is."),
    "submit": ("hpclr.cli.submit:submit", "Train a run file as a job of Slurm's, until it is done."),
    "resume": ("hpclr.cli.resume:resume", "Submit a run again, as it was submitted before."),
    "status": ("hpclr.cli.status:status", "Show how runs and their jobs are."),
    "logs": ("hpclr.cli.logs:logs", "Show or follow what a run writes."),
    "watch": ("hpclr.cli.watch:watch", "Show live how a run does, from its files."),
    "stop": ("hpclr.cli.stop:stop", "Ask a run to save and end."),
    "cancel": ("hpclr.cli.cancel:cancel", "End a run's jobs, also those that wait."),
    "evaluate": ("hpclr.cli.evaluate:evaluate", "Score a checkpoint on a split of the data."),
    "inspect": ("hpclr.cli.inspect:inspect", "Show what a checkpoint holds: step, ranks, spectra, sizes."),
    "spectrum": ("hpclr.cli.spectrum:spectrum", "Show spectra, and what each rank rule would keep, before training."),
    "verify": ("hpclr.cli.verify:verify", "Check that checkpoints are whole and make sense."),
    "export": ("hpclr.cli.export:export", "Write a checkpoint's weights for other programs."),
    "summary": ("hpclr.cli.summary:summary", "Compare finished runs in a table."),
    "report": ("hpclr.cli.report:report", "Show runs on one page for any browser: curves, ranks, costs."),
    "doctor": ("hpclr.cli.doctor:doctor", "Look at this machine or job: what a run would lack, which node is slow."),
    "data": ("hpclr.cli.data:data", "Prepare and inspect datasets."),
}


_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
_MOMENT = 1.0  # seconds

with_others = False  # whether this process is one of many, and has no time to lose at its end


class LazyGroup(click.Group):
    """A group that knows its commands' names and one-line helps without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which a user meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports the command's module."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, from the table above."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hpclr")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def hpclr(debug: bool) -> None:
    """Trains neural networks whose weights become low-rank, on one machine or a whole cluster."""


def main(arguments: list[str] | None = None) -> None:
    """The entry point; ends the process with the exit code that scripts rely on."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    if not debug:
        warnings.formatwarning = _warning
    try:
        hpclr.main([a for a in arguments if a != "--debug"], prog_name="hpclr", standalone_mode=True)
    except HpclrError as error:
        _report(error, error.exit_code, debug)
    except Exception as error:  # whatever it is, the person gets a sentence and a way to see more
        _report(error, exit_code_of(error), debug)
    finally:
        let_go_of_dead_streams()


def _warning(message: Warning | str, *where: object, **more: object) -> str:
    """A warning as a person reads it; the line of code that it comes from is shown with --debug."""
    return printable(f"hpclr: warning: {message}\n")


def _report(error: Exception, code: int, debug: bool) -> NoReturn:
    kind = "" if isinstance(error, HpclrError) else f"unexpected {type(error).__name__}: "
    hint = "" if debug or isinstance(error, HpclrError) else " (hpclr --debug … shows where)"
    if debug:
        say(printable("".join(traceback.format_exception(error))))
    if _is_mine_to_say(error, code):
        say(printable(f"hpclr: {kind}{error}{hint}"))
    if with_others:
        end_at_once(code)
    sys.exit(code)


def _is_mine_to_say(error: Exception, code: int) -> bool:
    """Whether no other process of the same start has said it, or will.

    Before processes have met they make the same mistakes. A launch is told, and only by the first; else
    the first rank speaks at once, and what the others say after a moment is not heard, if its end has ended them.
    """
    from hpclr.parallel.watch.attempt import launch_directory
    from hpclr.parallel.watch.outcome import Outcome, record_outcome

    if getattr(error, "shared", False):
        return False
    launch = launch_directory()
    if launch is not None:
        return record_outcome(launch, Outcome(code, str(error)))
    if any(os.environ.get(name, "0") != "0" for name in _RANKS):
        time.sleep(_MOMENT)
    return True
