"""`hpclr train`: from a run file to a finished run, or on from where it stopped."""

from pathlib import Path

from hpclr.checkpoint import CheckpointStore, Loaded
from hpclr.config import RunFile, load_run_file
from hpclr.errors import UsageError
from hpclr.output import say
from hpclr.training.assembly import Assembly, assemble
from hpclr.training.loop import Trainer, warn_of_changed_threads
from hpclr.training.metrics import MetricsFile, read_metrics
from hpclr.training.progress import display
from hpclr.training.run_directory import RunDirectory
from hpclr.training.state import Position, from_tree, position_of, restore


def train(run: RunFile, runs: Path, *, fresh: bool = False) -> RunDirectory:
    """Trains a run, or continues it, in `runs/NAME`.

    Args:
        run: the run file.
        runs: the directory that holds runs.
        fresh: start over; a run that is there already is set aside, not overwritten.

    Raises:
        UsageError: for anything wrong with the run file, the data or the directory; nothing has been written then.
        HpclrError: as `Trainer.train`.
    """
    directory = RunDirectory(runs / run.name)
    if fresh:
        directory.check_place()
    else:
        directory.check(run)
    parts = assemble(run)
    if fresh and directory.exists:
        _set_aside(directory)
    with directory.locked():
        directory.check(run)  # once more: another process may have been here while the parts were made
        _train_locked(parts, directory)
    return directory


def _set_aside(directory: RunDirectory) -> None:
    with directory.locked():  # not from under a process that is training in it
        old = directory.set_aside()
    say(f"the run that was in {directory.path} is now in {old}")


def _train_locked(parts: Assembly, directory: RunDirectory) -> None:
    store = CheckpointStore(directory.checkpoints, keep=parts.run.checkpoint.keep)
    store.sweep()
    saved = store.load_newest()
    if saved is not None and _is_finished(saved, parts) and directory.summary.exists():
        say(f"{directory.path}: this run is finished (step {saved.step}); --fresh starts it over")
        return
    if saved is None and _is_finished_without_checkpoints(parts.run, directory):
        say(f"{directory.path}: this run is finished, but its checkpoints are gone; --fresh starts it over")
        return
    position = _resume(parts, saved, directory) if saved is not None else Position()
    directory.create(parts.run, parts.environment)
    MetricsFile(directory.metrics).rewind(position.step)
    with display(parts.run.name, parts.total_steps, position.step) as shown:
        if saved is not None:
            shown.note(f"continuing from step {position.step} ({saved.path.name})")
        Trainer(parts, position, directory, store, shown).train()


def _is_finished(saved: Loaded, parts: Assembly) -> bool:
    return position_of(saved.tree).ended(parts.total_steps, parts.run.validation.patience)


def _is_finished_without_checkpoints(asked: RunFile, directory: RunDirectory) -> bool:
    """Whether a run's records are all that is left of it, and all that is asked for.

    Raises:
        UsageError: if it was trained, but not to the end that is asked for; starting over would erase its records.
    """
    if directory.summary.exists() and _length(load_run_file(directory.run_file)) == _length(asked):
        return True
    last = max((record["step"] for record in read_metrics(directory.metrics)), default=0)
    if last > 0:
        raise UsageError(
            f"{directory.path} holds the records of a run that was trained to step {last}, but its checkpoints are "
            f"gone: none is in {directory.checkpoints}. Put one back, with its .sha256, or start over with --fresh "
            "(what is there is then set aside)."
        )
    return False


def _length(run: RunFile) -> tuple[int | None, int | None, int | None]:
    return run.train.steps, run.train.epochs, run.validation.patience


def _resume(parts: Assembly, saved: Loaded, directory: RunDirectory) -> Position:
    data = from_tree(saved.tree["data"])
    if data.get("stamp") != parts.dataset.stamp:
        parts.dataset.verify()  # copied or changed since: the digest that it names may no longer be its own
    if data["digest"] != parts.dataset.digest:
        raise UsageError(
            f"{directory.path} was trained on data with digest {data['digest'][:12]}…, but {parts.run.data.path} has "
            f"{parts.dataset.digest[:12]}…; give the run its data back, or start over with --fresh"
        )
    warn_of_changed_threads(from_tree(saved.tree["environment"])["threads"], parts.threads)
    try:
        return restore(parts, saved.tree)
    except (ValueError, RuntimeError, KeyError) as error:  # code behind a `target:` may have changed
        raise UsageError(
            f"{saved.path} does not fit the model and the optimiser of this run, though its run file is the same: "
            f"{error}. Give the run the code back that it was started with, or start over with --fresh."
        ) from error
