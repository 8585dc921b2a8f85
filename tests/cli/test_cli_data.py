import subprocess
import sys

import pytest


def hpclr(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "hpclr", "data", *map(str, arguments)], capture_output=True, text=True, timeout=60
    )


def test_prepare_and_inspect(tmp_path):
    done = hpclr("prepare", "digits", tmp_path / "digits.h5", "--valid-fraction", "0.2")
    assert done.returncode == 0, done.stderr
    assert "train 1,150, valid 288, test 359" in done.stdout
    shown = hpclr("inspect", tmp_path / "digits.h5")
    assert shown.returncode == 0, shown.stderr
    for fact in ("classification", "1 x 8 x 8 uint8", "when written", "train 1,150"):
        assert fact in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits"], "expected OUT, found nothing"),
        (["digits", "a", "b"], "expected OUT, found a b"),
        (["npz", "a.npz"], "expected SOURCE OUT, found a.npz"),
        (["nothing", "a", "b"], "'nothing' is not one of"),
        (["npz", "/none/a.npz", "b.h5"], "/none/a.npz"),
    ],
)
def test_wrong_usage_is_one_paragraph_and_exit_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = hpclr("prepare", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_inspecting_no_dataset_is_exit_2(tmp_path):
    (tmp_path / "a.h5").write_text("text")
    done = hpclr("inspect", tmp_path / "a.h5")
    assert done.returncode == 2
    assert "expected an HDF5 file" in done.stderr


@pytest.mark.parametrize("command", [[], ["prepare"], ["inspect"]])
def test_help_loads_nothing_heavy(command):
    program = (
        "import sys\nfrom hpclr.cli.data import data\n"
        f"data({[*command, '--help']!r}, standalone_mode=False)\n"
        "print({'torch', 'numpy', 'h5py'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.stdout.endswith("set()\n"), done.stdout + done.stderr


def test_help_lists_every_reader():
    from hpclr.data.readers import READERS

    shown = hpclr("prepare", "--help").stdout
    for name, reader in READERS.items():
        assert name in shown
        assert reader.source in shown
