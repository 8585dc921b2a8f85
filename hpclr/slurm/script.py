"""The batch script of a run: bash that a person can read, and that needs no Python on the host."""

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hpclr.errors import UsageError

Launcher = Literal["srun", "torchrun", "mpirun"]
_SUPERVISE = Path(__file__).with_name("supervise.sh")
_OWN_NAMES = ("ATTEMPTS", "CHAIN", "PATIENCE", "LAUNCH", "DEADLINE", "EARLY", "ASKED")
_OWN_VARIABLES = ("RUN", *(f"HPCLR_{name}" for name in _OWN_NAMES))
_FOR_SBATCH = ("name", "run", "time", "options")
# Before anything that takes time; what is common to all scripts says why, and sees to what is remembered.
_REMEMBER = 'for signal in USR1 USR2 TERM; do trap "HPCLR_EARLY=$signal" "$signal"; done'
# Of a value: text; or $$, $NAME, ${NAME}, or a $ alone.
_VARIABLE = re.compile(r"([^$]+)|(\$(?:\$|([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})?)")
LOG_STEM = "%j_0_log"  # what slurm-tools' slogs and stui look for
# The script does not work with other values of these, or says them itself.
_OWN = (
    *("--job-name", "--nodes", "--ntasks", "--ntasks-per-node", "--cpus-per-task", "--time", "--signal", "--requeue"),
    *(
        "--no-requeue",
        "--open-mode",
        "--output",
        "--error",
        "--export",
        "--export-file",
        "--chdir",
        "--wrap",
        "--array",
    ),
    *("--test-only", "--parsable", "--wait", "--clusters", "--uid", "--gid", "--help", "--usage", "--version"),
)


@dataclass(frozen=True)
class BatchScript:
    """What a batch script is made of.

    Attributes:
        name: of the job.
        run: the run directory, absolute; `logs/` must be there when the job starts.
        program: what each process runs: the words after `python -m`, such as ("hpclr", "train", "run.yaml").
        launcher: what starts the processes.
        nodes: how many.
        processes: on each node.
        cpus: for each process.
        gpus: of each node.
        time: the limit, as sbatch takes it; None: the partition's.
        warning: seconds before the limit at which the script asks the run to save; Slurm may be a minute early.
        options: any other options of sbatch, each one word, `--name` or `--name=value`.
        modules: loaded with `module load`, in this order.
        environment: variables for the processes, set after the modules are loaded; $NAME or ${NAME} in a value is the
            job's variable, empty if it has none, and $$ a plain $.
        code: a directory of Python code that comes before any other; None: what is installed.
        python: the interpreter, in the container if there is one.
        prefix: what is put before the command of each process: a container's runtime, its options and its image.
        mpi: srun's `--mpi`; None: what the cluster has chosen. The agents of torchrun know nothing of MPI.
        srun_options: further options of srun.
        mpirun: the program.
        mpirun_options: further options of mpirun.
        host_suffix: what turns the name of a node into its name in the fast network, for torchrun.
        attempts: how many starts the job may have.
        chain: the job does not requeue itself, but ends with 85, and the next of a chain of jobs goes on.
        patience: seconds for which a requeue is tried.
    """

    name: str
    run: Path
    program: Sequence[str]
    launcher: Launcher
    nodes: int
    processes: int
    cpus: int = 1
    gpus: int = 0
    time: str | None = None
    warning: int = 120
    options: Sequence[str] = ()
    modules: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    code: Path | None = None
    python: str = "python"
    prefix: Sequence[str] = ()
    mpi: str | None = None
    srun_options: Sequence[str] = ()
    mpirun: str = "mpirun"
    mpirun_options: Sequence[str] = ()
    host_suffix: str = ""
    attempts: int = 20
    chain: bool = False
    patience: int = 120

    def text(self) -> str:
        """The script.

        Raises:
            UsageError: if something cannot be said to sbatch or in a line of bash, or is the script's own to say.
        """
        _check(self)
        parts = [
            "#!/bin/bash",
            f"# A run of hpclr on {_count(self.nodes, 'node')} with {_count(self.processes, 'process', 'processes')} "
            f"each, started by {self.launcher}.",
            "# `sbatch` this file, and the run begins, or goes on where it is.",
            *(f"#SBATCH {option}" for option in _directives(self)),
            "set -euo pipefail",
            _REMEMBER,
            "",
            *_settings(self),
            "",
            *_environment(self),
            "",
            *_launch(self),
            "",
            "# --- From here on all scripts of hpclr are the same.",
            "",
            _SUPERVISE.read_text(encoding="utf-8"),
            'cd "$RUN"',
            'supervise "$RUN" launch',
            "",
        ]
        return "\n".join(parts)


def _directives(script: BatchScript) -> Iterator[str]:
    """What sbatch reads; torchrun is one task a node, with the CPUs of all its processes."""
    tasks, cpus = script.processes, script.cpus
    if script.launcher == "torchrun":
        tasks, cpus = 1, tasks * cpus
    logs = f"{str(script.run).replace('%', '%%')}/logs/{LOG_STEM}"
    yield _option("--job-name", script.name)
    yield f"--nodes={script.nodes}"
    yield f"--ntasks-per-node={tasks}"
    yield f"--cpus-per-task={cpus}"
    if script.gpus:
        yield f"--gpus-per-node={script.gpus}"
    if script.time is not None:
        yield _option("--time", script.time)
    for word in script.options:
        name, given, value = word.partition("=")
        yield _option(name, value) if given else name
    yield f"--signal=B:USR1@{script.warning}"
    yield "--no-requeue" if script.chain or script.attempts == 1 else "--requeue"
    yield "--open-mode=append"
    yield _option("--output", f"{logs}.out")
    yield _option("--error", f"{logs}.err")
    yield "--export=NONE"


def _option(name: str, value: str) -> str:
    """sbatch knows double quotes and the backslash; it expands nothing in them."""
    if value and shlex.quote(value) == value:
        return f"{name}={value}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}="{escaped}"'


def _settings(script: BatchScript) -> Iterator[str]:
    yield f"RUN={shlex.quote(str(script.run))}"
    yield f"HPCLR_ATTEMPTS={script.attempts} # starts that the job may have"
    chain = "yes" if script.chain else "no"
    yield f"HPCLR_CHAIN={chain} # yes: the next job of a chain goes on; no: this one is requeued"
    yield f"HPCLR_PATIENCE={script.patience} # seconds for which a requeue is tried"


def _environment(script: BatchScript) -> Iterator[str]:
    yield "# Nothing was taken over from the shell of who submitted this, but srun passes on what is set here."
    yield "export SLURM_EXPORT_ENV=ALL"
    if script.modules:
        yield "set +eu # sites do not write these for it"
        yield "type module >/dev/null 2>&1 || . /etc/profile"
        yield f'module load {shlex.join(script.modules)} || [ -n "${{HPCLR_EARLY:-}}" ] || exit 1'
        yield "set -eu"
    for name, value in script.environment.items():
        yield f"export {name}={_with_variables(name, value)}"
    if script.code is not None:
        yield f"export PYTHONPATH={shlex.quote(str(script.code))}${{PYTHONPATH:+:$PYTHONPATH}}"


def _with_variables(name: str, value: str) -> str:
    """A value as a word of bash, which puts in the job's variables and nothing else.

    Raises:
        UsageError: for a $ that stands for nothing.
    """
    word = ""
    for text, dollar, plain, braced in _VARIABLE.findall(value):
        word += f'"${{{plain or braced}:-}}"' if plain or braced else shlex.quote(text or "$")
        if dollar and dollar != "$$" and not (plain or braced):
            raise UsageError(
                f"environment: {name}: {value!r} has a $ without the name of a variable, such as $PATH or ${{PATH}}, "
                "after it; nothing else is replaced. Write $$ for a $."
            )
    return word or "''"


def _launch(script: BatchScript) -> list[str]:
    lines = {"srun": _srun, "mpirun": _mpirun, "torchrun": _torchrun}[script.launcher](script)
    return ["launch() {", *(f"  {line}" for line in lines), "}"]


def _srun(script: BatchScript) -> list[str]:
    command = ["exec", *_step(script, script.processes, script.cpus, script.mpi)]
    return _broken(shlex.join(command), shlex.join(script.prefix), shlex.join(_of_module(script, script.program)))


def _mpirun(script: BatchScript) -> list[str]:
    """Unbound, so that each process may use all the cores of its node, unless the site's options say otherwise."""
    placement = {"--map-by": f"ppr:{script.processes}:node", "--bind-to": "none"}
    given = {word.partition("=")[0] for word in script.mpirun_options}
    defaults = [word for name, value in placement.items() if name not in given for word in (name, value)]
    start = ["exec", script.mpirun, "-n", str(script.nodes * script.processes), *defaults, *script.mpirun_options]
    return _broken(shlex.join(start), shlex.join(script.prefix), shlex.join(_of_module(script, script.program)))


def _torchrun(script: BatchScript) -> list[str]:
    """One agent a node, which finds out there which node it is.

    An agent would compare the address of the meeting place with its own names to learn whether it is to open the store,
    and would be mistaken where a node has a second name; hence `is_host`.
    """
    suffix = shlex.quote(script.host_suffix) if script.host_suffix else ""
    agent = _broken(
        'trap "" USR1 USR2; exec',  # it knows nothing of these; its processes do
        shlex.join(script.prefix),
        shlex.join(_of_module(script, ["torch.distributed.run"])),
        f"--nnodes={script.nodes} --nproc-per-node={script.processes} --rdzv-backend=c10d",
        '--rdzv-endpoint="$1:$2" --rdzv-id="$SLURM_JOB_ID" --rdzv-conf="is_host=$((SLURM_NODEID == 0))"',
        f'--local-addr="$SLURMD_NODENAME"{suffix}' if suffix else "",
        shlex.join(["-m", *script.program]),
    )
    step = shlex.join(["exec", *_step(script, 1, script.cpus * script.processes, "none"), "bash", "-c"])
    return [
        "local host port",
        f'host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p){suffix}',
        "port=$(free_port)",
        *_broken(step, shlex.quote("\n    ".join(agent)), 'agent "$host" "$port"'),
    ]


def _step(script: BatchScript, tasks: int, cpus: int, mpi: str | None) -> list[str]:
    """srun and its options; it does not take the number of CPUs from the job by itself."""
    return [
        *("srun", f"--nodes={script.nodes}", f"--ntasks={script.nodes * tasks}", f"--ntasks-per-node={tasks}"),
        *(f"--cpus-per-task={cpus}", "--kill-on-bad-exit=1"),
        *([] if mpi is None else [f"--mpi={mpi}"]),
        *script.srun_options,
    ]


def _of_module(script: BatchScript, words: Sequence[str]) -> list[str]:
    return [script.python, "-m", *words]


def _broken(*parts: str) -> list[str]:
    """A command over several lines."""
    first, *others = [part for part in parts if part]
    lines = [first, *(f"  {part}" for part in others)]
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _check(script: BatchScript) -> None:
    for what, value in _values(script):
        _check_text(what, value)
    if not script.run.is_absolute() or "\\" in str(script.run):
        raise UsageError(
            f"run directory {str(script.run)!r}: expected an absolute path without a backslash, after which Slurm does "
            "not fill in the number of the job. Give the run another place with --runs-dir."
        )
    if script.code is not None and os.pathsep in str(script.code):
        raise UsageError(
            f"code in {str(script.code)!r}: a directory with {os.pathsep!r} in its name cannot be on PYTHONPATH"
        )
    for name in script.environment:
        if not (name.isascii() and name.isidentifier()):
            raise UsageError(f"environment: expected the name of a variable, found {name!r}")
        if name in _OWN_VARIABLES or name.startswith("SLURM_"):
            raise UsageError(f"environment: {name} is a variable of the batch script or of Slurm; leave it out")
    for word in script.options:
        _check_option(word)


def _values(script: BatchScript) -> Iterator[tuple[str, str]]:
    """All text that goes into the script, each with what it is."""
    single = ("name", "run", "time", "code", "python", "mpi", "mpirun", "host_suffix")
    several = ("program", "options", "modules", "prefix", "srun_options", "mpirun_options")
    yield from ((name, str(value)) for name in single if (value := getattr(script, name)) is not None)
    yield from ((name, value) for name in several for value in getattr(script, name))
    yield from ((f"environment: {name}", value) for name, value in script.environment.items())


def _check_text(what: str, value: str) -> None:
    """bash takes lines in quotes, sbatch in its own part of the script does not; it refuses carriage returns."""
    allowed = "" if what in _FOR_SBATCH else "\n\t"
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{what}: {value!r} is not valid UTF-8, and a batch script cannot hold it; rename it"
        ) from None
    if bad := next((c for c in value if (ord(c) < 32 or ord(c) == 127) and c not in allowed), None):
        raise UsageError(f"{what}: {value!r} contains {bad!r}, which a batch script cannot hold; leave it out")


def _check_option(word: str) -> None:
    """sbatch takes any unambiguous beginning of a name for the name."""
    name = word.partition("=")[0]
    if len(name) < 3 or not name.startswith("--") or not name.replace("-", "").isalnum() or not name.isascii():
        raise UsageError(
            f"option {word!r} of sbatch: expected --name or --name=value, in one word and with the long name, such as "
            "--partition=main"
        )
    if any(own.startswith(name) for own in _OWN):
        raise UsageError(
            f"option {word!r} of sbatch: the batch script sets it itself, or cannot work with it. Use the option of "
            "hpclr that has this purpose, if there is one; else leave it out."
        )
