"""How to meet: through a directory, torchrun's store, MPI; and what is said when it fails."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import layout, run_all

from hpclr.errors import UsageError
from hpclr.parallel.meeting import network, rendezvous
from hpclr.parallel.meeting.consultation import consult, ranks_text, sweep
from hpclr.parallel.meeting.layout import Layout
from hpclr.parallel.meeting.rendezvous import _meeting_file, meet

BIN = Path(sys.executable).parent
PROGRAM = """
import json, os, sys
from pathlib import Path
from hpclr.parallel.meeting.layout import resolve
from hpclr.parallel.meeting.rendezvous import meet
from hpclr.errors import HpclrError
try:
    me = resolve(os.environ)
    store = meet(me, directory=Path(sys.argv[1]), timeout=30)
except HpclrError as error:
    print(error, file=sys.stderr)
    os._exit(error.exit_code)
store.set(f"mine/{me.rank}", str(me.rank * 10))
total = sum(int(store.get(f"mine/{rank}")) for rank in range(me.world_size))
if store.add("read", 1) == me.world_size: store.set("over", "1")
store.wait(["over"])
told = (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"])
(Path(sys.argv[1]) / f"said-{me.rank}").write_text(json.dumps([me.launcher, total, *told]))
if me.rank == 0: import time; time.sleep(0.3)
"""


def greet(rank: int, size: int, directory: Path, **settings):
    """Meets, and reads what every other process has put into the store."""
    mine = settings.pop("layout", None) or layout(rank, size)
    store = meet(mine, directory=directory, **{"timeout": 20.0} | settings)
    names = consult(store, mine, "greeting", {"rank": rank}, lambda cards: [card["rank"] for card in cards], 10)
    consult(store, mine, "farewell", {}, lambda cards: None, 10)
    if rank == 0:
        time.sleep(0.3)  # the store lives here
    return names, os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]


def free_port() -> int:
    with socket.socket() as connection:
        connection.bind(("127.0.0.1", 0))
        return connection.getsockname()[1]


@pytest.mark.parametrize("size", [2, 4])
def test_through_a_directory(tmp_path, size):
    said = run_all(size, lambda rank: greet(rank, size, tmp_path))
    assert said == {rank: (list(range(size)), "lo", "lo") for rank in range(size)}
    assert list(tmp_path.iterdir()) == []


def test_one_process_meets_nobody(tmp_path):
    store = meet(Layout(0, 1, 0, 1, "single"), directory=tmp_path, timeout=1)
    store.set("key", "value")
    assert store.get("key") == b"value"


def test_the_users_own_choice_of_interface_stays(tmp_path):
    def work(rank):
        os.environ["GLOO_SOCKET_IFNAME"] = "chosen"
        return greet(rank, 2, tmp_path)[1:]

    assert run_all(2, work) == {0: ("chosen", "lo"), 1: ("chosen", "lo")}


def test_a_given_interface_is_used(tmp_path):
    name = network.interface_with("127.0.0.1")
    assert run_all(2, lambda rank: greet(rank, 2, tmp_path, interface=name)[1:]) == dict.fromkeys((0, 1), (name, name))


@pytest.mark.parametrize("content", [b'{"addresses": ["127.0.0.1"], "po', b"[1, 2]", b"{}", "dead", "foreign", "mute"])
def test_what_an_earlier_attempt_left_is_no_way(tmp_path, content, monkeypatch):
    """Half a file, a store that is gone, another job's store, something that is no store."""
    from torch.distributed import TCPStore

    monkeypatch.setattr(rendezvous, "_ONE_TRY", 0.5)
    foreign = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    foreign.set("hpclr/token", "of another")
    mute = socket.create_server(("127.0.0.1", 0))
    ports = {"dead": free_port(), "foreign": foreign.port, "mute": mute.getsockname()[1]}
    if isinstance(content, str):
        contact = {"addresses": ["127.0.0.1"], "port": ports[content], "token": "old", "machine": "", "error": None}
        content = json.dumps(contact).encode()
    _meeting_file(tmp_path, "13.0.0").write_bytes(content)

    def work(rank):
        time.sleep(0.5 * (rank == 0))  # the others find the old file first
        return greet(rank, 2, tmp_path)[0]

    assert run_all(2, work) == {0: [0, 1], 1: [0, 1]}


def test_another_attempt_at_the_same_time_is_another_meeting(tmp_path):
    def work(number):
        attempt, rank = divmod(number, 2)
        return greet(rank, 2, tmp_path, layout=layout(rank, 2, key=f"13.0.{attempt}"))[0]

    assert run_all(4, work) == {number: [0, 1] for number in range(4)}


def test_old_leftovers_are_swept(tmp_path):
    old, new = tmp_path / ".meeting-1.json", tmp_path / ".meeting-2.json"
    for path in (old, new):
        path.touch()
    os.utime(old, (0, time.time() - 25 * 3600))
    sweep(tmp_path, ".meeting-*")
    assert list(tmp_path.iterdir()) == [new]


def test_the_file_is_private_and_whole(tmp_path):
    def work(rank):
        if rank == 0:
            return meet(layout(0, 2), directory=tmp_path, timeout=1.5)
        path = _meeting_file(tmp_path, "13.0.0")
        while not path.exists():
            time.sleep(0.01)
        return path.stat().st_mode & 0o777, sorted(json.loads(path.read_bytes()))

    said = run_all(2, work)
    assert said[1] == (0o600, ["addresses", "error", "machine", "port", "token"])


def test_who_did_not_come_is_named_on_all(tmp_path):
    said = run_all(4, lambda rank: greet(rank, 4, tmp_path, timeout=2.0), absent=(1, 3))
    assert said[0] == said[2]
    assert said[0][0] == "RetryableError"
    assert "ranks 1, 3 of 4 did not come to the meeting within 2 s" in said[0][1]


def test_rank_0_does_not_come(tmp_path):
    said = run_all(2, lambda rank: greet(rank, 2, tmp_path, timeout=1.0), absent=(0,))
    assert said[1][0] == "RetryableError"
    assert "Rank 0 did not come" in said[1][1]


def test_unknown_interface_lists_those_there_are(tmp_path):
    said = run_all(2, lambda rank: greet(rank, 2, tmp_path, interface="ib9"))
    assert {kind for kind, _ in said.values()} == {"UsageError"}
    assert all("ib9" in text and "lo (127.0.0.1)" in text for _, text in said.values())


def test_unknown_host_suffix_stops_all_at_once(tmp_path):
    start = time.monotonic()
    said = run_all(2, lambda rank: greet(rank, 2, tmp_path, host_suffix="-no-such.invalid"))
    assert time.monotonic() - start < 15
    assert said[0] == said[1]
    assert said[0][0] == "UsageError"
    assert f"{socket.gethostname().partition('.')[0]}-no-such.invalid" in said[0][1]
    assert "parallel.host_suffix" in said[0][1]


def test_unreachable_addresses_are_listed(tmp_path):
    contact = {"addresses": ["no-such.invalid", "127.0.0.1"], "port": 1, "token": "t", "machine": "", "error": None}
    _meeting_file(tmp_path, "13.0.0").write_text(json.dumps(contact))
    kind, text = run_all(2, lambda rank: greet(rank, 2, tmp_path, timeout=2.0), absent=(0,))[1]
    assert kind == "RetryableError"
    for part in ("no-such.invalid:1 (", "127.0.0.1:1 (", "refused", "parallel.interface", "parallel.host_suffix"):
        assert part in text


def given(rank: int, port: int) -> Layout:
    return layout(rank, 2, None, "torchrun")._replace(store_address=("127.0.0.1", port))


def test_exported_address(tmp_path):
    port = free_port()
    said = run_all(2, lambda rank: greet(rank, 2, tmp_path, layout=given(rank, port))[0])
    assert said == {0: [0, 1], 1: [0, 1]}


def test_exported_port_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(rendezvous, "_ONE_TRY", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = run_all(2, lambda rank: greet(rank, 2, tmp_path, layout=given(rank, port), timeout=1.0))
    assert said[0][0] == "UsageError"
    assert f"MASTER_PORT={port}" in said[0][1]
    assert said[1][0] == "RetryableError"
    assert f"127.0.0.1:{port}" in said[1][1]


def test_a_name_for_the_start_is_needed_without_mpi(tmp_path, monkeypatch):
    monkeypatch.setattr("hpclr.parallel.mpi.is_installed", lambda: False)
    with pytest.raises(UsageError, match="mpi4py is not installed"):
        meet(layout(0, 2, None, "mpi"), directory=tmp_path, timeout=1)


def launched(command: list[str], tmp_path: Path, program: str = PROGRAM) -> subprocess.CompletedProcess[str]:
    (tmp_path / "program.py").write_text(program)
    environ = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    return subprocess.run(
        [*command, str(tmp_path / "program.py"), str(tmp_path)],
        env=environ, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def mpirun(size: int) -> list[str]:
    pytest.importorskip("mpi4py")
    if shutil.which("mpirun", path=str(BIN)) is None:
        pytest.skip("no mpirun in this environment")
    return ["mpirun", "--oversubscribe", "--bind-to", "none", "-n", str(size), sys.executable]


def said_by(tmp_path: Path, size: int) -> list[object]:
    return [json.loads((tmp_path / f"said-{rank}").read_text()) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 4])
def test_torchrun(tmp_path, size):
    done = launched([str(BIN / "torchrun"), "--nproc-per-node", str(size)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert said_by(tmp_path, size) == [["torchrun", sum(range(size)) * 10, "lo", "lo"]] * size


@pytest.mark.parametrize("size", [2, 4])
def test_mpirun(tmp_path, size):
    done = launched(mpirun(size), tmp_path)
    assert done.returncode == 0, done.stderr
    assert said_by(tmp_path, size) == [["mpi", sum(range(size)) * 10, "lo", "lo"]] * size


def test_mpirun_without_mpi4py_meets_through_the_directory(tmp_path):
    program = "import hpclr.parallel.mpi as mpi; mpi.is_installed = lambda: False\n" + PROGRAM
    done = launched(mpirun(2), tmp_path, program)
    assert done.returncode == 0, done.stderr
    assert said_by(tmp_path, 2) == [["mpi", 10, "lo", "lo"]] * 2


def test_a_process_that_fails_under_mpirun_ends_the_job(tmp_path):
    """It does not wait in MPI's end for the others, who wait for it."""
    failing = 'if me.rank == 1:\n        mpi.world_until_leave("a test"); sys.exit(3)\n    store = meet('
    program = "from hpclr.parallel import mpi\n" + PROGRAM.replace("store = meet(", failing)
    start = time.monotonic()
    done = launched(mpirun(2), tmp_path, program)
    assert time.monotonic() - start < 25  # the time limit of the meeting is 30 s
    assert done.returncode == 3


def test_silent_singletons_are_noticed(tmp_path):
    """The environment says 2, MPI's library, which another mpirun started or none, sees 1."""
    pytest.importorskip("mpi4py")
    alone = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
    both = alone | {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    program = PROGRAM.replace("resolve(os.environ)", f"resolve({both!r})")
    done = launched([sys.executable], tmp_path, program)
    assert done.returncode == 2
    assert "rank 0 of 2" in done.stderr
    assert "sees rank 0 of 1" in done.stderr


def test_ranks_are_listed_briefly():
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([7, 0, 1, 2, 5]) == "ranks 0-2, 5, 7"
