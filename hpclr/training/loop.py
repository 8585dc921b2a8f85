"""The training loop and what happens around it: resuming, validating, saving, stopping."""

import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext

import msgspec
import torch
from torch import Tensor, nn

from hpclr.checkpoint import CheckpointStore, TreeLike
from hpclr.data import Batch, BatchLoader, BatchStream
from hpclr.errors import StopRequestedError, TrainingDivergedError
from hpclr.files import write_whole
from hpclr.lowrank import summarize
from hpclr.output import say
from hpclr.parallel.digest import digest
from hpclr.parallel.verify import require_equal
from hpclr.training.assembly import Assembly, steps_between_validations
from hpclr.training.cost import Meter, passes_of
from hpclr.training.metrics import LossLog, MetricsFile
from hpclr.training.pace import Pace
from hpclr.training.progress import Display
from hpclr.training.run_directory import RunDirectory, writing
from hpclr.training.saving import LAST_PAUSES, Saving, usual_seconds
from hpclr.training.schedules import set_learning_rate
from hpclr.training.scores import Score, judged_by
from hpclr.training.shared_saving import SharedSaving
from hpclr.training.state import Position, capture, from_tree, not_finite, position_of
from hpclr.training.stopping import StopRequests
from hpclr.training.summary import summary_of

_AT_CHECKS = ("stability", "outside", "frozen", "failures")  # what of a method is recorded, if it has it
_CALMER = (
    "A lower optimizer.lr, train.clip_norm or a longer schedule.warmup_steps usually helps; start over with --fresh."
)


class Trainer:
    """Trains the parts of a run from a position to its end, in its directory.

    Args:
        parts: model, data, optimiser, method, as `assemble` made them or `restore` left them.
        position: where to begin.
        directory: exists.
        store: the run's checkpoints, which the first process writes.
        shown: where progress goes.
        stop: what asks this process to stop.
    """

    def __init__(
        self,
        parts: Assembly,
        position: Position,
        directory: RunDirectory,
        store: CheckpointStore,
        shown: Display,
        stop: StopRequests,
    ) -> None:
        self.parts, self.position, self.directory, self.store, self.shown = parts, position, directory, store, shown
        self.job, self.group, self.stop = parts.job, parts.job.group, stop
        self.metrics = MetricsFile(directory.metrics if self.group.is_first else None, shown.record)
        self._validate_every = steps_between_validations(parts.run, len(parts.loader))
        self.losses = LossLog(self.metrics, 1 if parts.device.type == "cpu" else 10, self._summed)
        self.saving = (Saving if parts.sharded is None else SharedSaving)(
            store,
            parts.run.checkpoint,
            self.group,
            check=self._require_finite,
            note=shown.note if self.group.is_first else say,  # which of the others goes to their logs
            record=self.metrics.append,
            own=directory.require_held,
            doing=self.job.doing,
            longest=usual_seconds(directory.metrics) if self.group.is_first else 0.0,
        )
        self._meter = Meter(parts)
        self.pace = Pace(self.metrics.append, self._meter.memory, position.step)
        self._clock = time.monotonic()
        self._began_at = position.step
        self._saved_at = position.step or None
        self._unbounded = _buffers_not_finite(parts.model)

    def train(self) -> None:
        """Trains until the last step, early stopping, or a request to stop.

        All processes go through it in step: each decision follows from what all of them know.

        Raises:
            StopRequestedError: after saving, if any process was asked to stop.
            TrainingDivergedError: if the loss is no longer finite.
            RetryableError: if the first or the last checkpoint, or the records, cannot be written.
            ReplicasDifferError: if the processes' parameters are no longer equal to the bit.
        """
        self.parts.replica.train()
        with self.stop.listening(), self._batches() as self.batches, self.saving:
            if self.position.step == 0:
                with self.pace.save:
                    self._save(pauses=())  # a full disk or a missing permission shows now, not after an hour
            self.stop.agreed = self.group.on_first(self._wants_to_stop)  # there may be no time to train at all
            while not self._at_end():
                if self.stop.agreed:
                    self._leave()
                self._take_step()
                if self.losses.full:
                    self._settle_losses()
                self.saving.settle()
                with self.pace.check:
                    self._adapt()
                self._verify_if_due()
                with self.pace.valid:
                    improved = self._validate_if_due()
                with self.pace.save:
                    self._save_if_due(improved)
                self.pace.look(self.position.step)
            self._finish()

    def _batches(self) -> BatchStream:
        """This process's parts of the batches that are still to come."""
        parts, data = self.parts, self.parts.run.data
        steps = self.position.step, parts.total_steps
        pinned = parts.device.type == "cuda"
        return BatchStream(parts.loader, *steps, workers=data.workers, prefetch=data.prefetch, pinned=pinned)

    def _at_end(self) -> bool:
        return self.position.ended(self.parts.total_steps, self.parts.run.validation.patience)

    def _take_step(self) -> None:
        """One optimiser step on one global batch."""
        parts, step = self.parts, self.position.step
        rate = parts.learning_rate(step)
        set_learning_rate(parts.optimizer, rate)
        self.job.doing("reading data", step)
        with self.pace.data:
            batch = next(self.batches)
        batch = batch.to(parts.device)
        loss = self._accumulate(batch, step)
        if parts.run.train.clip_norm is not None:
            parts.precision.clip(parts.optimizer, parts.model, parts.run.train.clip_norm)
        parts.precision.step(parts.optimizer)
        parts.optimizer.zero_grad(set_to_none=True)
        self._meter.add(self.position)
        self.position.step += 1
        self.losses.add(self.position.step, loss, epoch=step // len(parts.loader), lr=rate)

    def _accumulate(self, batch: Batch, step: int) -> Tensor:
        """Gradients of a batch, in pieces that fit in memory, each weighted by its samples; its part of the loss.

        The replica takes the mean of the processes' gradients; a factor of their number makes it the sum.
        """
        parts, total = self.parts, torch.zeros((), dtype=torch.float64, device=self.parts.device)
        pieces = [(piece, batch.weight * len(piece.y) / len(batch.y)) for piece in batch.split(self._at_once(batch))]
        if parts.sharded is not None:  # each pass gathers weights from all processes, so all make equally many
            most = passes_of(parts.loader.samples(step), self.group.size, parts.run.train.micro_batch)
            pieces = [(pieces[0][0], 0.0)] * (most - len(pieces)) + pieces
        self.job.doing("preparing to add up gradients", step, waiting=True)
        parts.replica.prepare()
        self.job.doing("computing gradients", step)
        for number, (piece, weight) in enumerate(pieces, start=1):
            with (
                parts.method.probing(counts=weight > 0),
                nullcontext() if number == len(pieces) else parts.replica.no_sync(),
            ):
                with parts.precision.context():
                    loss: Tensor = parts.task.loss(parts.replica(piece.x), piece) * weight
                total += loss.detach()
                if number == len(pieces):
                    self.job.doing("adding up gradients over the processes", step, waiting=True)
                parts.precision.backward((loss + parts.method.penalty() * weight) * self.group.size)
        return total

    def _at_once(self, batch: Batch) -> int:
        """How many samples the model sees at once."""
        return self.parts.run.train.micro_batch or len(batch.y)

    def _summed(self, losses: Tensor) -> Tensor:
        """Losses summed over the processes; the same message carries the requests to stop, and to save."""
        signals = [self._wants_to_stop(), *self.saving.signals()]
        summed = self.group.sum(torch.cat([losses, losses.new_tensor(signals)]))
        self.stop.agreed |= bool(summed[-3])
        self.saving.hear(summed[-2:])
        return summed[:-3]

    def _wants_to_stop(self) -> bool:
        return self.stop.look(self.saving.longest)

    def _adapt(self) -> None:
        """What follows an optimiser step: the method's turn, then the averages'."""
        method, checks = self.parts.method, self.parts.method.checks
        method.step()
        if self.parts.ema is not None:
            self.parts.ema.update()
        if method.checks != checks:
            self._record_check()

    def _record_check(self) -> None:
        sizes = summarize(self.parts.model, self.parts.optimizer, dense_form=self.parts.method.dense_form)
        facts = {name: getattr(self.parts.method, name, None) for name in _AT_CHECKS}
        facts |= {"ranks": self.parts.method.ranks, "rank_share": sizes.rank_share}
        self.metrics.append("check", self.position.step, **(sizes.as_dict() | facts | self._spent()))
        reduced = f", reduced a step {sizes.gradient_bytes:,} of {sizes.dense_gradient_bytes:,} bytes"
        self.shown.note(
            f"check at step {self.position.step}: trainable {sizes.trainable_share:.1%}, "
            f"stored {sizes.stored_share:.1%} of dense{reduced if self.group.size > 1 else ''}"
        )

    def _verify_if_due(self) -> None:
        """Replicas that have drifted apart are found before much is lost."""
        every = self.parts.run.parallel.verify_every
        if self.parts.sharded is not None:
            return  # there is one copy of everything
        if self.group.size > 1 and every is not None and self.position.step % every == 0:
            self.job.doing("comparing parameters", self.position.step, waiting=True)
            require_equal(self.group, {"parameters": str(digest(self.parts.model.parameters()))})

    def _validate_if_due(self) -> bool:
        """Validates where it is time to; returns whether the model is better than ever before."""
        last = self.position.step >= self.parts.total_steps
        if self.parts.valid is None or (self.position.step % self._validate_every and not last):
            return False
        self._settle_losses()
        score = self._score(self.parts.valid)
        self.metrics.append("valid", self.position.step, **score.values, **self._spent())
        self.shown.note(f"step {self.position.step}: validation {score}")
        return self.position.judge(score, judged_by(self.parts.run))

    def _score(self, loader: BatchLoader) -> Score:
        """A split's score, with averaged weights where the run keeps them."""
        parts = self.parts
        parts.replica.synchronise_buffers()
        with nullcontext(parts.sharded or parts.model) if parts.ema is None else parts.ema.applied() as model:
            shared = parts.sharded is not None
            return parts.task.score(model, loader, parts.precision, self.group, self._validating, in_step=shared)

    def _validating(self) -> None:
        self.job.doing("validating", self.position.step)

    def _save_if_due(self, improved: bool) -> None:
        settings = self.parts.run.checkpoint
        best = improved and settings.keep_best
        if best or self._at_end() or self.saving.due(self.position.step):
            self._save(best, LAST_PAUSES if self._at_end() else None)

    def _save(self, best: bool = False, pauses: Sequence[float] | None = None) -> None:
        """A checkpoint of this step, as `Saving.save`; never two of one step."""
        if self._saved_at == self.position.step and (pauses is None or self.saving.is_done()):
            return
        self._settle_losses()
        self.position.finished = self._at_end()
        self._look_at_clock()
        self._meter.take_memory(self.position)
        one_saves = self.parts.sharded is None
        self.job.doing("saving", self.position.step, waiting=one_saves and not self.group.is_first)
        self.parts.replica.synchronise_buffers()
        tree = capture(self.parts, self.position)
        metric = self.position.best(judged_by(self.parts.run)) if best else None
        self.saving.save(self.position.step, tree, metric=metric, best=best, pauses=pauses)
        self._saved_at = self.position.step

    def _look_at_clock(self) -> None:
        now = time.monotonic()
        self.position.seconds += now - self._clock
        self._clock = now

    def _spent(self) -> dict[str, float | None]:
        """Seconds of training so far, and operations: those taken, and those that dense weights would have taken."""
        self._look_at_clock()
        position = self.position
        return {"seconds": position.seconds, "flops": position.flops, "dense_flops": position.dense_flops}

    def _settle_losses(self) -> None:
        """Writes the losses that are still on the device.

        Raises:
            TrainingDivergedError: if one of them is not finite.
        """
        bad = self.losses.flush()
        if bad is not None:
            step, loss = bad
            self.saving.wait()
            raise TrainingDivergedError(
                f"the loss of step {step} is {loss}; training cannot go on. {self._last_good()} {_CALMER}"
            )

    def _require_finite(self, tree: TreeLike) -> None:
        """No checkpoint holds weights, moments or averages that are not finite; a mask of -inf is none of these.

        Called while training goes on, with a copy of what it had come to.
        """
        weights = {name: value for name, value in from_tree(tree["model"]).items() if name not in self._unbounded}
        name = not_finite({"model": weights, "optimizer": tree["optimizer"], "ema": tree["ema"]})
        if name is not None:
            raise TrainingDivergedError(
                f"after step {position_of(tree).step} '{name}' is no longer finite; training cannot go on, and this "
                f"state is not saved. {self._last_good()} {_CALMER}"
            )

    def _last_good(self) -> str:
        steps = self.store.steps()
        if not steps:
            return "There is no checkpoint yet."
        return f"The last good checkpoint is that of step {max(steps)} in {self.directory.checkpoints}."

    def _leave(self) -> None:
        self._save(pauses=LAST_PAUSES)
        self.pace.settle(self.position.step)
        self.group.on_first(self.metrics.settle)
        reason = next(filter(None, self.group.gather(self.stop.reason)))
        idle = "nothing was trained, and " if self.position.step == self._began_at else ""
        # of a job the batch script says what follows
        advice = "" if reason.startswith("STOP (requeue") else "; the same command continues it"
        raise StopRequestedError(
            f"{reason}: {idle}the run is saved at step {self.position.step} of {self.parts.total_steps}{advice}"
        )

    def _finish(self) -> None:
        """The test score and the summary, after the last checkpoint."""
        self.pace.settle(self.position.step)
        score = self._score(self.parts.test)
        self.group.on_first(lambda: self._summarise(score))

    def _summarise(self, score: Score) -> None:
        summary = summary_of(self.parts, self.position, score, self._meter.totals(self.position))
        self.metrics.append("final", self.position.step, **summary)
        self.metrics.settle()
        with writing(self.directory.path):
            write_whole(self.directory.summary, msgspec.json.format(msgspec.json.encode(summary), indent=2))


def _buffers_not_finite(model: nn.Module) -> set[str]:
    """The buffers that are not finite before training, such as a causal mask."""
    return {name for name, b in model.named_buffers(remove_duplicate=False) if not torch.isfinite(b).all()}


def warn_of_changed_threads(saved: int, now: int) -> None:
    """Thread counts change the last bits of decompositions and sums."""
    if saved != now:
        warnings.warn(
            f"this run was saved with {saved} threads and continues with {now}: results stay right but not equal to "
            "the bit; train.threads sets the number",
            stacklevel=2,
        )
