"""The hand-written scripts of jobs/. Real bash, with Slurm's commands and launchers stood in.

What they do around the processes is the text that is in generated scripts, too: tests/slurm/test_batch_decisions.py.
"""

import re
import signal
import subprocess
from pathlib import Path

import pytest
from script_helpers import PLAIN, Place

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "jobs").glob("*.sbatch"))
NUMBERS = {"SLURM_CPUS_PER_TASK": "8", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2"}
DIRECTIVES = (
    *("--requeue", "--open-mode=append", "--export=NONE", "--signal=B:USR1@180"),
    *("--output=runs/digits-vit/logs/%j_0_log.out", "--error=runs/digits-vit/logs/%j_0_log.err"),
)
each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)


def place_for(path: Path, directory: Path) -> Place:
    """A repository with a script in it, whose run is the place's; mpirun is what srun is."""
    place = Place(directory, PLAIN)
    repository = directory / "a repository's $(directory)"
    for name in ("jobs", "runs", ".venv/bin"):
        (repository / name).mkdir(parents=True)
    (repository / "hpclr").symlink_to(ROOT / "hpclr")
    (repository / "runs" / "digits-vit").symlink_to(place.run)
    (repository / ".venv" / "bin" / "activate").touch()
    place.file = repository / "jobs" / path.name
    place.file.write_text(path.read_text())
    place.program("mpirun", 'exec srun "$@"')
    place.scontrol = 'if [ "$1" = show ]; then printf "node17\\nnode18\\n"; fi'
    place.variables |= NUMBERS
    return place


def test_there_is_a_script_for_each_launcher():
    assert [path.stem for path in SCRIPTS] == ["apptainer", "mpirun", "srun", "torchrun"]


@each_script
def test_scripts_ask_slurm_for_what_they_rely_on(path):
    text = path.read_text()
    subprocess.run(["bash", "-n", str(path)], check=True)
    head, _, body = text.partition("set -euo pipefail\n")
    assert "#SBATCH" not in body, "Slurm reads no directives after the first command"
    directives = [line.split()[1] for line in head.splitlines() if line.startswith("#SBATCH")]
    assert set(DIRECTIVES) <= set(directives)
    assert "export SLURM_EXPORT_ENV=ALL" in body


@each_script
def test_scripts_start_the_launcher_with_the_jobs_numbers(path, tmp_path):
    place = place_for(path, tmp_path)
    end = place.start('printf "%s\\n" "$*" >"$RUN/words"', SLURM_GPUS_ON_NODE="4")
    assert end.code == 0, end.said
    words = (place.run / "words").read_text()
    assert "hpclr train jobs/quickstart.yaml" in words
    expected = {
        "srun": ["--kill-on-bad-exit=1 --cpus-per-task=8 python -m hpclr"],
        "torchrun": ["is_host=$((SLURM_NODEID == 0))", "agent 4 node17 20007"],
        "mpirun": ["-n 8 --map-by ppr:4:node --bind-to none python -m hpclr"],
        "apptainer": ["bash -p -c", 'export "APPTAINERENV_$name=${!name}"', "apptainer exec --cleanenv --nv --bind="],
    }
    assert [part for part in expected[path.stem] if part not in words] == []


def test_an_agent_of_torchrun_gets_its_words(tmp_path):
    place = place_for(ROOT / "jobs" / "torchrun.sbatch", tmp_path)
    place.program("python", 'printf "%s\\n" "$*" >"$RUN/words"')
    end = place.start('while [[ $1 == --* ]]; do shift; done; exec "$@"', SLURM_GPUS_ON_NODE="4", SLURM_NODEID="1")
    assert end.code == 0, end.said
    words = (place.run / "words").read_text()
    assert "--nnodes=2 --nproc-per-node=4" in words
    assert "--rdzv-endpoint=node17:20007 --rdzv-id=7 --rdzv-conf=is_host=0 -m hpclr" in words


@each_script
def test_a_run_that_is_saved_is_requeued_until_it_gets_no_further(path, tmp_path):
    place = place_for(path, tmp_path)
    end = place.signalled("until_stop; checkpoint 1; attempt 85; exit 1", signal.SIGUSR1)
    assert (end.code, end.requeues, place.stop_file()) == (85, 1, "requeue signal USR1 from Slurm\n"), end.said
    assert place.start("attempt 75; exit 1", restart=1).requeues == 1
    end = place.start("attempt 75; exit 1", restart=2)
    assert (end.code, end.requeues) == (1, 0)
    assert re.search("two starts in a row have not come beyond step 1 .*: submit the same script again", end.said)


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.stem != "apptainer"], ids=lambda path: path.stem)
def test_a_signal_while_the_environment_is_prepared_is_not_lost(path, tmp_path):
    place = place_for(path, tmp_path)
    (place.file.parents[1] / ".venv" / "bin" / "activate").write_text("kill -USR1 $$")
    end = place.start('touch "$RUN/started"')
    assert (end.code, end.requeues, (place.run / "started").exists()) == (85, 1, False), end.said


@each_script
def test_numbers_may_be_set_before(path, tmp_path):
    place = place_for(path, tmp_path)
    end = place.start("attempt 85; exit 1", restart=2, HPCLR_ATTEMPTS="3")
    assert (end.code, end.requeues) == (1, 0)
    assert "the last of 3 starts has ended" in end.said
