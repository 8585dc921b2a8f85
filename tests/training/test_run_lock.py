"""The lock on a run directory: real processes, killed, stopped, started at once, and records of other hosts."""

import contextlib
import errno
import json
import operator
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from process_helpers import environment
from test_bad_input import check_refused
from training_helpers import hpclr, summary

from hpclr.errors import HpclrError, UsageError
from hpclr.parallel.watch.record import SIZE
from hpclr.slurm.jobs import Job
from hpclr.training.lock import locked
from hpclr.training.owner import Owner, decode, this_process

WATCH = 0.6  # seconds; with that, hearts beat every 0.2 s
ELSEWHERE = "hpclr.training.owner.pid_namespace = lambda: 'another host'"  # its pids say nothing here
OTHER_FILES = ("notes", "7", "0000007", "1" * 19, "１２３４５６")  # no names that numbers have
HOLD = """
import sys, time
from pathlib import Path
import hpclr.training.owner
from hpclr.errors import HpclrError
from hpclr.training.lock import locked
{before}
with locked(Path(sys.argv[1]), watch={watch}) as lock:
    print("held", flush=True)
    try:
        while sys.stdin.readline() == "look\\n":
            time.sleep(0.05)
            lock.require_held()
            print("mine", flush=True)
    except HpclrError as error:
        print(error, flush=True)
"""


def record_of(run: Path, number: int = 1) -> Path:
    return run / ".locks" / f"{number:06d}"


def owner_of(run: Path, number: int = 1) -> Owner:
    found = decode(record_of(run, number).read_bytes())
    assert found is not None
    return found


def plant(run: Path, **changes: object) -> Owner:
    """A record as this process would leave, with changes."""
    owner = this_process()
    for name, value in changes.items():
        setattr(owner, name, value)
    (run / ".locks").mkdir(parents=True)
    record_of(run).write_bytes(owner.encode())
    return owner


def as_free(run: Path) -> Path:
    """A file with the record as its owner would leave it."""
    owner = owner_of(run)
    owner.state = "free"
    path = run / ".locks" / "free"
    path.write_bytes(owner.encode())
    return path


class Holder:
    """A process that holds a run directory until it is told to let go."""

    def __init__(self, run: Path, before: str = "") -> None:
        line = [sys.executable, "-c", HOLD.format(before=before, watch=WATCH), str(run)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(line, text=True, env=environment(), **pipes)
        assert self.process.stdout.readline() == "held\n"

    def let_go(self) -> None:
        assert self.process.communicate(timeout=60)[0] == ""
        assert self.process.returncode == 0

    def look(self) -> str:
        """What it says of its lock after a moment."""
        self.process.stdin.write("look\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def holding():
    """Starts such processes; ends them."""
    with contextlib.ExitStack() as started:

        def start(run: Path, before: str = "") -> Holder:
            holder = Holder(run, before)
            started.callback(holder.kill)
            return holder

        yield start


def assert_in_use(run: Path, *texts: str, **options: object) -> None:
    """The directory cannot be had; the texts tell why, and whether --break-lock may help."""
    # whoever is alive is found out before long, also on a busy machine
    with pytest.raises(UsageError) as caught, locked(run, watch=20 * WATCH, **options):
        pass
    for text in ("is in use by", *texts):
        assert text in str(caught.value)
    assert ("--break-lock" in str(caught.value)) is ("--break-lock" in texts)


def assert_free(run: Path, capfd, **options: object) -> None:
    """The directory can be had, and nobody needs to have it taken away."""
    with locked(run, watch=WATCH, **options):
        pass
    assert capfd.readouterr().err == ""


def assert_taken_over(run: Path, capfd, *texts: str, watched: bool, **options: object) -> None:
    start = time.monotonic()
    with locked(run, watch=WATCH, **options):
        assert (time.monotonic() - start > WATCH) is watched
    said = capfd.readouterr().err
    assert said.count("\n") == 1 + watched
    for text in ("taken over from", *texts):
        assert text in said.splitlines()[-1]


def test_a_lock_is_held_and_let_go(tmp_path, capfd):
    run = tmp_path / "runs" / "run"
    for number in (1, 2):
        with locked(run) as lock:
            assert owner_of(run, number).identity == this_process().identity
            assert owner_of(run, number).state == "held"
            lock.require_held()
        assert owner_of(run, number).state == "free"
    assert [path.name for path in sorted((run / ".locks").iterdir())] == ["000001", "000002"]
    assert_free(run, capfd)


def test_an_error_lets_go(tmp_path, capfd):
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    assert_free(tmp_path, capfd)


@pytest.mark.parametrize("break_lock", [False, True])
def test_a_process_does_not_lock_twice(break_lock, tmp_path):
    with locked(tmp_path):
        assert_in_use(tmp_path, "It is alive", break_lock=break_lock)


@pytest.mark.parametrize("break_lock", [False, True])
def test_another_process_is_named(break_lock, tmp_path, holding, capfd):
    holder = holding(tmp_path)
    owner = owner_of(tmp_path)
    texts = (f"process {holder.process.pid} on {platform.node()}, of ", f"since {owner.since}", "Wait for it to end")
    assert_in_use(tmp_path, *texts, "It is alive", break_lock=break_lock)
    holder.let_go()
    assert_free(tmp_path, capfd)


@pytest.mark.parametrize("reaped", [False, True])
def test_a_process_that_was_killed_is_gone(reaped, tmp_path, holding, capfd):
    holder = holding(tmp_path)
    holder.process.kill()
    if reaped:
        holder.process.wait()
    else:
        os.waitid(os.P_PID, holder.process.pid, os.WEXITED | os.WNOWAIT)
    who = f"process {holder.process.pid} on {platform.node()}"
    assert_taken_over(tmp_path, capfd, who, "that process has ended", watched=False)


def test_a_process_that_is_stopped_here_is_not_gone(tmp_path, holding):
    holder = holding(tmp_path)
    holder.process.send_signal(signal.SIGSTOP)
    assert_in_use(tmp_path, "It is alive", break_lock=True)


def test_a_pid_that_was_given_out_again_is_another_process(tmp_path, capfd):
    plant(tmp_path, born=this_process().born - 1)
    assert_taken_over(tmp_path, capfd, "that process has ended", watched=False)


def test_an_owner_on_another_host_is_not_judged(tmp_path, capfd):
    plant(tmp_path, host="n3", pid_namespace="another host", pid=77, born=1)
    assert_in_use(tmp_path, "process 77 on n3", "If you know that it is gone, add --break-lock", "--break-lock")
    options = {"watched": True, "break_lock": True}
    assert_taken_over(tmp_path, capfd, "process 77 on n3", "it has not moved for 0.6 s", **options)


def test_no_lock_is_broken_whose_owner_moves(tmp_path, holding):
    holding(tmp_path, ELSEWHERE)
    assert_in_use(tmp_path, "It is alive", break_lock=True)


def test_an_owner_who_lets_go_while_being_watched(tmp_path, capfd):
    plant(tmp_path, pid_namespace="another host")
    free = as_free(tmp_path)
    with (
        subprocess.Popen(["/bin/sh", "-c", f"sleep 0.2; mv {free} {record_of(tmp_path)}"]),
        locked(tmp_path, watch=20 * WATCH, break_lock=True),
    ):
        pass
    said = capfd.readouterr().err
    assert "watching for 12 s" in said
    assert "taken over" not in said


def test_an_owner_who_has_slept_finds_out(tmp_path, holding):
    holder = holding(tmp_path, ELSEWHERE)
    holder.process.send_signal(signal.SIGSTOP)
    with locked(tmp_path, watch=WATCH, break_lock=True) as lock:
        holder.process.send_signal(signal.SIGCONT)
        while (said := holder.look()) == "mine\n":
            pass
        assert f"{tmp_path} is no longer this job's: it has been taken over by process {os.getpid()} on" in said
        lock.require_held()  # what the other has done meanwhile did not touch this one's record
        assert owner_of(tmp_path, 2).state == "held"
    assert owner_of(tmp_path, 2).state == "free"


def test_an_owner_finds_out_when_records_were_removed(tmp_path, holding):
    with locked(tmp_path, watch=WATCH) as lock:
        shutil.rmtree(tmp_path / ".locks")
        holder = holding(tmp_path)
        deadline = time.monotonic() + 20
        while not lock.lost and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(HpclrError, match=f"process {holder.process.pid} "):
            lock.require_held()
    assert owner_of(tmp_path).state == "held"


@pytest.mark.parametrize(
    "content", [b"", b"1", b'{"host": "n3"', b"{}", this_process().encode().replace(b'"beat":0', b'"beat":1')]
)
def test_a_record_that_cannot_be_read_is_not_ignored(content, tmp_path, capfd):
    plant(tmp_path)
    record_of(tmp_path).write_bytes(content)
    assert_in_use(tmp_path, f"whose record, {record_of(tmp_path)}, cannot be read", "--break-lock")
    assert_taken_over(tmp_path, capfd, "000001, cannot be read: it has not moved", watched=True, break_lock=True)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)])
def test_what_is_no_file_is_a_record_that_cannot_be_read(make, tmp_path, capfd):
    (tmp_path / ".locks").mkdir()
    make(record_of(tmp_path, 99))
    assert_in_use(tmp_path, f"whose record, {record_of(tmp_path, 99)}, cannot be read", "--break-lock")
    assert_taken_over(tmp_path, capfd, "000099, cannot be read: it has not moved", watched=True, break_lock=True)
    assert owner_of(tmp_path, 100).state == "free"


def test_an_owner_does_not_wait_for_a_pipe(tmp_path):
    with locked(tmp_path, watch=0.1) as lock:
        os.mkfifo(record_of(tmp_path, 2))
        time.sleep(0.1)
        lock.require_held()
    assert owner_of(tmp_path).state == "free"


def test_other_files_are_no_records(tmp_path, capfd):
    (tmp_path / ".locks").mkdir()
    for name in (".tmp-0123456789abcdef", *OTHER_FILES):
        (tmp_path / ".locks" / name).touch()
    assert_free(tmp_path, capfd)
    assert {path.name for path in (tmp_path / ".locks").iterdir()} == {"000001", *OTHER_FILES}


def test_numbers_have_room(tmp_path, capfd):
    plant(tmp_path)
    record_of(tmp_path).rename(record_of(tmp_path, 999_999))
    assert_in_use(tmp_path, "It is alive")
    record_of(tmp_path, 999_999).unlink()
    plant(tmp_path / "free", state="free")
    record_of(tmp_path / "free").rename(record_of(tmp_path, 999_999))
    assert_free(tmp_path, capfd)
    assert_free(tmp_path, capfd)
    assert owner_of(tmp_path, 1_000_001).state == "free"


@pytest.mark.parametrize("break_lock", [False, True])
def test_numbers_come_to_an_end(break_lock, tmp_path):
    plant(tmp_path, state="free")
    record_of(tmp_path).rename(record_of(tmp_path, 10**18 - 2))
    with locked(tmp_path):
        pass
    last = record_of(tmp_path, 10**18 - 1)
    with pytest.raises(UsageError, match=f"{last} has the last number"), locked(tmp_path, break_lock=break_lock):
        pass


# Within Slurm


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Says what Slurm answers about job 7."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    monkeypatch.setenv("PATH", f"{bin_}{os.pathsep}{os.environ['PATH']}")

    def answer(state: str) -> None:
        for name, text in {"squeue": f"7  {state}  0", "scontrol": "ClusterName = ci"}.items():
            (bin_ / name).write_text(f"#!/bin/sh\necho '{text}'\n")
            (bin_ / name).chmod(0o755)

    return answer


def in_job(monkeypatch, number: int, restarts: int) -> None:
    for name, value in {"JOB_ID": number, "RESTART_COUNT": restarts, "CLUSTER_NAME": "ci"}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))


ON_N3 = {"host": "n3", "pid_namespace": "another host", "job": Job("7", 1, "ci")}


def test_a_job_that_was_requeued_goes_on_where_it_was(tmp_path, monkeypatch, capfd):
    plant(tmp_path / "run", **ON_N3)
    in_job(monkeypatch, 7, 2)
    texts = ("job 7 (restart 1), process", "the job has been requeued, and is at restart 2")
    assert_taken_over(tmp_path / "run", capfd, *texts, watched=True)
    assert owner_of(tmp_path / "run", 2).job == Job("7", 2, "ci")


def test_another_step_of_the_same_start_of_a_job_is_not_judged(tmp_path, monkeypatch, slurm):
    plant(tmp_path / "run", **ON_N3)
    in_job(monkeypatch, 7, 1)
    slurm("RUNNING")  # as this one is
    assert_in_use(tmp_path / "run", "job 7 (restart 1)", "--break-lock")


def test_an_earlier_start_of_a_job_does_not_take_from_a_later_one(tmp_path, monkeypatch):
    plant(tmp_path / "run", **ON_N3)
    in_job(monkeypatch, 7, 0)
    assert_in_use(tmp_path / "run", "It is a later start of this job", break_lock=True)


def test_a_job_that_has_ended_is_gone(tmp_path, slurm, capfd):
    plant(tmp_path / "run", **ON_N3)
    slurm("CANCELLED")
    assert_taken_over(tmp_path / "run", capfd, "job 7 (restart 1)", "that job has ended", watched=True)


def test_a_job_that_has_ended_but_whose_process_has_not(tmp_path, slurm, holding):
    """On a node that Slurm has lost, or in the background of a shell that salloc had started."""
    holding(tmp_path / "run", f"import os; os.environ.update(SLURM_JOB_ID='7', SLURM_CLUSTER_NAME='ci'); {ELSEWHERE}")
    slurm("NODE_FAIL")
    assert_in_use(tmp_path / "run", "job 7 (restart 0)", "It is alive")


def test_a_job_that_runs_is_not_gone_even_if_it_stands_still(tmp_path, slurm):
    plant(tmp_path / "run", **ON_N3 | {"job": Job("7", 0, "ci")})
    slurm("SUSPENDED")
    assert_in_use(tmp_path / "run", "That job has not ended", break_lock=True)


def test_a_job_of_which_slurm_says_nothing_is_not_judged(tmp_path, slurm):
    plant(tmp_path / "run", **ON_N3 | {"job": Job("7", 0, "other")})
    slurm("FAILED")  # is a job of this cluster
    assert_in_use(tmp_path / "run", "--break-lock")


# Many at once

AT_ONCE = """
import os, sys
from pathlib import Path
from hpclr.errors import UsageError
from hpclr.training.lock import locked

for number in range(20):
    run = Path(sys.argv[1]) / str(number)
    ends, go, done = [os.pipe() for _ in range(2)], os.pipe(), os.pipe()
    for said, say in ends:
        if os.fork() == 0:
            os.close(go[1]), os.close(done[1])
            os.read(go[0], 1)  # its end
            try:
                with locked(run):
                    os.write(say, b"mine")
                    os.read(done[0], 1)
            except UsageError as error:
                os.write(say, str(error).encode())
            os._exit(0)
    os.close(go[1])
    answers = sorted(os.read(said, 4096).decode() for said, _ in ends)
    os.close(done[1])
    assert {os.wait()[1] for _ in ends} == {0}
    assert answers[1] == "mine" and "is in use by process" in answers[0], answers
"""


def test_of_two_at_once_one_wins_and_the_other_is_told(tmp_path):
    done = subprocess.run([sys.executable, "-c", AT_ONCE, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# Processes lock, write down what only one may, are killed, set the directory aside; others come in their place.
HAMMER = """
import os, random, signal, sys, time
from pathlib import Path
from hpclr.errors import UsageError
from hpclr.training.lock import locked

base, seconds, fresh = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "fresh"
run, inside, count = base / "run", base / "inside", base / "count"
count.write_text("0")
end = time.monotonic() + seconds

def alone():
    try:
        os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        os._exit(9)
    value = int(count.read_text())
    time.sleep(random.random() / 1000)
    count.write_text(str(value + 1))
    os.write(tally, b".")
    inside.unlink()

def work():
    random.seed(os.getpid())
    while time.monotonic() < end:
        try:
            with locked(run):
                alone()
                chance = random.random()
                if fresh and chance < 0.3:
                    run.rename(base / f"old-{os.getpid()}-{time.monotonic_ns()}")
                elif chance > 0.7:
                    os.kill(os.getpid(), signal.SIGKILL)
        except UsageError:
            pass
    os._exit(0)

def start():
    return os.fork() or work()

tally = os.open(base / "tally", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
sys.stderr = open(os.devnull, "w")  # who has been taken over from whom
left = {start() for _ in range(6)}
codes = set()
while left:
    pid, status = os.wait()
    left.remove(pid)
    code = os.waitstatus_to_exitcode(status)
    codes.add(code)
    if code == -signal.SIGKILL and time.monotonic() < end:
        left.add(start())
print(sorted(codes), count.read_text(), os.stat(base / "tally").st_size)
"""


@pytest.mark.parametrize("seconds", [0.8, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fresh", ["fresh", "one directory"])
def test_never_two_at_once(fresh, seconds, tmp_path):
    line = [sys.executable, "-c", HAMMER, tmp_path, str(seconds), fresh]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    codes, count, tally = done.stdout.rsplit(maxsplit=2)
    assert codes == "[-9, 0]"
    assert count == tally
    assert int(count) > 20 * seconds
    assert not list(tmp_path.glob("*/.locks/.tmp-*"))


# Records


def test_texts_that_are_too_long_are_cut(monkeypatch):
    owner = this_process()
    owner.command, owner.user, owner.host = "é" * 5000, "u" * 300, "h" * 300
    content = owner.encode()
    assert len(content) == SIZE
    assert decode(content) == owner
    monkeypatch.setattr(sys, "argv", ["train\ud800\x1b[31m", "a\nb"])
    assert "\\x1b[31m" in str(this_process())
    assert len(this_process().encode()) == SIZE


@given(*[st.builds(operator.mul, st.text(st.characters(), max_size=9), st.sampled_from([1, 9, 99]))] * 4)
def test_every_process_has_a_record_whatever_it_is_called(cluster, host, user, command):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "node", lambda: host)
        patch.setattr("hpclr.training.owner._user", lambda: user)
        patch.setattr(sys, "argv", [command])
        patch.setattr(os, "environ", {"SLURM_JOB_ID": "9" * 18, "SLURM_CLUSTER_NAME": cluster})
        owner = this_process()
    owner.beat = owner.check = 2**63
    content = owner.encode()
    assert len(content) == SIZE
    assert decode(content) == owner


def test_the_name_of_a_cluster_is_kept(monkeypatch):
    in_job(monkeypatch, 7, 1)
    assert this_process().job == Job("7", 1, "ci")


@given(st.binary(max_size=200), st.integers(0, 400))
def test_whatever_is_in_a_record_it_is_an_owner_or_none(noise, place):
    content = this_process().encode()
    for damaged in (noise, content[:place] + noise, content[:place] + noise + content[place + len(noise) :]):
        found = decode(damaged)
        assert found is None or found.pid > 0


def test_a_record_says_who_it_is(tmp_path):
    with locked(tmp_path):
        found = json.loads(record_of(tmp_path).read_bytes())
    stat = Path("/proc/self/stat").read_text().rpartition(") ")[2].split()
    assert (found["pid"], found["host"], found["born"]) == (os.getpid(), platform.node(), int(stat[19]))


# The file system

REFUSE_LINKS = """
import ctypes, struct, sys
from pathlib import Path
libc = ctypes.CDLL(None)
# seccomp: the system call linkat (265) fails with the given number, all others work
program = b"".join(struct.pack("HBBI", *step) for step in
                   [(0x20, 0, 0, 0), (0x15, 0, 1, 265), (6, 0, 0, 0x50000 | int(sys.argv[1])), (6, 0, 0, 0x7FFF0000)])
buffer = ctypes.create_string_buffer(program)
class Filter(ctypes.Structure):
    _fields_ = [("steps", ctypes.c_ushort), ("program", ctypes.c_void_p)]
libc.prctl(38, 1, 0, 0, 0)
if libc.prctl(22, 2, ctypes.byref(Filter(4, ctypes.addressof(buffer)))):
    sys.exit(77)
from hpclr.errors import HpclrError
from hpclr.training.lock import locked
try:
    with locked(Path(sys.argv[2]) / "run"):
        pass
except HpclrError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the filter is for x86-64")
@pytest.mark.parametrize(
    ("number", "code", "text"),
    [
        (errno.EPERM, 2, "run has no hard links (Operation not permitted), which the lock of a run directory needs"),
        (errno.EOPNOTSUPP, 2, "let runs live on another one, with --runs-dir or HPCLR_RUNS"),
        (errno.EDQUOT, 75, "run cannot be written: [Errno 122] Disk quota exceeded"),
        (errno.EROFS, 2, "run cannot be used: Read-only file system"),
    ],
)
def test_a_file_system_that_does_not_take_a_lock(number, code, text, tmp_path):
    line = [sys.executable, "-c", REFUSE_LINKS, str(number), tmp_path]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    if done.returncode == 77:
        pytest.skip("filters on system calls are not allowed here")
    assert (done.returncode, done.stderr) == (code, "")
    assert text in done.stdout
    assert list((tmp_path / "run" / ".locks").iterdir()) == []


# Commands


@pytest.mark.parametrize("arguments", [[], ["--fresh"], ["--break-lock"], ["--fresh", "--break-lock"]])
def test_a_run_in_use_is_not_trained(arguments, bench, holding):
    bench.train(train={"steps": 2})
    holder = holding(bench.run)
    done = hpclr("train", bench.write(train={"steps": 3}), *arguments)
    check_refused(done, f"runs/run is in use by process {holder.process.pid}", "It is alive")
    assert summary(bench.run)["steps"] == 2
    assert [path.name for path in bench.run.parent.iterdir()] == ["run"]


def test_a_run_whose_process_was_killed_goes_on(bench, holding):
    bench.train(train={"steps": 2})
    holding(bench.run).kill()
    done = hpclr("train", bench.write(train={"steps": 3}))
    assert done.code == 0
    assert "runs/run: taken over from process" in done.err
    assert summary(bench.run)["steps"] == 3


@pytest.mark.parametrize("command", [["train"], pytest.param(["launch", "-n", "1"], marks=pytest.mark.slow)])
def test_commands_that_break_a_lock(command, bench):
    plant(bench.run, pid_namespace="another host")
    line = [sys.executable, "-m", "hpclr", *command, "--break-lock", bench.write(train={"steps": 2})]
    with subprocess.Popen(
        line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert any("watching for 30 s" in line for line in process.stderr)
        as_free(bench.run).replace(record_of(bench.run))
        process.communicate(timeout=100)
    assert process.returncode == 0
    assert summary(bench.run)["steps"] == 2
