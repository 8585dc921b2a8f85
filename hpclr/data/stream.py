"""The batches of a run one after another, made by this process or ahead of it by others."""

from collections.abc import Iterator

from hpclr.data.batches import Batch, BatchLoader
from hpclr.data.workers import Workers


class BatchStream:
    """An iterator over this process's batches for the steps `first_step` to `last_step` − 1 of a run.

    Use it in a `with` block, at whose end the workers are gone. Step s shows batch divmod(s, len(loader)), the same
    to the bit for any number of workers.

    Args:
        loader: what makes the batches.
        first_step: the step to begin with, from 0.
        last_step: the step to end before.
        workers: processes that read and augment; 0: batches are made when they are asked for.
        prefetch: batches that workers are ahead.

    Raises:
        RetryableError: where a batch is taken, if a worker has died or could not be started.
        UsageError: where a batch is taken, if the file turns out to be damaged.
    """

    def __init__(
        self, loader: BatchLoader, first_step: int, last_step: int, *, workers: int = 0, prefetch: int = 2
    ) -> None:
        self._loader, self._count, self._prefetch = loader, workers, prefetch
        self._step, self._last = first_step, last_step
        self._workers: Workers | None = None

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._step >= self._last:
            raise StopIteration
        batch = self._from_workers() if self._count else self._loader.batch(*self._place(self._step))
        self._step += 1
        return batch

    def close(self) -> None:
        """Ends the workers."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def _from_workers(self) -> Batch:
        """The next batch; asks for the one that then has a free slot."""
        if self._workers is None:
            self._workers = Workers(self._loader, self._count, self._prefetch)
            for step in range(self._step, self._step + self._prefetch):
                self._request(self._workers, step)
        try:
            batch = self._workers.take()
            self._request(self._workers, self._step + self._prefetch)
        except Exception:
            self.close()  # what the workers still send is for batches that nobody will take
            raise
        return batch

    def _request(self, workers: Workers, step: int) -> None:
        if step < self._last:
            workers.request(*self._place(step), slot=step % self._prefetch)

    def _place(self, step: int) -> tuple[int, int]:
        return divmod(step, len(self._loader))
