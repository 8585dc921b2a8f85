"""Container runtimes: which are found, and whether they start, for which most need user namespaces."""

import shutil
import subprocess
from collections.abc import Iterator

from hpclr.cluster.doctor.finding import Finding, ok, warning

_PROGRAMS = ("apptainer", "singularity", "ch-run", "bwrap")
_NAMESPACE = ("unshare", "--user", "--map-root-user", "true")
_BUBBLE = ("bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "true")
_PATIENCE = 10.0  # seconds


def examine() -> Iterator[Finding]:
    """Starts each without an image, as far as that goes."""
    found = [program for program in _PROGRAMS if shutil.which(program)]
    if not found:
        yield ok("containers", "no runtime found (apptainer, singularity, ch-run, bwrap), needed for images only")
        return
    namespaces = _complaint(_NAMESPACE) if shutil.which("unshare") else ""
    for program in found:
        if complaint := _complaint((program, "--version")):
            yield warning("containers", f"{program} does not start: {complaint}", "Do what it says, or reinstall it.")
        else:
            yield _judge(program, _complaint(_BUBBLE) if program == "bwrap" else namespaces)


def _judge(program: str, complaint: str) -> Finding:
    if not complaint:
        return ok("containers", f"{program} {_version(program)}")
    may = " (one that is installed setuid starts all the same)" if program in _PROGRAMS[:2] else ""
    return warning(
        "containers",
        f"{program} {_version(program)} may not start: {complaint}{may}",
        "User namespaces are needed: ask the administrators (sysctl user.max_user_namespaces, "
        "kernel.apparmor_restrict_unprivileged_userns); some clusters allow them on compute nodes only.",
    )


def _version(program: str) -> str:
    words = _run((program, "--version"))[1].split()
    return next((word for word in words if word[0].isdigit()), "of an unknown version")


def _complaint(command: tuple[str, ...]) -> str:
    """What a command says when it fails; "" if it does not."""
    code, said = _run(command)
    return "" if code == 0 else f"`{' '.join(command)}`: {said or f'exit code {code}'}"


def _run(command: tuple[str, ...]) -> tuple[int, str]:
    done = subprocess.run(  # noqa: S603
        command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE, check=False
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())
