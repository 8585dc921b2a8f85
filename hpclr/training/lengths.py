"""Whether a method fits the length of its run; asked of the run file alone, so that many runs can be checked first."""

from hpclr.config.schema import Cuttlefish, Oialr, Section

# Of each method the key that says when its weights become low-rank.
MOMENTS = {"oialr": "delay", "svd_training": "prune_at", "truncate": "at", "cuttlefish": "delay", "nested": "delay"}


def moment_of(section: Section) -> float:
    """When the weights become low-rank, in steps or as a fraction of the run; 0 if at once or never."""
    key = MOMENTS.get(getattr(section, "name", ""))
    return 0 if key is None else getattr(section, key)


def check_length(section: Section, total: int) -> None:
    """Refuses a method of which a run would never see anything.

    Args:
        section: the run file's `method`.
        total: steps of the run.

    Raises:
        ValueError: if its weights would become low-rank after the run, or Cuttlefish has no time for its measurements.
    """
    from hpclr.methods.checks import check_measurements
    from hpclr.methods.schedule import in_steps

    moment = moment_of(section)
    if not moment:
        return
    key = MOMENTS[section.name]  # type: ignore[attr-defined]
    step = in_steps(key, moment, total)
    if step >= total:
        raise ValueError(
            f"{key} is {moment} but the run has {total} steps, so nothing would ever become low-rank; "
            f"make it less than {total}, or a fraction of the run below 1"
        )
    if isinstance(section, Cuttlefish):
        check_measurements(section.window, in_steps("every", section.every, total), step)


def decided_alone(section: Section, total: int) -> str | None:
    """What `method.auto` has decided for a run of this length, for people; None where there is no such thing.

    Args:
        section: the run file's `method`.
        total: steps of the run.
    """
    steps = check_steps(section, total)
    if not isinstance(section, Oialr) or not section.auto or steps is None:
        return None
    every = "every step" if steps["every"] == 1 else f"every {steps['every']:,} steps"
    return (
        f"auto: a check {every}; each layer becomes factors, of the rank that its outputs need, when what stands out "
        f"of the noise in it has settled, or at step {steps['delay']:,}, as soon as factors pay"
    )


def check_steps(section: Section, total: int) -> dict[str, int] | None:
    """When a method has its checks: at delay + j·every for all whole j, in steps; None if not regularly.

    Args:
        section: the run file's `method`.
        total: steps of the run.
    """
    from hpclr.methods.schedule import in_steps

    if not isinstance(section, Oialr):
        return None
    return {key: in_steps(key, getattr(section, key), total) for key in ("delay", "every")}
