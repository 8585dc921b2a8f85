"""`hpclr submit`: from a run file to a job of Slurm's, checked first; all of it, or nothing."""

import math
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec

from hpclr.cluster import checks, container
from hpclr.cluster.checks import Finding
from hpclr.cluster.code import code_of
from hpclr.cluster.profiles import Profile, load_profile
from hpclr.cluster.record import JOB_SCRIPT, SUBMISSION, Submission, note_jobs, now, read_submission
from hpclr.cluster.resources import Resources, check_resources
from hpclr.cluster.snapshot import CODE, RUN_FILE, Snapshot, placed, versions
from hpclr.cluster.submitting import UnknownOutcomeError, hand_over, jobs_with, submitting, withdraw
from hpclr.config import RunFile, dump, load_run_file, parse_run_file
from hpclr.errors import UsageError
from hpclr.output import say
from hpclr.slurm import client
from hpclr.slurm.script import BatchScript
from hpclr.training.run_directory import writing
from hpclr.version import __version__

__all__ = ["Prepared", "Resources", "prepare", "resume", "submit", "test", "write"]

_WARNING = 120  # seconds before the limit; Slurm may be sixty of them early
_LONGEST_WARNING = 65535  # Slurm's


@dataclass(frozen=True)
class Prepared:
    """A run that can be submitted.

    Attributes:
        directory: of the run, absolute.
        script: its batch script.
        checks: what was found out about it.
        snapshot: what goes into RUN/submission.
    """

    directory: Path
    script: BatchScript
    checks: tuple[Finding, ...]
    snapshot: Snapshot

    @property
    def text(self) -> str:
        """The batch script's text."""
        return self.snapshot.script


def prepare(
    run: RunFile,
    runs_dir: Path,
    resources: Resources,
    command: Sequence[str],
    *,
    partitions: Sequence[client.Partition] | None = None,
) -> Prepared:
    """Checks whether a run can be trained as a job, and makes its batch script; writes nothing.

    Args:
        run: the run file; its paths are as seen from the current directory.
        runs_dir: the directory that holds runs.
        resources: what the job is to have.
        command: the words of the command line, for the record.
        partitions: what Slurm says of its partitions; None: it is asked, if it is here.

    Raises:
        UsageError: with everything that is found wrong.
    """
    check_resources(resources)
    profile = Profile() if resources.profile is None else load_profile(resources.profile)
    directory = Path(os.path.abspath(runs_dir / run.name))
    run = _settled(run, profile, resources.profile)
    code = code_of(run, in_container=resources.container is not None)
    script = _script(run, directory, resources, profile, bool(code))
    text = script.text()
    commits, changes = versions(code)
    looks = _looks(run, directory, resources, profile, script, code)
    looks.append(partial(checks.look_at_changes, changes))
    known = checks.partitions_here() if partitions is None else partitions
    looks.append(partial(checks.look_at_partition, script, resources.partitions(profile), profile, known))
    found = checks.examine(looks, f"this submission of {run.name}")
    record = _record(command, script, resources, commits, changes)
    snapshot = Snapshot(dump(run), text, code, record, packages=resources.container is None, changes=changes)
    return Prepared(directory, script, found, snapshot)


def write(prepared: Prepared) -> Path:
    """Writes RUN/submission, in place of an earlier one; returns the batch script's path."""
    with placed(prepared.directory, prepared.snapshot) as script:
        return script


def test(prepared: Prepared) -> str:
    """What Slurm says of the job, which is not submitted: when and where it would start.

    Raises:
        SlurmError: if it would refuse it.
    """
    with tempfile.TemporaryDirectory() as place:
        script = Path(place, JOB_SCRIPT)
        script.write_text(prepared.text, encoding="utf-8")
        return client.dry_run(script)


def submit(prepared: Prepared) -> tuple[str, ...]:
    """Writes RUN/submission and submits the job, or the chain of jobs; returns their numbers.

    Raises:
        SlurmError: if Slurm does not take it; all is then as it was before.
        UsageError: likewise, if there is no Slurm here, the run directory cannot be written to, or the run has a job.
        UnknownOutcomeError: if nobody can tell now whether Slurm took it; RUN/submission is then there.
    """
    look = partial(checks.require_no_job, prepared.directory)
    with placed(prepared.directory, prepared.snapshot, look) as script:
        return _submit(prepared.directory, script, prepared.snapshot.record.chain, "submit")


def resume(run: Path) -> tuple[str, ...]:
    """Submits a run again as it was submitted before, with the same code and run file; returns the jobs' numbers.

    Raises:
        UsageError: if it was never submitted, is finished, or is at it.
        SlurmError: if Slurm does not take it.
        UnknownOutcomeError: if nobody can tell now whether it did.
    """
    run = Path(os.path.abspath(run))
    record = read_submission(run)
    script = run / SUBMISSION / JOB_SCRIPT
    if record is None or not script.is_file():
        raise UsageError(f"{run}: it has not been submitted before; `hpclr submit RUN_FILE …` does that")
    _require_not_moved(run, script)
    stored = load_run_file(run / SUBMISSION / RUN_FILE)
    checks.require_unfinished(stored, run)
    checks.look_at_data(stored)
    checks.look_at_use(run)
    with submitting(run):
        checks.require_no_job(run)
        return _submit(run, script, record.chain, "resume", _fresh_dependency(script))


def _fresh_dependency(script: Path) -> list[str]:
    """The option of sbatch without the jobs that the first submission waited for, which may be gone for long."""
    found = re.search("^#SBATCH --dependency=(.*)$", script.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None or ":" not in found[1]:
        return []
    say(f"hpclr: warning: --dependency={found[1]} was for the first submission; its jobs are not waited for again")
    kept = [word for word in re.split("[,?]", found[1].strip('"')) if ":" not in word]  # such as singleton
    return [f"--dependency={','.join(kept)}"]


def _submit(
    run: Path, script: Path, chain: int, by: Literal["submit", "resume"], options: Sequence[str] = ()
) -> tuple[str, ...]:
    """To be called while nobody else submits the run."""
    with writing(run):
        (run / "logs").mkdir(exist_ok=True)
    jobs: list[str] = []
    before = jobs_with(script)
    try:
        for _ in range(max(1, chain)):
            after = [f"--dependency=afternotok:{jobs[-1]}", "--kill-on-invalid-dep=yes"] if jobs else options
            hand_over(script, after, before, jobs)
        with writing(run):
            note_jobs(run, tuple(jobs), by, script)
    except UnknownOutcomeError:
        raise
    except BaseException as error:
        withdraw(jobs, error)
        raise
    for job in jobs:
        with suppress(OSError):  # it is there for slurm-tools
            shutil.copyfile(script, run / "logs" / f"{job}_submission.sh")
    return tuple(jobs)


def _require_not_moved(run: Path, script: Path) -> None:
    found = re.search("^RUN=(.*)$", script.read_text(encoding="utf-8"), re.MULTILINE)
    place = Path(*shlex.split(found[1])) if found else Path()
    if not place.is_dir() or not place.samefile(run):
        raise UsageError(
            f"{run}: it was submitted from another place, {place}, which its batch script names. Move it back there, "
            "or submit it anew with `hpclr submit`."
        )


def _looks(
    run: RunFile, directory: Path, resources: Resources, profile: Profile, script: BatchScript, code: Sequence[Path]
) -> list[Callable[[], Finding]]:
    """All checks but that of the partition."""
    looks = [
        partial(checks.look_at_directory, run, directory),
        partial(checks.look_at_use, directory),
        partial(checks.look_at_data, run),
        partial(checks.look_at_code, code),
        partial(checks.look_at_processes, run, script),
        partial(checks.look_at_time, script),
        partial(checks.look_at_account, resources.option("--account") is not None, profile.account_required),
        partial(checks.look_at_space, run, directory),
    ]
    if run.model.weights is not None:
        looks.append(partial(checks.look_at_weights, run.model.weights))
    if resources.profile is not None:
        looks.append(partial(checks.look_at_profile, resources.profile, profile))
    if resources.container is not None:
        runtime = resources.runtime or profile.container.runtime
        binds = [*profile.container.binds, *resources.binds]
        looks.append(partial(checks.look_at_image, resources.container, runtime, binds))
    return list(looks)


def _record(
    command: Sequence[str],
    script: BatchScript,
    resources: Resources,
    commits: dict[str, str],
    changes: bytes | None,
) -> Submission:
    return Submission(
        command=tuple(command),
        name=script.name,
        launcher=script.launcher,
        nodes=script.nodes,
        processes=script.processes,
        chain=resources.chain,
        hpclr=__version__,
        commits=commits,
        changes="unknown" if changes is None else "listed" if changes else "none",
        container=resources.container,
        time=now(),
    )


# --- what a job is made of


def _settled(run: RunFile, profile: Profile, name: str | None) -> RunFile:
    """The run file as the job reads it: with absolute paths, and with the cluster's network where it names none."""
    path, stage, weights = run.data.path, run.data.stage, run.model.weights
    files = os.path.abspath(path) if isinstance(path, str) else tuple(map(os.path.abspath, path))
    stage = stage if stage is None or stage.startswith("$") else os.path.abspath(stage)
    network = {
        "interface": run.parallel.interface or profile.interface,
        "host_suffix": run.parallel.host_suffix or profile.host_suffix,
    }
    changed = msgspec.structs.replace(
        run,
        data=msgspec.structs.replace(run.data, path=files, stage=stage),
        model=msgspec.structs.replace(run.model, weights=None if weights is None else os.path.abspath(weights)),
        parallel=msgspec.structs.replace(run.parallel, **network),
    )
    return parse_run_file(dump(changed), f"the run file with the values of the profile {name}")


def _script(run: RunFile, directory: Path, resources: Resources, profile: Profile, code: bool) -> BatchScript:
    submission = directory / SUBMISSION
    contained = resources.container is not None
    margin = _WARNING if run.slurm.margin is None else run.slurm.margin
    return BatchScript(
        name=run.name,
        run=directory,
        program=("hpclr", "train", "--runs-dir", str(directory.parent), str(submission / RUN_FILE)),
        launcher=resources.launcher,
        nodes=resources.nodes,
        processes=resources.processes,
        cpus=resources.cpus_per_task or _share_of_cores(resources, profile),
        gpus=resources.gpus,
        time=resources.time,
        warning=min(math.ceil(margin), _LONGEST_WARNING),
        options=resources.all_options(profile),
        modules=profile.modules,
        environment={"PYTHONUNBUFFERED": "1", **profile.environment},
        code=submission / CODE if code else None,
        python="python" if contained else sys.executable,
        prefix=_prefix(run, directory, resources, profile) if contained else (),
        mpi=profile.mpi,
        srun_options=profile.srun,
        mpirun=_mpirun(),
        mpirun_options=profile.mpirun,
        host_suffix=run.parallel.host_suffix,
        attempts=resources.attempts,
        chain=resources.chain > 0,
    )


def _share_of_cores(resources: Resources, profile: Profile) -> int:
    names = [name for name in resources.partitions(profile) if name in profile.partitions]
    cores = profile.partitions[names[0]].cores_per_node if names else None
    return max(1, (cores or 1) // resources.processes)


def _mpirun() -> str:
    """That of this Python's environment, if it has one."""
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else "mpirun"


# --- containers


def _prefix(run: RunFile, directory: Path, resources: Resources, profile: Profile) -> list[str]:
    """The words that run a process in the container."""
    runtime, flags = resources.runtime or profile.container.runtime, profile.container.flags
    image, drivers = resources.container or "", {"--nv", "--rocm"} & set(flags)
    return container.prefix(
        runtime,
        image if "://" in image else os.path.abspath(image),
        binds=[*_binds(run, directory, runtime), *profile.container.binds, *resources.binds],
        names=[name for name in profile.environment if name != "PATH"],  # an image has its own programs
        gpu="nvidia" if resources.gpus and not drivers else None,
        flags=flags,
    )


def _binds(run: RunFile, directory: Path, runtime: container.Runtime) -> list[str]:
    """What a run reads and writes, at the same places as outside; those within others come after them."""
    closed = "" if runtime == "charliecloud" else ":ro"  # it cannot
    read = [*checks.data_files(run), *([] if run.model.weights is None else [Path(run.model.weights)])]
    places = sorted({_seen_with(file, directory) for file in read})
    submission = [f"{directory / SUBMISSION}:{directory / SUBMISSION}:ro"] if closed else []
    return [*(f"{place}:{place}{closed}" for place in places), f"{directory}:{directory}", *submission]


def _seen_with(file: Path, run: Path) -> Path:
    """The directory of a file; but the file alone, if others write in that directory, or below."""
    written = (run, Path(os.path.expanduser("~")), Path(tempfile.gettempdir()))
    return file if any(place.is_relative_to(file.parent) for place in written) else file.parent
