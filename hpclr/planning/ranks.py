"""The path of ranks that a plan goes by: known from the run file, assumed, or that of an earlier run."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from math import ceil

from hpclr.config.schema import Cuttlefish, Dense, FixedRank, Nested, Oialr, Section, SvdTraining, Truncate
from hpclr.errors import UsageError
from hpclr.methods.schedule import CheckSchedule, exact, in_steps
from hpclr.planning.forms import Layer, Ranks, is_worth_it
from hpclr.training.lengths import decided_alone

MOST_STAGES = 8  # forms of a model that are counted; more of them are taken together
MOST_CHECKS = 10_000  # that are counted one by one
_LEAST_SHARE = 0.001  # that may be assumed


@dataclass(frozen=True)
class Stage:
    """Steps `first` (0 for the first) up to but without `last`, with these ranks."""

    first: int
    last: int
    ranks: Ranks


@dataclass(frozen=True)
class Path:
    """How ranks fall.

    Attributes:
        stages: one after another, from the first step to the last.
        checks: after which steps layers are examined.
        known: whether the run file says it all.
        text: how the path comes about, for people.
    """

    stages: tuple[Stage, ...]
    checks: tuple[int, ...]
    known: bool
    text: str

    def stage(self, step: int) -> Stage:
        """That of a step."""
        return next(stage for stage in reversed(self.stages) if stage.first <= step)

    def at(self, step: int) -> Ranks:
        """The ranks in a step."""
        return self.stage(step).ranks

    @property
    def begins(self) -> int | None:
        """The first step with factors; None if there is none."""
        return next((stage.first for stage in self.stages if stage.ranks), None)


@dataclass(frozen=True)
class Assumed:
    """What a check takes of the rank of a layer that it covers, and at which share of full rank that ends."""

    cut: float = 0.2
    final: float = 0.25


def assumed_of(text: str) -> Assumed:
    """Reads cut=0.2,final=0.25; either may be left out.

    Raises:
        UsageError: for anything else.
    """
    found = {}
    for part in text.split(","):
        key, _, value = part.strip().partition("=")
        try:
            found[key] = float(value)
        except ValueError:
            found[key] = -1.0
        if key not in ("cut", "final") or not _LEAST_SHARE <= found[key] <= 1:
            raise UsageError(
                f"--path {text!r}: expected cut=SHARE,final=SHARE with shares from {_LEAST_SHARE} to 1: what a check "
                "takes of a rank, and the share of full rank at which that ends, such as cut=0.2,final=0.25"
            )
    return Assumed(**found)


def path_of(section: Section, layers: Sequence[Layer], steps: int, assumed: Assumed) -> Path:
    """The path of a method, as the run file says it and, for what is seen only in training, as assumed."""
    match section:
        case Dense():
            return Path((Stage(0, steps, {}),), (), True, "dense: every weight stays as it is")
        case Oialr():
            return _oialr(section, layers, steps, assumed)
        case FixedRank():
            ranks = {layer.name: _share(section.rank, layer) for layer in layers}
            return Path((Stage(0, steps, ranks),), (0,), True, f"two factors of {section.rank:.0%} of full rank")
        case Truncate():
            return _truncate(section, layers, steps, assumed)
        case Nested():
            return _nested(section, layers, steps)
        case Cuttlefish():
            return _cuttlefish(section, layers, steps, assumed)
        case SvdTraining():
            at = in_steps("prune_at", section.prune_at, steps)
            full = {layer.name: layer.full for layer in layers}
            text = _after(at, "U, s and V of full rank", f"U, s and V of {assumed.final:.0%} of full rank")
            return Path(_two(at, steps, full, _final(layers, assumed)), (0, at), False, text)
    raise UsageError(f"method: hpclr plan knows no path for {type(section).__name__}")


def _oialr(section: Oialr, layers: Sequence[Layer], steps: int, assumed: Assumed) -> Path:
    delay, every = in_steps("delay", section.delay, steps), in_steps("every", section.every, steps)
    if section.auto:
        return _settling(section, layers, delay, every, steps, assumed)
    later = section.convert == "when_it_pays"
    cut = min(assumed.cut, section.max_cut) if not later else assumed.cut
    first_check = 0 if delay == 0 else delay % every or every
    checks = _moments(first_check, steps, every)
    falling = _falling(
        section, layers, CheckSchedule(delay, every, section.layer_fraction), Assumed(cut, assumed.final)
    )
    begins = [delay, *(step for step in checks if step > delay)]
    stages = [Stage(0, delay, {}), *_stages(begins, falling, steps)]
    when = "each layer when its factors pay" if later else _after(delay, "dense", "factors of full rank")
    text = (
        f"{when}; every {every:,} steps {section.layer_fraction:.0%} more of the layers, last ones first, lose "
        f"{cut:.0%} of their rank, down to {assumed.final:.0%} of full rank"
    )
    if section.freeze == "stable" and delay:
        text += "; no layer freezes before the delay, though freeze: stable allows it"
    return Path(merged([stage for stage in stages if stage.first < stage.last]), checks, False, text)


def _settling(section: Oialr, layers: Sequence[Layer], delay: int, every: int, steps: int, assumed: Assumed) -> Path:
    """Under `auto`, as if all layers settled last."""
    ranks = _final(layers, assumed)
    paying = {layer.name: ranks[layer.name] for layer in layers if is_worth_it(section, layer, ranks[layer.name])}
    text = f"{decided_alone(section, steps)}; taken here: that step, and {assumed.final:.0%} of full rank"
    return Path(_two(delay, steps, {}, paying), _moments(delay % every or every, steps, every), False, text)


def _falling(
    section: Oialr, layers: Sequence[Layer], schedule: CheckSchedule, assumed: Assumed
) -> Iterator[dict[str, int]]:
    """The ranks after the conversion, and after each check that follows, until they fall no more."""
    later = section.convert == "when_it_pays"
    ranks = {} if later else {layer.name: layer.full for layer in layers}
    shares = dict.fromkeys((layer.name for layer in layers), 1.0)
    yield dict(ranks)
    for check in count(1):
        for layer in layers[len(layers) - schedule.covered(check, len(layers)) :]:
            shares[layer.name] = max(assumed.final, shares[layer.name] * (1 - assumed.cut))
            rank = max(_share(shares[layer.name], layer), _share(section.min_rank, layer))
            if not later or is_worth_it(section, layer, rank):
                ranks[layer.name] = rank
        yield dict(ranks)
        if all(share == assumed.final for share in shares.values()):
            return


def _stages(begins: Sequence[int], ranks: Iterable[Ranks], steps: int) -> list[Stage]:
    """One for each of the ranks, from its beginning to that of the next; the last one to the end of the run."""
    found = list(zip(begins, ranks, strict=False))
    ends = [*(begin for begin, _ in found[1:]), steps]
    return [Stage(begin, end, held) for (begin, held), end in zip(found, ends, strict=True)]


def _moments(first: int, last: int, every: int) -> tuple[int, ...]:
    """The steps of checks.

    Raises:
        UsageError: if there are too many of them.
    """
    number = (last - first) // every + 1
    if number > MOST_CHECKS:
        raise UsageError(
            f"method.every: a run of {last:,} steps with a check every {every:,} has {number:,} of them, and hpclr "
            f"plan counts up to {MOST_CHECKS:,}; look at train.epochs, train.steps and --samples, or check less often, "
            "such as method.every=0.05"
        )
    return tuple(range(first, last + 1, every))


def _truncate(section: Truncate, layers: Sequence[Layer], steps: int, assumed: Assumed) -> Path:
    at = in_steps("at", section.at, steps)
    known = isinstance(section.rank, float | int)
    share = float(section.rank) if isinstance(section.rank, float | int) else assumed.final
    ranks = {layer.name: max(_share(share, layer), _share(section.min_rank, layer)) for layer in layers}
    text = _after(at, "dense", f"two factors of {share:.0%} of full rank")
    return Path(_two(at, steps, {}, ranks), (at,), known, text)


def _nested(section: Nested, layers: Sequence[Layer], steps: int) -> Path:
    at, share = in_steps("delay", section.delay, steps), max(section.fractions)
    ranks = {layer.name: _share(share, layer) for layer in layers}
    text = _after(at, "dense", f"two factors of {share:.0%} of full rank, of which most steps compute a part only")
    return Path(_two(at, steps, {}, ranks), (at,), True, text)


def _cuttlefish(section: Cuttlefish, layers: Sequence[Layer], steps: int, assumed: Assumed) -> Path:
    delay, every = in_steps("delay", section.delay, steps), in_steps("every", section.every, steps)
    ranks = _final(layers, assumed)
    paying = {layer.name: ranks[layer.name] for layer in layers if is_worth_it(section, layer, ranks[layer.name])}
    text = _after(delay, "dense", f"two factors of {assumed.final:.0%} of full rank")
    text += "; flat stable ranks may end the first phase sooner" if delay else ""
    checks = dict.fromkeys((*_moments(0, delay, every), delay))
    return Path(_two(delay, steps, {}, paying), tuple(checks), False, text)


def _after(step: int, before: str, after: str) -> str:
    return f"{before} up to step {step:,}, then {after}" if step else f"{after} from the first step"


def _share(share: float, layer: Layer) -> int:
    return max(1, ceil(exact(share) * layer.full)) if share > 0 else 1


def _final(layers: Sequence[Layer], assumed: Assumed) -> dict[str, int]:
    return {layer.name: _share(assumed.final, layer) for layer in layers}


def _two(at: int, steps: int, before: Ranks, after: Ranks) -> tuple[Stage, ...]:
    stages = Stage(0, at, before), Stage(at, steps, after)
    return tuple(stage for stage in stages if stage.first < stage.last)


def merged(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """At most `MOST_STAGES` of them: equal neighbours become one, then runs of them, with the ranks in the middle.

    The first two, dense and at full rank, and the last stand alone.
    """
    joined: list[Stage] = []
    for stage in stages:
        if joined and joined[-1].ranks == stage.ranks:
            stage = Stage(joined.pop().first, stage.last, stage.ranks)
        joined.append(stage)
    if len(joined) <= MOST_STAGES:
        return tuple(joined)
    between, room = joined[2:-1], MOST_STAGES - 3
    runs = [between[i * len(between) // room : (i + 1) * len(between) // room] for i in range(room)]
    taken: Callable[[list[Stage]], Stage] = lambda run: Stage(run[0].first, run[-1].last, run[len(run) // 2].ranks)  # noqa: E731
    return (*joined[:2], *map(taken, filter(None, runs)), joined[-1])
