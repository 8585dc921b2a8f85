"""Cluster profiles: what a job must know of a cluster, in a YAML file that is written once and used by name.

A name is looked for in the user's directory, `$XDG_CONFIG_HOME/hpclr/profiles` (~/.config where that is not set),
then among those that come with hpclr. Keys that are not known are refused. Many users may share a profile: variables
are put in for each, those in `container.binds` when a job is submitted, those in `environment` by the job.
"""

from __future__ import annotations

import difflib
import os
import string
import sysconfig
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from hpclr.cluster.container import Runtime, parse_bind
from hpclr.config import describe, yaml12
from hpclr.config.schema import doc
from hpclr.errors import UsageError

Place = tuple[str | int, ...]

Amount = Annotated[int, Meta(ge=0)]
TimeLimit = Annotated[
    str,
    Meta(
        pattern=r"^(\d+-\d{1,2}(:\d{2}){0,2}|\d+(:\d{2}){0,2})\Z",
        title="a time of Slurm's, such as 08:00:00 or 2-00:00:00",
    ),
]
Line = Annotated[str, Meta(pattern=r"^[^\0\n\r]*\Z", title="text of one line (numbers, true and false in quotes)")]
VariableName = Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*\Z", title="the name of a variable")]
Words = tuple[Line, ...]


class Section(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A mapping of a profile whose keys are known."""


class Partition(Section, kw_only=True, frozen=True):
    """A partition's nodes and limits; null: not known, and not checked."""

    gpus_per_node: Annotated[Amount | None, doc("GPUs of a node.")] = None
    cores_per_node: Annotated[Amount | None, doc("Cores of a node that jobs may use, without hyper-threads.")] = None
    time: Annotated[TimeLimit | None, doc("Longest time limit.")] = None


def _expanded(bind: str) -> str:
    """A bind with the variables of who submits put in.

    Raises:
        UsageError: for one that is not set, or empty, as the rest would be another directory; or a lone $.
    """
    template = string.Template(bind)
    try:
        return template.substitute({name: value for name, value in os.environ.items() if value})
    except KeyError as error:
        raise UsageError(
            f"cannot bind {bind!r} into the container: the variable {error.args[0]} is not set, or empty, where you "
            "submit. Set it, or write the path in a copy of the profile."
        ) from None
    except ValueError:
        raise UsageError(
            f"cannot bind {bind!r} into the container: it has a $ without the name of a variable, such as $USER or "
            "${USER}, after it; nothing else is replaced. Write $$ for a $."
        ) from None


class Container(Section, kw_only=True, frozen=True):
    """How images are run on the cluster."""

    runtime: Annotated[Runtime, doc("The program that runs them.")] = "apptainer"
    binds: Annotated[Words, doc("Also seen in the container: SOURCE[:TARGET[:ro]]; $NAME is replaced.")] = ()
    flags: Annotated[Words, doc("Further options of the runtime.")] = ()

    def __post_init__(self) -> None:
        binds = tuple(map(_expanded, self.binds))
        for bind in binds:
            parse_bind(bind)
        msgspec.structs.force_setattr(self, "binds", binds)


class Profile(Section, kw_only=True, frozen=True):
    """A cluster, as jobs see it."""

    description: Annotated[str, doc("The cluster in a few words.")] = ""
    tried: Annotated[bool, doc("Whether the profile has been used there, or only written from its documentation.")] = (
        False
    )
    modules: Annotated[Words, doc("Loaded in this order.")] = ()
    environment: Annotated[
        dict[VariableName, Line], doc("Exported to all processes; $NAME in a value is the job's.")
    ] = {}
    interface: Annotated[Line | None, doc("`parallel.interface` of runs that set none.")] = None
    host_suffix: Annotated[Line, doc("`parallel.host_suffix` of runs that set none.")] = ""
    partitions: Annotated[dict[str, Partition], doc("By name; the first is taken where a job names none.")] = {}
    container: Annotated[Container, doc("How images are run.")] = Container()
    srun: Annotated[Words, doc("Further options of srun.")] = ()
    mpirun: Annotated[Words, doc("Further options of mpirun.")] = ()
    mpi: Annotated[Literal["pmix", "pmi2", "none"] | None, doc("srun's --mpi; null: the cluster's default.")] = None
    account_required: Annotated[bool, doc("Whether jobs must name an account.")] = False


def profiles() -> dict[str, Path]:
    """The profiles that can be named, in the order of their names; the user's stand before those of hpclr."""
    found: dict[str, Path] = {}
    for directory in reversed(_directories()):
        found |= {path.stem: path for path in directory.glob("*.yaml")}
    return dict(sorted(found.items()))


def load_profile(name: str) -> Profile:
    """Reads a profile.

    Args:
        name: a name from `profiles`, or the path of a file: with a slash in it, or ending in .yaml.

    Raises:
        UsageError: there is none, it cannot be read, or it says what no profile can say; names file, line and key.
    """
    path = Path(name) if "/" in name or name.endswith(".yaml") else _named(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot read the cluster profile {path}: {reason}") from None
    document = yaml12.read(text, str(path))
    profile: Profile = _section(document, Profile, {} if document.value is None else document.value, ())
    return profile


def _directories() -> tuple[Path, ...]:
    """Where profiles are: the user's, those of the source tree, those of an installation."""
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    source = Path(__file__).parents[2] / "jobs" / "profiles"
    return Path(config, "hpclr", "profiles"), source, Path(sysconfig.get_path("data"), "share", "hpclr", "profiles")


def _named(name: str) -> Path:
    known = profiles()
    if name in known:
        return known[name]
    own, *_ = _directories()
    raise UsageError(
        f"there is no cluster profile {name!r}{_nearest(name, list(known))}; there are {', '.join(known) or 'none'}. "
        f"Write {own / name}.yaml, or give the path of a file."
    )


def _section(document: yaml12.Document, kind: type[msgspec.Struct], value: Any, place: Place) -> Any:
    known = describe.fields(kind)
    if not isinstance(value, dict):
        raise _wrong(document, place, f"a section with keys such as {next(iter(known))}", value)
    for key in value:
        if key not in known:
            owner = f"of {_dotted(place)}" if place else "of a cluster profile"
            raise UsageError(
                f"{document.place((*place, key))}: {key} is not a key {owner}{_nearest(key, list(known))}; "
                f"its keys are {', '.join(known)}"
            )
    values = {key: _value(document, known[key].type, item, (*place, key)) for key, item in value.items()}
    try:
        return kind(**values)
    except UsageError as error:  # a value that only its owner can judge
        raise UsageError(f"{document.place(place)}: {_dotted(place)}: {error}") from None


def _value(document: yaml12.Document, annotation: Any, value: Any, place: Place) -> Any:
    bare, _ = describe.bare(annotation)
    if kinds := describe.kinds(annotation):
        return _section(document, kinds[0], value, place)
    if get_origin(bare) is dict:
        if not isinstance(value, dict):
            raise _wrong(document, place, "a section of any keys", value)
        keys, items = get_args(bare)
        return {
            _value(document, keys, key, (*place, key)): _value(document, items, item, (*place, key))
            for key, item in value.items()
        }
    try:
        return msgspec.convert(value, annotation)
    except msgspec.ValidationError:
        raise _wrong(document, place, describe.expected(annotation), value) from None


def _wrong(document: yaml12.Document, place: Place, expected: str, value: Any) -> UsageError:
    name = _dotted(place) or "a cluster profile"
    return UsageError(f"{document.place(place)}: {name} must be {expected}, found {describe.show(value)}")


def _dotted(place: Place) -> str:
    return ".".join(map(str, place))


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word.lower(), known, 1)
    return f" (did you mean {close[0]}?)" if close else ""
