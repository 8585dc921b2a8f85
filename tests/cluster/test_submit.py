"""`hpclr submit` without Slurm: what is checked, what the job takes along, what its batch script says."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import pytest
from submit_helpers import CPU, NET, TARGET, make_place
from training_helpers import hpclr

from hpclr.cluster import snapshot
from hpclr.cluster.record import read_submission
from hpclr.cluster.snapshot import placed
from hpclr.cluster.submit import Resources, submit, write
from hpclr.config import load_run_file
from hpclr.errors import UsageError

GOLDEN = Path(__file__).with_name("golden")
SITE = """
tried: true
modules: [GCC/13.3.0, CUDA]
environment: {NCCL_DEBUG: WARN}
interface: ib0
host_suffix: -ib
partitions: {gpu: {gpus_per_node: 4, cores_per_node: 64, time: 1-00:00:00}, debug: {time: 00:30:00}}
container: {runtime: singularity, binds: [/scratch], flags: [--no-home]}
srun: [--cpu-bind=cores]
mpirun: [--bind-to, core]
mpi: pmix
account_required: true
"""
ACCOUNT = ("--account=me",)
GPUS = Resources(nodes=2, gpus_per_node=4, time="08:00:00", options=ACCOUNT, profile="./site.yaml")


@pytest.fixture
def place(tmp_path, few_digits, monkeypatch):
    """The current directory of a machine without Slurm."""
    (tmp_path / "bin").mkdir()
    for name in ("bash", "git"):
        os.symlink(shutil.which(name), tmp_path / "bin" / name)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HPCLR_RUNS", "runs")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site.yaml").write_text(SITE)
    (tmp_path / "no-mpi.yaml").write_text("mpi: none\n")
    (tmp_path / "image.sif").touch()
    return make_place(tmp_path, few_digits)


# --- the command


def test_a_dry_run_prints_the_script_and_writes_nothing(place):
    done = place.submit("--dry-run")
    assert done.code == 0, done.err
    assert done.out == place.prepared().text
    assert subprocess.run(["bash", "-n"], input=done.out, text=True, capture_output=True).stderr == ""
    assert "its limits are not checked, as Slurm cannot be asked here" in done.err
    assert not (place.path / "runs").exists()


def test_torch_is_not_waited_for(place):
    words = ["submit", str(place.write(**TARGET)), *map(str, CPU), "--dry-run"]
    program = (
        f"import sys; from hpclr.cli import main\ntry: main({words!r})\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_slurm_nothing_is_left_of_a_submission(place):
    done = place.submit()
    assert (done.code, "sbatch cannot be run here" in done.err) == (2, True)
    assert not place.run.exists()


def test_options_come_to_the_script_as_sbatch_takes_them(place):
    words = ("--partition", "a,b", "--qos", "q x", "--mem", "4G", "--exclude", "n[1-2]", "--dependency", "afterok:1")
    done = place.submit("train.seed=7", *words, "--chain", 2, "--dry-run", "--", "--comment=it's", "--exclusive")
    assert done.code == 0, done.err
    given = [line for line in done.out.splitlines() if line.startswith("#SBATCH")]
    for option in ("partition=a,b", 'qos="q x"', "mem=4G", 'exclude="n[1-2]"', "dependency=afterok:1", "exclusive"):
        assert f"#SBATCH --{option}" in given
    assert '#SBATCH --comment="it\'s"' in given
    assert "HPCLR_CHAIN=yes" in done.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--array", "1-3"), "submitted together as an array by `hpclr sweep`"),
        (("--", "--array=1-3"), "submitted together as an array by `hpclr sweep`"),
        (("--", "--gpus=8"), "--gpus-per-node N, before --"),
        (("--", "--gpus-per-node=8"), "--gpus-per-node N, before --"),
        (("--", "--gres=gpu:4"), "--gpus-per-node N, before --"),
        (("--mem", "4G", "--", "--mem-per-cpu=1G"), "--mem and --mem-per-cpu exclude one another"),
        (("--partition", "a", "--", "--partition=b"), "--partition: given more than once"),
        (("--", "--part=b"), "write the option in full, such as --partition"),
        (("--", "-p", "b"), "with the long name"),
        (("--", "--output=x"), "the batch script sets it itself"),
        (("--nodes", "0"), "Invalid value for '--nodes'"),
        (("--chain", "1"), "Invalid value for '--chain'"),
        (("--nodez", "1"), "No such option"),
    ],
)
def test_options_that_contradict_one_another_are_refused(words, said, place):
    done = place.submit("--dry-run", *words)
    assert (done.code, said in done.err) == (2, True), done.err


# --- checks


@pytest.mark.parametrize(
    ("resources", "sections", "said"),
    [
        ({"ntasks_per_node": None}, {}, "how many processes are to run on each node?"),
        ({"ntasks_per_node": 3}, {}, "data.batch_size is 64, which 3 processes (1 × 3) cannot share equally"),
        ({"gpus_per_node": 4}, {}, "2 processes and 4 GPUs per node"),
        ({"gpus_per_node": 1}, {}, "2 processes and 1 GPU per node"),
        ({}, {"train": {"device": "cuda"}}, "train.device is cuda, but the job has no GPUs"),
        ({}, {"parallel": {"backend": "nccl"}}, "parallel.backend is nccl, but the job has no GPUs"),
        ({}, {"parallel": {"launcher": "mpi"}}, "parallel.launcher is mpi, but the processes are started by srun"),
        ({"launcher": "torchrun"}, {"method": {"svd": "heat"}}, "method.svd is heat, which needs MPI"),
        ({"profile": "./no-mpi.yaml"}, {"method": {"svd": "heat"}}, "method.svd is heat, which needs MPI"),
        ({"time": "soon"}, {}, "--time 'soon': expected minutes, HH:MM:SS or D-HH:MM:SS"),
        ({"time": "2"}, {}, "--time 2 is 120 s, but the run is to save 120 s before the end"),
        ({"time": "10"}, {"slurm": {"margin": 700}}, "is 600 s, but the run is to save 700 s before the end"),
        ({}, {"model": {"name": "mlp", "weights": "none.pt"}}, "none.pt cannot be read"),
        ({}, {"data": {"path": "none.h5"}}, "none.h5: the dataset cannot be opened"),
        ({}, {"data": {"path": ["digits.h5", "run.yaml"]}}, "run.yaml: expected an HDF5 file"),
        ({}, {"data": {"batch_size": 512}}, "data.batch_size is 512, but"),
        ({}, {"model": {"target": "nett:make"}}, "there is no module 'nett' in the current directory"),
        ({"container": "none.sif"}, {}, "--container none.sif: there is no such image here"),
        ({"container": "docker://x/y"}, {}, "pull it once"),
        ({"profile": "./site.yaml"}, {}, "give --account NAME"),
        (
            {"profile": "./site.yaml", "options": (*ACCOUNT, "--partition=debug"), "time": "60"},
            {},
            "partition debug does",
        ),
        ({"profile": "nowhere"}, {}, "there is no cluster profile 'nowhere'"),
    ],
)
def test_what_cannot_work_is_refused(resources, sections, said, place):
    method = {"name": "oialr", "delay": 0.5, "every": 0.25} | sections.pop("method", {})
    asked = {"ntasks_per_node": 2, "time": "00:10:00"} | resources
    with pytest.raises(UsageError) as error:
        place.prepared(Resources(**asked), method=method, **sections)
    assert said in str(error.value)
    assert not (place.path / "runs").exists()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"horizon": 4}, "data.context is missing"),
        ({"context": 8}, "data.horizon is missing"),
        ({"context": 8, "horizon": 200}, "what follows it are 208 rows, but the training split"),
        ({"context": 8, "horizon": 4, "stride": 50}, "series.h5 has 3 training samples"),
        ({"context": 8, "horizon": 4}, None),
    ],
)
def test_time_series_are_checked_as_what_they_are(data, said, place):
    (place.path / "series.csv").write_text("".join(f"{row % 7},{row % 5}\n" for row in range(200)))
    assert hpclr("data", "prepare", "csv", "series.csv", "series.h5").code == 0
    model = {"name": "mlp"}
    done = place.submit("--dry-run", model=model, data={"path": "series.h5", "batch_size": 8} | data)
    assert (done.code, said is None or said in done.err) == (0 if said is None else 2, True), done.err
    assert said is not None or "140 rows to train on, 2" in done.err


def test_all_faults_are_named_at_once(place):
    with pytest.raises(UsageError) as error:
        place.prepared(Resources(ntasks_per_node=3, time="soon"), data={"path": "none.h5"})
    first, *faults = str(error.value).splitlines()
    assert first == "3 faults in this submission of run:"
    assert len(faults) == 3


def test_a_directory_that_holds_something_else_is_refused(place):
    place.run.mkdir(parents=True)
    (place.run / "notes").touch()
    with pytest.raises(UsageError, match="exists but holds no run"):
        place.prepared()


def test_runs_cannot_live_in_a_file(place):
    (place.path / "runs").touch()
    with pytest.raises(UsageError, match="is not writable"):
        place.prepared()


def test_a_run_that_has_been_trained_here(place):
    done = hpclr("train", place.write(train={"steps": 5}, checkpoint={"every": 5}))
    assert done.code == 0, done.err
    with pytest.raises(UsageError, match="this run is finished"):
        place.prepared(train={"steps": 5})
    with pytest.raises(UsageError, match=r"optimizer\.lr: 0\.003 in the run, 0\.1 now"):
        place.prepared(optimizer={"name": "adamw", "lr": 0.1}, train={"steps": 10})
    longer = place.prepared(train={"steps": 10})
    assert longer.checks[0].text == f"{place.run}: goes on from step 5"
    checkpoint = place.run / "checkpoints" / "step-00000005.h5"
    os.truncate(checkpoint, 1 << 42)  # a hole: no disk has room for more such files
    with pytest.raises(UsageError, match="MB are free there, but checkpoints need"):
        place.prepared(train={"steps": 10})


def test_a_directory_in_use_is_refused(place):
    from hpclr.training.lock import locked

    with locked(place.run), pytest.raises(UsageError, match=rf"in use by process {os.getpid()} .*it is alive"):
        place.prepared()
    assert place.prepared().checks[1].text == "nobody else trains there"


def test_large_data_is_not_read_for_a_submission(place):
    """Of a file that does not say that it was checked; the job reads it."""
    with h5py.File(place.path / "digits.h5", "r+") as file:
        del file.attrs["checked"]
        file["train/y"][0] = 99
    finding = next(found for found in place.prepared().checks if found.what == "data")
    assert (finding.sure, "each start of the job reads it all first" in finding.text) == (False, True)


# --- the snapshot


def test_what_the_job_takes_along(place):
    (place.path / "helpers.py").unlink()
    package = place.path / "helpers"
    for name in (".cache/x", "__pycache__/x.pyc", "data/words.txt"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("x")
    (package / "__init__.py").write_text("import json, torch, neither_here\nfrom other.deep import activation\n")
    (place.path / "other").mkdir()
    (place.path / "other" / "__init__.py").touch()
    (place.path / "other" / "deep.py").write_text("from torch.nn import ReLU as activation\n")
    (place.path / "unused.py").touch()
    (place.path / "torch").mkdir()  # a directory of data
    write(place.prepared(**TARGET))
    code = place.submission / "code"
    assert sorted(entry.name for entry in code.iterdir()) == ["helpers", "hpclr", "net.py", "other"]
    assert sorted(entry.name for entry in (code / "helpers").iterdir()) == ["__init__.py", "data"]
    assert (code / "hpclr" / "slurm" / "supervise.sh").is_file()
    assert "torch==" in (place.submission / "packages.txt").read_text()


@pytest.mark.parametrize("model", [{"target": "torch.nn:Identity"}, {"name": "mlp"}], ids=str)
def test_what_is_installed_is_not_copied(model, place):
    write(place.prepared(model=model))
    assert [entry.name for entry in (place.submission / "code").iterdir()] == ["hpclr"]


def test_a_target_in_a_directory_without_init(place):
    (place.path / "nets" / "deep").mkdir(parents=True)
    (place.path / "nets" / "deep" / "net.py").write_text(NET)
    write(place.prepared(model={"target": "nets.deep.net:make"}))
    code = place.submission / "code"
    assert (code / "nets" / "deep" / "net.py").read_text() == NET
    assert (code / "helpers.py").is_file()


def test_a_target_that_is_no_python_is_refused(place):
    (place.path / "net.py").write_text("def make(:\n")
    with pytest.raises(UsageError, match="net cannot be imported: invalid syntax"):
        place.prepared(**TARGET)


def test_a_target_may_be_in_the_image_only(place):
    assert place.prepared(Resources(gpus_per_node=2, container="image.sif"), model={"target": "inside:make"})


def test_data_among_the_code_is_not_copied(place, monkeypatch):
    monkeypatch.setattr(snapshot, "_MOST_CODE", 10 << 20)
    with (place.path / "helpers.py").open("a") as file:
        file.write("#" * (11 << 20))
    with pytest.raises(UsageError, match=r"helpers\.py would be copied for the job, and has more than 10 MiB"):
        place.prepared(**TARGET)


def test_code_behind_links_is_copied_once(place):
    (place.path / "net.py").unlink()
    (place.path / "elsewhere").mkdir()
    (place.path / "elsewhere" / "deep.py").write_text("x = 1\n")
    package = place.path / "net"
    package.mkdir()
    (package / "__init__.py").write_text(NET)
    (package / "linked").symlink_to(place.path / "elsewhere")
    (package / "circle").symlink_to(package)
    (package / "dangling.py").symlink_to(package / "nowhere.py")
    os.mkfifo(package / "pipe.py")
    write(place.prepared(**TARGET))
    copied = place.submission / "code" / "net"
    assert sorted(str(path.relative_to(copied)) for path in copied.rglob("*.py")) == ["__init__.py", "linked/deep.py"]


def test_the_commit_and_what_was_changed_since(place):
    def git(*words: str) -> str:
        who = ("-c", "user.name=x", "-c", "user.email=x")
        return subprocess.run(["git", *who, *words], check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("add", "net.py")
    git("commit", "-m", "x")
    (place.path / "net.py").write_text(NET + "# changed\n")
    write(place.prepared(**TARGET))
    assert read_submission(place.run).commits[str(place.path)] == git("rev-parse", "HEAD")
    assert "+# changed" in (place.submission / "changes.diff").read_text()


def test_the_run_file_of_the_job(place):
    weights = place.path / "w.pt"
    weights.touch()
    model = {"name": "mlp", "weights": "w.pt"}
    data = {"path": ["digits.h5", "./digits.h5"], "stage": "$TMPDIR/x"}
    write(place.prepared(GPUS, model=model, data=data, parallel={"interface": "eth1"}))
    run = load_run_file(place.submission / "run.yaml")
    assert run.data.path == (f"{place.path}/digits.h5",) * 2
    assert (run.model.weights, run.data.stage) == (str(weights), "$TMPDIR/x")
    assert (run.parallel.interface, run.parallel.host_suffix) == ("eth1", "-ib")


def test_a_profile_that_makes_no_run_file_is_refused(place):
    (place.path / "site.yaml").write_text("interface: a b\n")
    with pytest.raises(UsageError, match=r"profile \./site\.yaml.*parallel\.interface"):
        place.prepared(Resources(ntasks_per_node=2, profile="./site.yaml"))


def test_a_later_submission_takes_the_place_of_an_earlier_one(place):
    write(place.prepared())
    first = place.listing()
    with pytest.raises(ZeroDivisionError), placed(place.run, place.prepared(train={"steps": 20}).snapshot) as script:
        1 / (load_run_file(script.parent / "run.yaml").train.steps - 20)
    assert place.listing() == first
    script = write(place.prepared(train={"steps": 30}))
    assert script == place.submission / "job.sh"
    assert load_run_file(place.submission / "run.yaml").train.steps == 30
    assert [entry.name for entry in place.run.iterdir()] == ["submission"]


def test_a_submission_that_is_interrupted_leaves_nothing(place, monkeypatch):
    def interrupted(*words: object) -> str:
        assert (place.submission / "job.sh").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("hpclr.slurm.client.submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        submit(place.prepared())
    assert not place.run.exists()


def test_what_was_asked_for_is_kept(place):
    words = ("hpclr", "submit", "run.yaml", "--ntasks-per-node", "2")
    write(place.prepared())
    record = read_submission(place.run)
    assert (record.name, record.launcher, record.nodes, record.processes) == ("run", "srun", 1, 2)
    assert words[:1] == record.command


# --- resume


def test_only_what_was_submitted_is_resumed(place):
    done = hpclr("resume", place.run)
    assert (done.code, "it has not been submitted before" in done.err) == (2, True)


def test_a_run_that_was_moved_is_not_resumed(place):
    write(place.prepared())
    moved = place.run.rename(place.path / "moved")
    done = hpclr("resume", moved)
    assert (done.code, "it was submitted from another place" in done.err) == (2, True)


# --- the scripts


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "mpirun"])
@pytest.mark.parametrize("image", [None, "image.sif"], ids=["bare", "image"])
def test_scripts_are_as_they_were_reviewed(launcher, image, place):
    """With the profile above; HPCLR_GOLDEN=write writes them anew."""
    prepared = place.prepared(
        replace(GPUS, launcher=launcher, container=image, binds=("/extra",) if image else ()), **TARGET
    )
    path = GOLDEN / f"{launcher}{'-image' if image else ''}.sh"
    text = prepared.text.partition("# --- From here on")[0]
    for found, stands_for in ((place.path, "/home/me"), (Path(sys.executable).parent, "/home/me/venv/bin")):
        text = text.replace(str(found), stands_for)
    text = text.replace(Path(sys.executable).name, "python").replace("/home/me/venv/bin/mpirun", "mpirun")
    if os.environ.get("HPCLR_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize(
    ("runtime", "expected"),
    [
        ("apptainer", ["{0}/in:{0}/in:ro", "{0}/w.pt:{0}/w.pt:ro", "{1}:{1}", "{1}/submission:{1}/submission:ro"]),
        ("charliecloud", ["{0}/in:{0}/in", "{0}/w.pt:{0}/w.pt", "{1}:{1}"]),
    ],
)
def test_a_container_sees_the_run_and_its_data(runtime, expected, place):
    """A directory of data as a whole; of one in which the run is as well, only the file."""
    (place.path / "in").mkdir()
    for name in ("a.h5", "b.h5"):
        shutil.copy(place.path / "digits.h5", place.path / "in" / name)
    (place.path / "w.pt").touch()
    image = place.path / ("image.sif" if runtime == "apptainer" else "image")
    image.is_file() or image.mkdir()
    sections = {"data": {"path": ["in/a.h5", "in/b.h5"]}, "model": {"name": "mlp", "weights": "w.pt"}}
    resources = Resources(ntasks_per_node=2, container=str(image), runtime=runtime)
    words = place.prepared(resources, **sections).script.prefix
    bound = [word.removeprefix("--bind=") for word in words if word.startswith("--bind=")]
    assert bound == [text.format(place.path, place.run) for text in expected]


def test_the_profile_chooses_the_driver(place):
    (place.path / "amd.yaml").write_text("tried: true\ncontainer: {flags: [--rocm]}\n")
    resources = Resources(gpus_per_node=2, container="image.sif")
    assert "--nv" in place.prepared(resources).script.prefix
    amd = place.prepared(replace(resources, profile="./amd.yaml")).script.prefix
    assert ("--rocm" in amd, "--nv" in amd) == (True, False)
    assert "--nv" not in place.prepared(replace(resources, gpus_per_node=None, ntasks_per_node=2)).script.prefix


@pytest.mark.parametrize(("margin", "warning"), [(None, 120), (7.5, 8), (300, 300), (1e6, 65535)])
def test_the_warning_comes_as_early_as_the_run_wants_to_leave(margin, warning, place):
    resources = Resources(ntasks_per_node=2, time="30-0")
    assert place.prepared(resources, slurm={"margin": margin}).script.warning == warning
