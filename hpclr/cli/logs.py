"""`hpclr logs`."""

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-f", "--follow", is_flag=True, help="Go on while the run does, from one attempt to the next.")
@click.option("--rank", type=click.IntRange(min=0), default=0, help="Of this process.", show_default=True)
@click.option("--attempt", type=click.IntRange(min=1), help="Of this attempt only  [default: the newest]")
@click.option("--job", is_flag=True, help="What the job's script and launcher have written, instead.")
def logs(run: Path, follow: bool, rank: int, attempt: int | None, job: bool) -> None:
    """Show what the processes of the run in the directory RUN have written.

    Which file it is from, and how the run is, goes to standard error.
    """
    from hpclr.cluster.logs import Choice, follow_logs, show_logs

    if job and (attempt is not None or rank):
        raise click.UsageError("--job shows logs of no single process or attempt; leave out --rank and --attempt")
    choice = Choice(rank, attempt, job)
    if not follow:
        show_logs(run, choice, _echo)
        return
    try:
        follow_logs(run, choice, _echo)
    except KeyboardInterrupt:  # how one leaves; the run goes on
        raise SystemExit(130) from None


def _echo(text: str) -> None:
    from hpclr.errors import RetryableError

    try:
        click.echo(text, nl=False)
    except BrokenPipeError:  # who has read enough, such as head
        raise
    except OSError as error:
        raise RetryableError(f"standard output cannot be written: {error.strerror or error}") from error
