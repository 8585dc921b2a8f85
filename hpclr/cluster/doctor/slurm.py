"""Slurm: whether it answers, its partitions and limits, whether jobs may be requeued, and the job that this is."""

import re
import subprocess
import time
from collections.abc import Iterator

from hpclr.cluster.doctor.finding import Finding, failure, ok, warning
from hpclr.errors import EXIT_RETRY
from hpclr.parallel.meeting.layout import Layout
from hpclr.slurm import client
from hpclr.slurm.client import Partition, SlurmError
from hpclr.slurm.jobs import Job

_MOST_LISTED = 8
_SLOW = 5.0  # seconds
_PATIENCE = 15.0  # seconds
_CHAIN = "Where jobs may not be requeued, submit a chain of them: `hpclr submit --chain`."


def examine(job: Job | None) -> Iterator[Finding]:
    """Asks Slurm four short questions."""
    if not client.is_installed():
        yield ok("slurm", "not installed here (no sbatch on PATH)")
        return
    try:
        yield from _ask(job)
    except SlurmError as error:
        yield _unanswered(error)


def _unanswered(error: SlurmError) -> Finding:
    if "configuration source" in str(error):  # programs from a package, and no cluster
        text = "its programs are here, but nothing tells them of a cluster (no slurm.conf)"
        return warning("slurm", text, "On a node of a cluster: load Slurm's module. Elsewhere it does not matter.")
    away = error.exit_code == EXIT_RETRY
    advice = "Its controller is away or unreachable from here: wait, or tell the administrators." if away else _ASK
    return failure("slurm", str(error), advice)


_ASK = "Ask the administrators whether Slurm may be used from this machine."


def _ask(job: Job | None) -> Iterator[Finding]:
    version = client.version()
    began = time.monotonic()
    partitions = client.partitions()
    took = time.monotonic() - began
    text = f"{version}; its controller has answered in {took:.1f} s"
    if took > _SLOW:
        yield warning("slurm", text, "It is overloaded: ask it seldom (squeue in loops is a usual cause).")
    else:
        yield ok("slurm", text, same=f"slurm {version}")
    yield _partitions(partitions)
    yield _requeue()
    if job is not None:
        yield _job(job)


def _partitions(found: list[Partition]) -> Finding:
    if not found:
        return failure("partitions", "there is none that you may see", _ASK)
    more = f", and {len(found) - _MOST_LISTED} more" if len(found) > _MOST_LISTED else ""
    text = ", ".join(map(_described, found[:_MOST_LISTED])) + more
    if not any(one.up for one in found):
        return failure("partitions", text, "All are down: wait, or ask the administrators.")
    if not any(one.default for one in found):
        return warning("partitions", f"none is the default: {text}", "Every job must name one: --partition.")
    return ok("partitions", text)


def _described(one: Partition) -> str:
    gpus = f", {one.gpus} GPUs" if one.gpus else ""
    limit = "no time limit" if one.max_time is None else f"at most {_duration(one.max_time)}"
    most = "" if one.max_nodes is None else f" on {one.max_nodes} nodes"
    notes = " [default]" * one.default + " [down]" * (not one.up)
    return f"{one.name}{notes} ({one.nodes} × {one.cpus} CPUs{gpus}; {limit}{most})"


def _duration(seconds: int) -> str:
    """`2-00:00:00`, as Slurm writes it."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02}:{minutes:02}:{rest:02}" if days else f"{hours:02}:{minutes:02}:{rest:02}"


def _requeue() -> Finding:
    """JobRequeue=0 means that only jobs that ask for it are requeued, as those of hpclr do."""
    asked = client.ask("scontrol", "show", "config")
    found = re.search(r"^JobRequeue\s*=\s*([01])", asked.stdout, re.MULTILINE)
    if found is None:
        return warning("requeue", "Slurm does not say whether jobs are requeued", _CHAIN)
    return ok(
        "requeue", "by default" if found[1] == "1" else "only of jobs that ask for it, as those of `hpclr submit` do"
    )


def _job(job: Job) -> Finding:
    found = client.details(job.id)
    if found is None:
        return warning("job", f"{job}, of which Slurm knows nothing", "It may belong to another cluster.")
    left = next((one.time_left for one in client.queue([job.id]) if one.id == job.id), None)
    text = f"{job} on {found.node_list}, {'no time limit' if left is None else f'{_duration(left)} left'}"
    if found.fields.get("Requeue") == "0":
        return warning("job", f"{text}; it may not be requeued", f"Submit it with --requeue. {_CHAIN}")
    return ok("job", text)


def nodes_of(layout: Layout, job: Job | None) -> list[str]:
    """The names of the nodes where processes were started: of the step, else of the job; none if Slurm does not say."""
    if job is None:
        return []
    asked = ["step", ".".join((layout.key or "").split(".")[:2])] if layout.launcher == "slurm" else ["job", job.id]
    try:
        shown = client.ask("scontrol", "--oneliner", "show", *asked, patience=_PATIENCE).stdout
        found = re.search(r"(?:^|\s)NodeList=(\S+)", shown)
        names = client.ask("scontrol", "show", "hostnames", found[1], patience=_PATIENCE).stdout if found else ""
    except (OSError, subprocess.TimeoutExpired):
        return []
    return names.split()
