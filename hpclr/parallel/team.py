"""The processes of an MPI job that work on data for the first of them.

Nothing is unpickled: arrays travel as their bytes, everything else as JSON. The first process leads. The others wait
for its call before they send anything, so that they are at most one message ahead, and learn from the call when the
work is over and with which exit code.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from hpclr.errors import UsageError, error_of, exit_code_of, message_of
from hpclr.output import printable, say
from hpclr.parallel import mpi

_GO_ON = -1  # what the first process calls; anything else is an exit code
_NAP = 0.001  # seconds; MPI's own waiting would keep a core busy
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # set by mpirun of Open MPI, and by those of MPICH and its relatives

Array = npt.NDArray[Any]
T = TypeVar("T")


def started_together(environ: Mapping[str, str]) -> int:
    """How many processes mpirun says it started; 1 without it."""
    return max((int(environ[name]) for name in _SIZES if environ.get(name, "").isdecimal()), default=1)


def gather_team(purpose: str, environ: Mapping[str, str]) -> "Team":
    """All processes of this job; imports MPI, which is started thereby.

    Raises:
        UsageError: without MPI, or if MPI does not see the processes that mpirun started.
    """
    comm, expected = mpi.world(purpose), started_together(environ)
    if comm.Get_size() == 1 < expected:
        raise UsageError(
            f"{purpose}: mpirun started {expected} processes, but MPI sees this one alone. mpirun and the MPI that "
            "mpi4py was built with are different ones; call the mpirun that belongs to mpi4py."
        )
    return Team(comm)


class Team:
    """All processes of an MPI communicator.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
    """

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()

    @contextmanager
    def leading(self) -> Iterator[None]:
        """What the first process does with the others; at the end it sends them home, with its exit code."""
        try:
            yield
        except BaseException as error:
            self._call_all(exit_code_of(error))
            raise
        self._call_all(0)

    def follow(self, work: Callable[[], None]) -> None:
        """What every other process does: `work`, then wait to be sent home, which ends the process.

        An error is sent in the place of the next arrays, so that the first process raises it.

        Raises:
            SystemExit: always.
        """
        try:
            work()
        except Exception as error:
            self.send({}, {"error": message_of(error), "code": exit_code_of(error)})
        while True:
            self._await_call()

    def send(self, arrays: Mapping[str, Array], note: Mapping[str, Any]) -> None:
        """Hands arrays and a JSON value to the first process once that calls for them."""
        self._await_call()
        content = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
        facts = [(name, values.dtype.str, values.shape) for name, values in content.items()]
        head = np.frombuffer(json.dumps([facts, note]).encode(), dtype=np.uint8)
        self._comm.Send(np.array([head.size]), dest=0)
        for values in (head, *content.values()):
            self._comm.Send(values, dest=0)

    def receive(self, rank: int) -> tuple[dict[str, Array], dict[str, Any]]:
        """What process `rank` sends next.

        Raises:
            HpclrError: in the place of that process, of the same kind.
        """
        self._call(rank, _GO_ON)
        (length,) = self._received((1,), "int64", rank)
        facts, note = json.loads(self._received((int(length),), "uint8", rank).tobytes())
        if "error" in note:
            raise error_of(note["code"], note["error"])
        return {name: self._received(tuple(shape), dtype, rank) for name, dtype, shape in facts}, note

    def together(self, action: Callable[[], T]) -> T:
        """Runs something on every process; if it fails anywhere, it has failed everywhere.

        Raises:
            Exception: what was raised here, if no process of lower rank failed.
            SystemExit: on the others, which have nothing to say.
        """
        failure: BaseException | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        codes = np.zeros(self.size, dtype=np.int64)
        self._comm.Allgather(np.array([exit_code_of(failure) if failure else 0]), codes)
        failed = np.flatnonzero(codes)
        if failed.size and failed[0] == self.rank and failure:
            raise failure
        if failed.size:
            sys.exit(int(codes[failed[0]]))
        return result

    def on_first(self, action: Callable[[], Any]) -> Any:
        """What an action returns, a JSON value, on all processes; it is run on the first alone.

        Raises:
            Exception: as `together`.
        """
        content = self.together(lambda: json.dumps(action()).encode() if self.rank == 0 else b"")
        length = np.array([len(content)])
        self._comm.Bcast(length, root=0)
        received = np.frombuffer(bytearray(content or int(length[0])), dtype=np.uint8)
        self._comm.Bcast(received, root=0)
        return json.loads(received.tobytes())

    @contextmanager
    def or_none(self) -> Iterator[None]:
        """For work in which the processes wait for one another: an error of one ends all of them at once."""
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            say(printable(f"hpclr: process {self.rank} of {self.size}: {message_of(error)}"))
            self._comm.Abort(exit_code_of(error))

    def _call_all(self, what: int) -> None:
        for rank in range(1, self.size):
            self._call(rank, what)

    def _call(self, rank: int, what: int) -> None:
        self._comm.Send(np.array([what]), dest=rank)

    def _await_call(self) -> None:
        while not self._comm.Iprobe(source=0):
            time.sleep(_NAP)
        (what,) = self._received((1,), "int64", 0)
        if what != _GO_ON:
            sys.exit(int(what))

    def _received(self, shape: tuple[int, ...], dtype: str, rank: int) -> Array:
        values = np.empty(shape, dtype=dtype)
        self._comm.Recv(values, source=rank)
        return values
