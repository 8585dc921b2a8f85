"""`hpclr doctor`."""

import json
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpclr import cli

if TYPE_CHECKING:
    from hpclr.cluster.doctor.circumstances import Circumstances


@click.command()
@click.argument("run_directory", required=False, type=click.Path(path_type=Path))
@click.option("--job", is_flag=True, help="In every process of a job: compare its nodes, and measure.")
@click.option("--timeout", type=click.FloatRange(min=1), default=120.0, show_default=True, help="Of --job, seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print it for programs.")
def doctor(run_directory: Path | None, job: bool, timeout: float, as_json: bool) -> None:
    """Look at this machine, and say what a run would lack here and what to do: ok, warning or failure in each line.

    RUN_DIRECTORY is where a run is, or will be [HPCLR_RUNS, else ./runs]. With --job it is started as a run is, by
    srun, torchrun or mpirun; the processes meet, compare their nodes and measure them, and one of them says which are
    slow or bad. Ends with 1 if there is a failure, else with 0.
    """
    from hpclr.cluster.doctor.circumstances import look_around
    from hpclr.output import end_at_once

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what broken connections log is said here in other words
    here = look_around(run_directory, strict=job)
    cli.with_others = here.layout.world_size > 1
    failed = _of_job(here, timeout, as_json) if job else _of_machine(here, as_json)
    if cli.with_others:
        end_at_once(int(failed))
    sys.exit(int(failed))


def _of_machine(here: "Circumstances", as_json: bool) -> bool:
    """The page of this machine, each line as it is known; returns whether there is a failure."""
    import msgspec

    from hpclr.cluster.doctor import page

    found = []
    speaks = here.layout.rank == 0
    if speaks and not as_json:
        _print(f"hpclr doctor on {platform.node()}, for {here.asked}\n")
    for finding in page.examine(here):
        found.append(finding)
        if not as_json:
            _print("\n".join(page.lines(finding)))
    if as_json and speaks:
        _print(json.dumps({"host": platform.node(), "findings": msgspec.to_builtins(found)}, indent=2))
    elif speaks:
        more = f"; with --job all {here.layout.world_size} processes are looked at" if cli.with_others else ""
        _print(f"\n{page.verdict(found)}{more}")
    return any(finding.level == "failure" for finding in found)


def _of_job(here: "Circumstances", timeout: float, as_json: bool) -> bool:
    """The page of all nodes, in the one process that has it; returns whether there is a failure."""
    from hpclr.cluster.doctor import job, judging, page

    report = job.examine(here, timeout)
    if report is None:
        return False
    if as_json:
        _print(json.dumps(report.as_json(), indent=2))
    else:
        _print(
            "\n".join([f"hpclr doctor on {judging.counted(report)}, for {here.asked}", "", *judging.lines(report), ""])
        )
        _print(page.verdict(line.finding for line in report.lines))
    return report.level == "failure"


def _print(text: str) -> None:
    from hpclr.output import Unfailing, printable

    print(printable(text), file=Unfailing(sys.stdout), flush=True)
