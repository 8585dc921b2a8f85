"""The text of batch scripts: as reviewed, and with every value arriving as it was given, or refused."""

import os
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from script_helpers import PLAIN, Place

from hpclr.errors import UsageError
from hpclr.slurm import client
from hpclr.slurm.script import BatchScript

GOLDEN = Path(__file__).with_name("golden")
COMMON = "# --- From here on"
CONTAINED = {"prefix": ("apptainer", "exec", "--nv", "--bind", "/scratch/me", "/images/hpclr 0.1.sif")}
SITE = {
    "nodes": 4,
    "processes": 4,
    "cpus": 8,
    "gpus": 4,
    "time": "08:00:00",
    "options": ("--partition=accelerated", "--account=my-project", "--exclusive"),
    "modules": ("devel/cuda/12.4", "mpi/openmpi/5.0"),
    "environment": {"NCCL_SOCKET_IFNAME": "ib0", "GREETING": "it's $$5", "PATH": "/opt/x y/bin:$PATH"},
    "code": Path("/scratch/runs/digits/submission/code"),
    "python": "/home/me/venv/bin/python",
}
SCRIPTS = {
    "srun": PLAIN,
    "torchrun": replace(PLAIN, launcher="torchrun"),
    "mpirun": replace(PLAIN, launcher="mpirun"),
    "srun-container": replace(PLAIN, **CONTAINED),
    "torchrun-container": replace(PLAIN, launcher="torchrun", **CONTAINED),
    "mpirun-container": replace(PLAIN, launcher="mpirun", **CONTAINED),
    "srun-chain": replace(PLAIN, chain=True),
    "srun-site": replace(PLAIN, mpi="pmix", srun_options=("--cpu-bind=cores",), **SITE),
    "torchrun-site": replace(PLAIN, launcher="torchrun", host_suffix="i", **SITE),
    "mpirun-site": replace(PLAIN, launcher="mpirun", mpirun_options=("--bind-to", "core"), **SITE),
}
# What the shell, sbatch, printf and Slurm's file names would make something of.
HOSTILE = [
    "a b",
    "it's",
    'say "x"',
    "$(touch x)",
    "`touch x`",
    "$HOME",
    "a\\b",
    "é—ß",
    "#x",
    "%j%%",
    "-n",
    "*",
    "~",
    ":",
    "",
]
TEXT = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=12),
    st.text(st.sampled_from("ab \"'\\$`#%!&|;<>()*?[]{}~=-:,é"), max_size=12),
)
LINES = st.one_of(TEXT, st.just("two\nlines\n#SBATCH --nodes=99\n"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_as_they_were_reviewed(name):
    """The part that all have in common is in one of them only; HPCLR_GOLDEN=write writes them anew."""
    path = GOLDEN / f"{name}.sh"
    text = SCRIPTS[name].text()
    expected = text if name == "srun" else text.partition(COMMON)[0]
    if os.environ.get("HPCLR_GOLDEN") == "write":
        path.write_text(expected)
    assert expected == path.read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_bash(name):
    assert bash_n(SCRIPTS[name].text()) == ""


def bash_n(text: str) -> str:
    return subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr


@settings(max_examples=40, deadline=None)
@given(data=st.data(), launcher=st.sampled_from(["srun", "torchrun", "mpirun"]))
def test_any_text_gives_a_script_or_is_refused(data, launcher):
    text = st.one_of(LINES, st.text(max_size=8))
    script = BatchScript(
        data.draw(text),
        Path("/" + data.draw(text)),
        data.draw(st.lists(text, min_size=1, max_size=3)),
        launcher,
        nodes=2,
        processes=2,
        time=data.draw(text),
        options=[f"--comment={data.draw(text)}"],
        modules=data.draw(st.lists(text, max_size=2)),
        environment={"NAME": data.draw(text)},
        code=Path("/code") / data.draw(text),
        prefix=data.draw(st.lists(text, max_size=2)),
        host_suffix=data.draw(text),
    )
    try:
        result = script.text()
    except UsageError:
        return
    assert bash_n(result) == ""


# --- what arrives

SHOW = 'printf "%s\\0" "$@" >"$RUN/words"; printf "%s\\0" "$NAME" "$PYTHONPATH" >"$RUN/variables"'
# What they do up to the program: srun takes options, and the words of a torchrun agent are for another bash.
SRUN = f'while [[ $1 == --* ]]; do shift; done; if [ "$1" = bash ]; then SLURM_NODEID=1 exec "$@"; fi; {SHOW}'
MPIRUN = f'while [ "$1" != :: ]; do shift; done; {SHOW}'


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(LINES, min_size=1, max_size=3), value=LINES, launcher=st.sampled_from(["srun", "torchrun", "mpirun"])
)
def test_words_and_variables_arrive_as_they_are(words, value, launcher, tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("place"), PLAIN)
    for name, text in {"mpirun": MPIRUN, "::": SHOW}.items():
        place.program(name, text)
    place.script = replace(
        place.script,
        launcher=launcher,
        program=words,
        prefix=["::", *words],
        environment={"NAME": value.replace("$", "$$")},
        code=Path("/c o'de"),
    )
    place.scontrol = "echo n1"
    end = place.start(SRUN, PYTHONPATH="/old")
    assert end.code == 0, end.said
    found = (place.run / "words").read_bytes().decode().split("\0")[:-1]
    found = found[1:] if launcher != "torchrun" else found  # the prefix is itself the program there
    assert found[: len(words)] == words
    assert found[-len(words) :] == words
    assert (place.run / "variables").read_bytes().decode().split("\0")[:-1] == [value, "/c o'de:/old"]


@pytest.mark.parametrize(
    ("value", "arrives"),
    [
        ("/opt/x/bin:$OTHER", "/opt/x/bin:it's $(touch x)"),
        ("${OTHER}s", "it's $(touch x)s"),
        ("a b$OTHER$$OTHER", "a bit's $(touch x)$OTHER"),
        ("$UNKNOWN", ""),
        ("`id` ~ *", "`id` ~ *"),
    ],
)
def test_variables_of_the_job_are_put_in_and_nothing_else(value, arrives, tmp_path):
    place = Place(tmp_path, replace(PLAIN, environment={"NAME": value}))
    end = place.start(f"export PYTHONPATH=; {SHOW}", OTHER="it's $(touch x)")
    assert end.code == 0, end.said
    assert (place.run / "variables").read_text() == f"{arrives}\0\0"


def test_a_job_that_may_start_once_is_not_requeued_by_slurm():
    assert "#SBATCH --no-requeue\n" in replace(PLAIN, attempts=1).text()
    assert "#SBATCH --requeue\n" in replace(PLAIN, attempts=2).text()


def test_an_agent_of_torchrun_learns_on_its_node_who_it_is(tmp_path):
    place = Place(tmp_path, replace(PLAIN, launcher="torchrun", prefix=["show"], host_suffix="i"))
    place.program("show", SHOW)
    place.scontrol = 'if [ "$1" = show ]; then printf "n1\\nn2\\n"; fi'
    assert place.start('while [[ $1 == --* ]]; do shift; done; SLURM_NODEID=0 SLURMD_NODENAME=n1 exec "$@"').code == 0
    words = (place.run / "words").read_text().split("\0")
    assert {"--rdzv-endpoint=n1i:20007", "--rdzv-conf=is_host=1", "--local-addr=n1i", "--rdzv-id=7"} <= set(words)


def test_a_port_that_is_taken_is_not_used(tmp_path):
    place = Place(tmp_path, replace(PLAIN, launcher="torchrun"))
    place.scontrol = "echo n1"
    with socket.create_server(("127.0.0.1", 20007)):
        assert place.start(SHOW).code == 0
    assert (place.run / "words").read_text().split("\0")[-2] == "20008"


def test_modules_are_loaded_before_the_environment_is_set(tmp_path):
    place = Place(tmp_path, replace(PLAIN, modules=["a/1", "b c"], environment={"NAME": "mine"}))
    place.program("module", 'printf "%s|" "$@" "${NAME-unset}" "$-" >"$RUN/modules"; : "$UNSET"; false; exit 0')
    assert place.start(SHOW).code == 0
    assert (place.run / "modules").read_text().startswith("load|a/1|b c|unset|")
    assert (place.run / "variables").read_text().startswith("mine\0")
    place.program("module", "exit 1")
    assert place.start(SHOW).code == 1


# --- what is refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "two\nlines"}, "name: 'two\\nlines' contains '\\n'"),
        ({"run": Path("/a\nb")}, "contains"),
        ({"run": Path("relative")}, "expected an absolute path"),
        ({"run": Path("/back\\slash")}, "without a backslash"),
        ({"run": Path(os.fsdecode(b"/\xff"))}, "not valid UTF-8"),
        ({"code": Path("/a:b")}, "PYTHONPATH"),
        ({"program": ["a\0b"]}, "program"),
        ({"prefix": ["a\rb"]}, "prefix"),
        ({"environment": {"A B": "x"}}, "the name of a variable, found 'A B'"),
        ({"environment": {"RUN": "x"}}, "RUN is a variable of the batch script"),
        ({"environment": {"HPCLR_CHAIN": "x"}}, "HPCLR_CHAIN is a variable of the batch script"),
        ({"environment": {"SLURM_NTASKS": "x"}}, "or of Slurm"),
        ({"environment": {"A": "\0"}}, "environment: A"),
        ({"environment": {"A": "$(date)"}}, "environment: A: '$(date)' has a $ without the name of a variable"),
        ({"environment": {"A": "${B:-c}"}}, "Write $$ for a $"),
        ({"environment": {"A": "costs 5$"}}, "Write $$ for a $"),
        ({"time": "1:00\n#"}, "time"),
        ({"options": ["-p", "main"]}, "long name"),
        ({"options": ["partition=main"]}, "long name"),
        ({"options": ["--partition main"]}, "long name"),
        ({"options": ["--comment=a\nb"]}, "contains"),
        *[
            ({"options": [word]}, "sets it itself")
            for word in (
                "--output=x",
                "--out=x",
                "--requeue",
                "--signal=USR1@1",
                "--nodes=9",
                "--ntasks-per-node=3",
                "--wra=x",
            )
        ],
    ],
)
def test_what_cannot_be_said_is_refused(change, said):
    with pytest.raises(UsageError) as error:
        replace(PLAIN, **change).text()
    assert said in str(error.value)


@pytest.mark.parametrize(
    "word", ["--partition=a", "--mem=4G", "--nodelist=n1", "--time-min=1", "--no-kill", "--exclusive"]
)
def test_other_options_pass(word):
    assert f"#SBATCH {word}\n" in replace(PLAIN, options=[word]).text()


# --- what sbatch makes of it


def test_sbatch_takes_every_kind_of_script(real_slurm, tmp_path):
    file = tmp_path / "job.sh"
    for script in SCRIPTS.values():
        file.write_text(replace(script, nodes=2, processes=2, cpus=1, gpus=script.gpus and 2, options=()).text())
        assert "to start at" in client.dry_run(file)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=TEXT.filter(bool), comment=TEXT, program=LINES)
def test_sbatch_reads_what_was_meant(name, comment, program, real_slurm, tmp_path_factory):
    file = tmp_path_factory.mktemp("script") / "job.sh"
    options = [f"--comment={comment}", "--hold"]
    file.write_text(replace(PLAIN, name=name, options=options, program=[program]).text())
    job = client.submit(file)
    found = client.queue([job])[0]
    client.cancel([job])
    assert (found.name, found.nodes) == (name, 2)
