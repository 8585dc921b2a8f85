"""The batches of a run one after another, made ahead of training by a thread or by other processes."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from hpclr.data.batches import Batch, BatchLoader
from hpclr.data.workers import Workers


class BatchStream:
    """An iterator over this process's batches for the steps `first_step` to `last_step` − 1 of a run.

    Use it in a `with` block, at whose end thread and workers are gone; until then the loader is the stream's alone.
    Step s shows batch divmod(s, len(loader)), the same to the bit whoever makes it.

    Args:
        loader: what makes the batches.
        first_step: the step to begin with, from 0.
        last_step: the step to end before.
        workers: processes that read and augment; 0: this one does. Where it reads files, or trains on a GPU, a thread
            does that ahead; with a split in memory there is nothing to wait for, and training has better use for the
            cores.
        prefetch: batches that are made ahead.
        pinned: whether x is to be in page-locked memory, from which a CUDA device fetches it by itself.

    Raises:
        RetryableError: where a batch is taken, if a worker has died or could not be started.
        UsageError: where a batch is taken, if the file turns out to be damaged.
    """

    def __init__(
        self,
        loader: BatchLoader,
        first_step: int,
        last_step: int,
        *,
        workers: int = 0,
        prefetch: int = 2,
        pinned: bool = False,
    ) -> None:
        self._loader, self._count, self._prefetch, self._pinned = loader, workers, prefetch, pinned
        self._step, self._last = first_step, last_step
        self._on_demand = not workers and not pinned and loader.kept is not None
        self._source: Workers | _Ahead | None = None

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._step >= self._last:
            raise StopIteration
        batch = self._loader.batch(*self._place(self._step)) if self._on_demand else self._taken()
        self._step += 1
        return batch

    def _taken(self) -> Batch:
        """The next batch; asks for the one that then has a free slot."""
        try:
            source = self._source or self._begin()
            batch = source.take()
            self._request(source, self._step + self._prefetch)
        except Exception:
            self.close()  # what is still being made is for batches that nobody will take
            raise
        return batch

    def close(self) -> None:
        """Ends the thread or the workers."""
        if self._source is not None:
            self._source.close()
            self._source = None

    def _begin(self) -> "Workers | _Ahead":
        source: Workers | _Ahead
        if self._count:
            source = Workers(self._loader, self._count, self._prefetch, pinned=self._pinned)
        else:
            source = _Ahead(self._loader, pinned=self._pinned)
        self._source = source
        for step in range(self._step, self._step + self._prefetch):
            self._request(source, step)
        return source

    def _request(self, source: "Workers | _Ahead", step: int) -> None:
        if step < self._last:
            source.request(*self._place(step), slot=step % self._prefetch)

    def _place(self, step: int) -> tuple[int, int]:
        return divmod(step, len(self._loader))


class _Ahead:
    """A thread that makes the batches asked for; reading files and computing with large arrays let others run."""

    def __init__(self, loader: BatchLoader, *, pinned: bool) -> None:
        self._loader, self._pinned = loader, pinned
        self._thread = ThreadPoolExecutor(1, "hpclr-batches")
        self._made: deque[Future[Batch]] = deque()

    def request(self, epoch: int, index: int, slot: int) -> None:
        """As `Workers.request`."""
        self._made.append(self._thread.submit(self._make, epoch, index))

    def take(self) -> Batch:
        """As `Workers.take`."""
        return self._made.popleft().result()

    def close(self) -> None:
        """Ends the thread, once it has made the batch that it is at."""
        self._thread.shutdown(cancel_futures=True)

    def _make(self, epoch: int, index: int) -> Batch:
        batch = self._loader.batch(epoch, index)
        return batch.in_pinned_memory() if self._pinned else batch
