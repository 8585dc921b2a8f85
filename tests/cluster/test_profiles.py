import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpclr.cluster.container import prefix
from hpclr.cluster.profiles import Container, Partition, Profile, load_profile, profiles
from hpclr.errors import UsageError

SHIPPED = ["generic", "horeka", "jureca", "juwels", "lumi", "perlmutter"]
WHOLE = """\
description: a cluster
tried: true
modules: [GCC/13.3.0, CUDA]
environment: {NCCL_DEBUG: WARN, OMP_PROC_BIND: "true"}
interface: ib0
host_suffix: -ib
partitions:
  gpu: {gpus_per_node: 4, cores_per_node: 64, time: 2-00:00:00}
  debug: {time: 00:30:00}
container: {runtime: singularity, binds: [/scratch, "/a:/b:ro"], flags: [--no-home]}
srun: [--cpu-bind=cores]
mpirun: [--bind-to, none]
mpi: pmix
account_required: true
"""


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """The user's directory of profiles."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    directory = tmp_path / "hpclr" / "profiles"
    directory.mkdir(parents=True)
    return directory


def refusal(own, text: str) -> str:
    path = own / "x.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_profile("x")
    assert str(caught.value).startswith(str(path))
    return str(caught.value).removeprefix(str(path)).strip()


def test_every_key_is_read(own):
    (own / "mine.yaml").write_text(WHOLE)
    assert load_profile("mine") == Profile(
        description="a cluster",
        tried=True,
        modules=("GCC/13.3.0", "CUDA"),
        environment={"NCCL_DEBUG": "WARN", "OMP_PROC_BIND": "true"},
        interface="ib0",
        host_suffix="-ib",
        partitions={
            "gpu": Partition(gpus_per_node=4, cores_per_node=64, time="2-00:00:00"),
            "debug": Partition(time="00:30:00"),
        },
        container=Container(runtime="singularity", binds=("/scratch", "/a:/b:ro"), flags=("--no-home",)),
        srun=("--cpu-bind=cores",),
        mpirun=("--bind-to", "none"),
        mpi="pmix",
        account_required=True,
    )


def test_a_profile_is_shared_by_users(own, monkeypatch):
    monkeypatch.setenv("USER", "mia")
    monkeypatch.setenv("PROJECT", "/project/p1")
    (own / "x.yaml").write_text("container: {binds: ['/scratch/$USER:/scratch:ro', '${PROJECT}/data', /a$$b]}")
    assert load_profile("x").container.binds == ("/scratch/mia:/scratch:ro", "/project/p1/data", "/a$b")


def test_an_empty_profile_is_one(own):
    (own / "x.yaml").write_text("# nothing\n")
    assert load_profile("x") == Profile()


def test_names_and_paths(own, tmp_path, monkeypatch):
    assert list(profiles()) == SHIPPED
    (own / "lumi.yaml").write_text("description: mine")
    (own / "work.yaml").write_text("{}")
    assert list(profiles()) == [*SHIPPED, "work"]
    assert load_profile("lumi").description == "mine", "the user's goes before hpclr's"
    (tmp_path / "here.yaml").write_text("description: here")
    monkeypatch.chdir(tmp_path)
    assert load_profile("here.yaml") == load_profile(str(tmp_path / "here.yaml")) == Profile(description="here")


def test_names_that_are_none(own):
    with pytest.raises(
        UsageError, match=r"no cluster profile 'juwel' \(did you mean juwels\?\); there are generic, hor"
    ):
        load_profile("juwel")
    with pytest.raises(UsageError, match=f"Write {own}/other.yaml"):
        load_profile("other")
    with pytest.raises(UsageError, match=r"cannot read the cluster profile none.yaml: No such file"):
        load_profile("./none.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tried: false\nmodulse: []", "line 2: modulse is not a key of a cluster profile (did you mean modules?)"),
        ("partitions: {a: {gpus: 3}}", "line 1: gpus is not a key of partitions.a; its keys are gpus_per_node, cores"),
        ("container: {bind: []}", "line 1: bind is not a key of container (did you mean binds?)"),
        ("tried: yes", "line 1: tried must be true or false, found 'yes'"),
        (
            "partitions:\n  a:\n    time: 12h",
            "line 3: partitions.a.time must be a time of Slurm's, such as 08:00:00 or",
        ),
        (
            "partitions: {a: {gpus_per_node: -1}}",
            "line 1: partitions.a.gpus_per_node must be a whole number >= 0 or null",
        ),
        ("partitions: [gpu]", "line 1: partitions must be a section of any keys, found ['gpu']"),
        ("partitions: {a: 3}", "line 1: partitions.a must be a section with keys such as gpus_per_node, found 3"),
        ("mpi: openmpi", "line 1: mpi must be one of pmix, pmi2, none or null, found 'openmpi'"),
        ("environment: {OMP_NUM_THREADS: 1}", "line 1: environment.OMP_NUM_THREADS must be text of one line (numbers,"),
        ("environment: {A B: x}", "line 1: environment.A B must be the name of a variable, found 'A B'"),
        ('srun: ["a\\nb"]', "line 1: srun must be a list (each item text of one line"),
        ("modules: GCC", "line 1: modules must be a list (each item text of one line"),
        (
            "container: {runtime: docker}",
            "line 1: container.runtime must be one of apptainer, singularity, charliecloud",
        ),
        ("container:\n  binds: [~/data]", "line 1: container: cannot bind '~/data' into the container: expected"),
        ("container:\n  binds: [/a/$NOBODYS]", "line 1: container: cannot bind '/a/$NOBODYS' into the container: the "),
        ("container:\n  binds: [/a/$EMPTY]", "line 1: container: cannot bind '/a/$EMPTY' into the container: the vari"),
        ("container:\n  binds: [/a/$(id)]", "line 1: container: cannot bind '/a/$(id)' into the container: it has a $"),
        ("- 1", ": a cluster profile must be a section with keys such as description, found [1]"),
        ("a: 1\na: 2", "line 2: the key a is given twice"),
    ],
)
def test_what_no_profile_can_say_is_refused(own, text, message, monkeypatch):
    monkeypatch.setenv("EMPTY", "")
    assert refusal(own, text).startswith(message)


def test_a_file_that_is_no_text_is_refused(own):
    (own / "x.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot read the cluster profile"):
        load_profile("x")


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("profile") / "x.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    with contextlib.suppress(UsageError):
        load_profile(str(path))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profiles(name):
    profile = load_profile(name)
    assert profile.description
    assert profile.tried == (name == "generic")
    text = profiles()[name].read_text()
    assert name == "generic" or ("https://" in text and "never tried there" in text)
    assert prefix(profile.container.runtime, "x.sif", binds=profile.container.binds, flags=profile.container.flags)


def test_generic_shows_every_key():
    text = profiles()["generic"].read_text()
    assert all(f"\n{key}: " in text for key in Profile.__struct_fields__)
    assert load_profile("generic") == Profile(description="any Slurm cluster", tried=True)
