"""The command line before any command runs: help at once, errors in one sentence, the same under both names."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from hpclr.cli import COMMANDS, main
from hpclr.version import __version__

HELP = [[], *([name] for name in COMMANDS), ["data", "prepare"], ["data", "inspect"]]
HEAVY = {"torch", "numpy", "h5py", "rich.progress", "sklearn"}
NOT_FOR_TRAINING = {"galore_torch", "heat", "matplotlib", "mpi4py", "onnx", "sklearn", "tensorboard", "transformers"}
PROGRAM = """
import resource, sys
sys.argv = ["hpclr", *{arguments!r}]
from hpclr.cli import main
try:
    main()
except SystemExit as exit_:
    assert exit_.code == 0, exit_.code
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, sorted({heavy!r} & set(sys.modules)), sep="|", file=sys.stderr)
"""


@pytest.mark.parametrize("command", HELP, ids=" ".join)
def test_help_is_instant(command):
    """The CPU time of the whole process: waiting for a busy machine does not count."""
    program = PROGRAM.format(arguments=[*command, "--help"], heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Usage: hpclr" in done.stdout
    seconds, heavy = done.stderr.strip().split("|")
    assert heavy == "[]"
    assert float(seconds) < 0.5


def test_training_loads_no_package_that_it_may_not_need():
    program = f"import sys, hpclr.training.run; print(*{NOT_FOR_TRAINING!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "\n", done


def test_help_lists_every_command_with_its_line(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["-h"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for name, (_, line) in COMMANDS.items():
        assert name in shown
        assert line in " ".join(shown.split())


def test_both_names_are_the_same_program():
    for command in ([sys.executable, "-m", "hpclr"], [Path(sys.executable).with_name("hpclr")]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
        assert done.stdout == f"hpclr, version {__version__}\n"


@pytest.mark.parametrize("arguments", [["trian"], ["train"], ["train", "a", "--frsh"], ["evaluate"], ["summary"]])
def test_wrong_usage_is_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "Usage: hpclr" in capsys.readouterr().err


def test_a_fault_is_one_paragraph_and_debug_shows_where(capsys):
    for arguments, traceback in ((["train", "none.yaml"], False), (["--debug", "train", "none.yaml"], True)):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        err = capsys.readouterr().err
        assert err.splitlines()[-1].startswith("hpclr: cannot read the run file none.yaml")
        assert ("Traceback" in err) is traceback


def test_what_nobody_foresaw_is_exit_1_with_a_hint(capsys, monkeypatch):
    monkeypatch.setitem(COMMANDS, "train", ("no.such.module:train", ""))
    with pytest.raises(SystemExit) as caught:
        main(["train", "a"])
    assert caught.value.code == 1
    err = capsys.readouterr().err
    assert err == "hpclr: unexpected ModuleNotFoundError: No module named 'no' (hpclr --debug … shows where)\n"


def test_warnings_are_one_line(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert warnings.formatwarning("beware", UserWarning, "file.py", 3) == "hpclr: warning: beware\n"
