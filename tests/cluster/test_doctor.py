"""`hpclr doctor`: on this machine, with what is missing or broken, in several processes, on a real Slurm."""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import pytest

from hpclr.cluster.doctor.collecting import Check, collect
from hpclr.cluster.doctor.finding import Finding, failure, ok, warning
from hpclr.cluster.doctor.judging import absent, lines, not_shared, report
from hpclr.cluster.doctor.measuring import tournament
from hpclr.cluster.doctor.notes import Note
from hpclr.cluster.doctor.space import size
from hpclr.slurm import client

ROOT = Path(__file__).parents[2]
DOCTOR = [sys.executable, "-m", "hpclr", "doctor"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
SLOW = pytest.mark.slow
AS_ROOT = {f"{mpi}_ALLOW_RUN_AS_ROOT{confirm}": "1" for mpi in ("OMPI", "PRTE") for confirm in ("", "_CONFIRM")}


def environment(**more: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return own | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | AS_ROOT | more


def run(command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment(**more))


def page(*arguments: object, code: int, before: tuple[str, ...] = (), **more: str) -> dict[str, list[dict]]:
    """The findings by what they are about."""
    done = run([*before, *DOCTOR, "--json", *map(str, arguments)], **more)
    assert done.returncode == code, done.stdout + done.stderr
    found: dict[str, list[dict]] = {}
    for finding in json.loads(done.stdout)["findings"]:
        found.setdefault(finding["about"], []).append(finding)
    return found


# ---- checks run where they do no harm


def test_a_check_that_fails_hangs_or_crashes_is_a_line_and_the_others_go_on():
    def hang():
        yield ok("before", "found")
        time.sleep(60)

    def hang_for_good():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.run(["sleep", "60"], check=False)
        yield ok("never", "")

    def crash():
        faulthandler.disable()  # pytest's
        os.write(2, b"wrong memory")
        os.kill(os.getpid(), signal.SIGSEGV)
        yield ok("never", "")

    def fail():
        yield warning("part", "seen", "do this")
        raise ValueError("no such thing")

    checks = [
        Check("hanging", hang, 0.5, remedy="look"),
        Check("stubborn", hang_for_good, 0.5, "warning"),
        Check("crashing", crash, 5),
        Check("failing", fail, 5),
        Check("leaving", lambda: sys.exit(0), 5),
        Check("last", lambda: [ok("last", "well")], 5),
    ]
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before, began = children.read_text(), time.monotonic()
    hanging, stubborn, crashing, failing, leaving, last = collect(checks)
    assert time.monotonic() - began < 4
    assert hanging == [ok("before", "found"), failure("hanging", "no answer within 0.5 s", "look")]
    assert [(one.level, one.text) for one in stubborn] == [("warning", "no answer within 0.5 s")]
    assert "SIGSEGV" in crashing[0].text
    assert "wrong memory" in crashing[0].text
    assert [one.level for one in failing] == ["warning", "failure"]
    assert "ValueError: no such thing" in failing[1].text
    assert leaving[0].level == "failure"
    assert last == [ok("last", "well")]
    assert children.read_text() == before


@pytest.mark.parametrize("count", range(1, 10))
def test_in_a_tournament_each_meets_each_once_and_nobody_two_at_a_time(count):
    rounds = tournament(count)
    met = sorted(tuple(sorted(pair)) for pairs in rounds for pair in pairs)
    assert met == list(combinations(range(count), 2))
    for pairs in rounds:
        there = [one for pair in pairs for one in pair]
        assert len(there) == len(set(there)) >= count - 1 - count % 2


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (123e9, "123 GB"), (2e15, "2.0 PB"), (5e18, "5000 PB")],
)
def test_sizes(count, text):
    assert size(count) == text


# ---- this machine


def test_a_page_on_this_machine_says_what_works(tmp_path):
    done = run([*DOCTOR, str(tmp_path / "runs" / "not-there-yet")], PATH="/usr/bin:/bin", USER="me")
    found = {line.split()[1]: line for line in done.stdout.splitlines() if line.startswith("ok ")}
    assert found.keys() >= {"torch", "gloo", "hdf5", "files", "locking", "machine", "interfaces"}
    assert done.returncode == ("failure" in done.stdout)
    assert f"{tmp_path} (" in found["files"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inside", ["", "/runs/digits"])
def test_a_file_is_no_place_for_runs(inside, tmp_path):
    (tmp_path / "file").write_text("kept")
    done = run([*DOCTOR, f"{tmp_path}/file{inside}"])
    assert done.returncode == 2
    assert f"{tmp_path}/file is no directory" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_programs_get_the_same_as_json(tmp_path):
    found = page(tmp_path, code=0, PATH=str(tmp_path))
    assert found["slurm"][0]["text"] == "not installed here (no sbatch on PATH)"
    assert found["containers"][0]["text"].startswith("no runtime found")
    assert found["hdf5"][0]["level"] == "ok"


def test_what_is_broken_is_named_with_what_to_do(tmp_path):
    """A broken mpi4py, no such interface, a low limit, a runtime that does not start, a quota that is used up."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("class rc: finalize = True")
    (tmp_path / "mpi4py" / "MPI.py").write_text("raise RuntimeError('cannot load MPI library')")
    for name, does in {"apptainer": "echo no setuid >&2; exit 1", "quota": "echo /home 11* 10 10; exit 1"}.items():
        (programs / name).write_text(f"#!/bin/sh\n{does}\n")
        (programs / name).chmod(0o755)
    found = page(
        tmp_path,
        code=1,
        before=("sh", "-c", 'ulimit -n 128; exec "$@"', "sh"),
        PYTHONPATH=f"{tmp_path}:{ROOT}",
        GLOO_SOCKET_IFNAME="ib77",
        PATH=f"{programs}:/usr/bin:/bin",
        TMPDIR="/nowhere",
        HDF5_USE_FILE_LOCKING="FALSE",
    )
    assert "cannot load MPI library" in found["mpi"][0]["text"]
    assert found["mpi"][0]["level"] == "warning"
    broken = [one for one in found["network"] if one["level"] == "failure"]
    assert "GLOO_SOCKET_IFNAME=ib77" in broken[0]["text"]
    assert found["gloo"][0]["level"] == "failure"
    assert "ulimit -n 260" in found["open files"][0]["advice"]
    assert any("no setuid" in one["text"] for one in found["containers"])
    assert found["quota"][0]["level"] == "warning"
    assert found["TMPDIR"][0]["level"] == "warning"
    assert "HDF5_USE_FILE_LOCKING=FALSE" in found["hdf5"][0]["text"]


@pytest.mark.parametrize(
    ("options", "fill", "said"),
    [
        ("size=256k", "head -c 1M /dev/zero >$0/full 2>/dev/null;", "No space left"),
        pytest.param("ro", "", "Read-only file system", marks=SLOW),
    ],
    ids=["full", "read-only"],
)
def test_a_disk_that_takes_nothing(options, fill, said, tmp_path):
    script = f'mount -t tmpfs -o {options} tmpfs $0 2>/dev/null || exit 77; {fill} exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", script, str(tmp_path), *DOCTOR, "--json", str(tmp_path)]
    done = run(command, PATH="/usr/bin:/bin:/usr/sbin")
    if done.returncode in (77, 127) or "unshare" in done.stderr:
        pytest.skip("file systems cannot be mounted here")
    found = {one["about"]: one for one in json.loads(done.stdout)["findings"]}
    assert done.returncode == 1
    assert said in found["files"]["text"]
    assert "HPCLR_RUNS" in found["files"]["advice"]
    assert options == "ro" or found["space"]["level"] == "failure"


# ---- what is made of the notes of many processes


def note(rank: int, host: str, *findings: Finding, state: str = "finished", **measured: float) -> Note:
    return Note(rank, host, 2, (0, 1), findings, state, "", measured)


def test_slow_nodes_are_named_and_how_to_leave_them_out():
    speeds = [100, 98, 102, 97, 50, 101, 99, 96]
    notes = [note(r, f"n{r // 2 + 1}", product=v, pair=1000 - (r == 1) * 500) for r, v in enumerate(speeds)]
    found = report(notes, [])
    assert [(line.finding.level, line.nodes) for line in found.lines] == [("warning", ("n3",)), ("warning", ("n1",))]
    assert "50 GFLOP/s (rank 4); the median is 99" in found.lines[0].finding.text
    assert found.exclusion() == "--exclude=n3,n1"
    assert found.level == "warning"
    assert "to leave out n3, n1: --exclude=n3,n1" in lines(found)


@pytest.mark.parametrize(("nodes", "exclusion"), [(2, ""), (3, "--exclude=n2")])
def test_of_two_nodes_the_slow_one_is_named_but_nobody_left_out(nodes, exclusion):
    found = report([note(r, f"n{r // 2 + 1}", product=50.0 if r // 2 == 1 else 100.0) for r in range(2 * nodes)], [])
    assert [line.nodes for line in found.lines] == [("n2",)]
    assert found.exclusion() == exclusion
    assert ("leave the node out" in found.lines[0].finding.advice) == bool(exclusion)


def test_what_memory_may_have_kept_is_shown_but_not_judged():
    speeds = {f"{disk} disk {what}": 100.0 for disk in ("run", "own") for what in ("read", "write")}
    slow = {name: 10.0 for name in speeds if "read" in name}
    found = report([note(r, f"n{r}", **(speeds | (slow if r == 1 else {}))) for r in range(4)], [])
    assert found.lines == ()
    assert found.table["n1"]["run disk read"] == 10


def test_a_node_that_cannot_write_is_not_said_to_see_another_directory():
    closed = failure("files", "/runs cannot be written to", "Make it writable.")
    notes = [note(0, "n1"), note(1, "n1"), note(2, "n2", closed), note(3, "n2"), note(4, "n3")]
    assert not_shared(Path("/runs"), notes[:4], {0, 1}) == []
    (line,) = not_shared(Path("/runs"), notes, {0, 1})
    assert line.nodes == ("n3",)
    assert "/runs is another directory there than on n1" in line.finding.text


def test_where_all_are_alike_nobody_is_slow():
    found = report([note(r, f"n{r}", product=100 - r, clock=0.4) for r in range(4)], [])
    assert found.lines == ()
    assert found.exclusion() == ""


def test_a_node_with_another_version_or_clock_is_named():
    versions = ["2.6", "2.6", "2.5", "2.6"]
    notes = [note(r, f"n{r}", ok("torch", v, same=f"torch {v}"), clock=3.0 * (r == 1)) for r, v in enumerate(versions)]
    warnings = [line for line in report(notes, []).lines if line.finding.level == "warning"]
    assert [(line.finding.text, line.nodes) for line in warnings] == [
        ("torch 2.5, elsewhere torch 2.6", ("n2",)),
        ("its clock is +3.0 s from that of n0", ("n1",)),
    ]


def test_what_fails_on_one_node_only_speaks_against_it():
    broken = failure("device 0", "it does not compute", "Leave out.")
    fine = ok("device 0", "computes")
    assert report([note(0, "n1", fine), note(1, "n2", broken)], []).exclusion() == "--exclude=n2"
    assert report([note(0, "n1", broken), note(1, "n2", broken)], []).exclusion() == ""


def test_nodes_from_which_nobody_came_are_named():
    notes = [note(0, "n1.site"), note(1, "n1.site"), note(2, "n2", state="checked")]
    found = absent(notes, 6, ["n1", "n2", "n3"])
    assert [line.nodes for line in found] == [("n3", "n2"), ("n2",)]
    assert found[0].finding.text == "ranks 3-5 of 6 did not come"
    assert found[1].finding.text.startswith("rank 2 came, but did not answer")
    assert absent(notes[:2], 4, [])[0].nodes == ()


# ---- several processes


def of_job(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.stdout.count('"processes": ') >= 1, done.stdout + done.stderr
    return json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1])


@pytest.mark.parametrize("launcher", ["alone", *(pytest.param(one, marks=SLOW) for one in ("torchrun", "mpirun"))])
def test_a_job_on_this_machine_is_measured(launcher, tmp_path):
    mpirun = [str(Path(sys.executable).with_name("mpirun")), "--oversubscribe", "--bind-to", "none", "-n", "2"]
    start = {"alone": [], "torchrun": TORCHRUN, "mpirun": mpirun}[launcher]
    done = run([*start, *DOCTOR, "--job", "--json", str(tmp_path)])
    found = of_job(done)
    (host,) = found["nodes"]
    measured = found["measured"][host]
    many = 1 if launcher == "alone" else 2
    assert found["processes"] == measured["processes"] == many
    assert measured.keys() >= {"product", "run disk write", "own disk read"}
    assert launcher == "alone" or measured.keys() >= {"pair", "latency", "bandwidth"}
    about = {one["about"]: one for one in found["findings"]}
    assert about["mpi"]["level"] == "ok"
    assert f"COMM_WORLD has {2 if launcher == 'mpirun' else 1} process" in about["mpi"]["text"]
    assert done.returncode == (found["level"] == "failure")
    assert list(tmp_path.iterdir()) == []


STOPPED = """
if [ $RANK = 0 ]; then exec "$@"; fi
"$@" & own=$!
trap 'kill -KILL $own' EXIT
until ls -A "$0" | grep -q -e '-1.json$'; do sleep 0.05; done
kill -STOP $own
sleep 40
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ('if [ $RANK = 1 ]; then sleep 60; else exec "$@"; fi', "rank 1 of 2 did not come"),
        (STOPPED, "rank 1 came, but did not answer"),
    ],
    ids=["absent", "stopped"],
)
def test_a_process_that_does_not_take_part_is_named(trouble, said, tmp_path):
    done = run([*TORCHRUN, "bash", "-c", trouble, str(tmp_path), *DOCTOR, "--job", "--timeout", "4", str(tmp_path)])
    assert done.returncode == 1
    assert said in done.stdout


# ---- a real Slurm


def job(slurm, path: Path, body: str, *options: str) -> str:
    """What a job says, which is waited for."""
    (path / "runs").mkdir()
    script = path / "job.sh"
    exports = "\n".join(f"export {name}='{value}'" for name, value in environment().items() if name in EXPORTED)
    script.write_text(f"#!/bin/bash\n{exports}\nDOCTOR='{' '.join(DOCTOR)}'\n{body.format(runs=path / 'runs')}")
    number = client.submit(script, [f"--output={path}/out", *options])
    slurm.wait(number, limit=100)
    return (path / "out").read_text()


EXPORTED = {"OMP_NUM_THREADS", "PYTHONPATH", *AS_ROOT}


def test_slurm_is_described(real_slurm, tmp_path):
    found = page(tmp_path, code=0, USER="me")
    assert "answered" in found["slurm"][0]["text"]
    assert "main [default] (4 × 4 CPUs, 2 GPUs; at most 7-00:00:00)" in found["partitions"][0]["text"]
    assert found["requeue"][0]["text"] == "by default"


@pytest.mark.slow
def test_silent_singletons_under_srun_are_named(real_slurm, tmp_path):
    body = "srun $DOCTOR {runs}; srun --mpi=pmix $DOCTOR {runs}"
    said = job(real_slurm, tmp_path, body, "--nodes=2", "--ntasks-per-node=1")
    assert said.count("hpclr doctor on n1") == 2  # one page each time
    assert said.count("started 2 processes, of which this is rank 0, but in COMM_WORLD it is rank 0 of 1") == 1
    assert said.count("COMM_WORLD has 2 processes") == 1


@pytest.mark.slow
def test_the_nodes_of_a_job_are_compared(real_slurm, tmp_path):
    said = job(real_slurm, tmp_path, "srun $DOCTOR --job {runs}; echo code $?", "--nodes=2", "--ntasks-per-node=2")
    assert "4 processes of 2 nodes" in said
    assert "code 0" in said
    assert {line.split()[0] for line in said.splitlines() if line.startswith(("n1 ", "n2 "))} == {"n1", "n2"}


@pytest.mark.slow
def test_a_node_that_computes_slowly_is_named(real_slurm, tmp_path):
    body = """
    srun bash -c '
        if [ $SLURM_NODEID = 0 ]; then exec taskset -c 1 '"$DOCTOR"' --job --json {runs}; fi
        busy="until ls -A {runs} | grep -q -e -1.json; do sleep 0.1; done; while :; do :; done"  # once it has checked
        for i in 1 2 3; do timeout 80 taskset -c 0 sh -c "$busy" & done
        exec taskset -c 0 '"$DOCTOR"' --job --json {runs}'
    """
    said = job(real_slurm, tmp_path, body, "--nodes=2", "--ntasks-per-node=1")
    found = json.loads(said[said.index("{") : said.rindex("}") + 1])
    slow = [one["nodes"] for one in found["findings"] if one["text"].startswith("matrix products")]
    assert slow == [["n2"]]


@pytest.mark.slow
def test_a_node_with_a_slow_network_is_named(real_slurm, tmp_path):
    body = """
    srun --nodes=1 --ntasks=1 --nodelist=n3 tc qdisc add dev eth0 root tbf rate 100mbit burst 64kb latency 400ms
    srun $DOCTOR --job --json {runs}
    srun --nodes=1 --ntasks=1 --nodelist=n3 tc qdisc del dev eth0 root
    """
    said = job(real_slurm, tmp_path, body, "--nodelist=n1,n2,n3", "--ntasks-per-node=1")
    found = json.loads(said[said.index("{") : said.rindex("}") + 1])
    slow = [one["nodes"] for one in found["findings"] if one["text"].startswith("exchange")]
    assert slow == [["n3"]]
    assert "n3" in found["exclude"]


@pytest.mark.slow
def test_a_node_that_does_not_come_is_named(real_slurm, tmp_path):
    body = """
    srun bash -c 'if [ $SLURM_NODEID = 1 ]; then sleep 60; else exec '"$DOCTOR"' --job --timeout 5 {runs}; fi'
    """
    said = job(real_slurm, tmp_path, body, "--nodes=2", "--ntasks-per-node=2")
    assert "n2: ranks 2-3 of 4 did not come" in said
    assert "to leave out n2: --exclude=n2" in said


@pytest.mark.slow
def test_a_slurm_that_is_away_is_a_failure(real_slurm, tmp_path):
    real_slurm.do("kill-controller")
    try:
        found = page(tmp_path, code=1)
    finally:
        real_slurm.do("start-controller")
    assert found["slurm"][0]["level"] == "failure"
    assert "Its controller is away" in found["slurm"][0]["advice"]
