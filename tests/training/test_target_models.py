"""Models of the user's own, by `target: module:factory`."""

import importlib
import sys

import pytest
from test_bad_input import refused
from training_helpers import hpclr, last_tree, summary

MODULE = """
import torch
from torch import nn

marker = open("imported", "a").write("x")

class Net(nn.Sequential):
    def __init__(self, width=16, outputs=10):
        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, outputs))

class factories:
    @staticmethod
    def lazy():
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(32), nn.ReLU(), nn.LazyLinear(10))

def pair():
    class Pair(Net):
        def forward(self, x):
            return super().forward(x), x
    return Pair()

def pixels():
    return nn.Linear(99, 10)

def fails():
    raise RuntimeError("no licence")

def number():
    return 3

constant = 3
"""


@pytest.fixture
def own(bench, request):
    """A module in the current directory, with a name that no other test has imported."""
    name = f"own_{abs(hash(request.node.name))}"
    (bench.path / f"{name}.py").write_text(MODULE)
    yield name
    sys.modules.pop(name, None)


def test_a_class_in_the_current_directory(own, bench):
    run = bench.train(model={"target": f"{own}:Net", "args": {"width": 24}})
    assert last_tree(run)["/model/3.weight"].shape == (10, 24)
    assert summary(run)["sizes"]["dense"] == 64 * 24 + 24 + 24 * 10 + 10


def test_lazy_layers_get_their_shapes_in_time(own, bench):
    run = bench.train(model={"target": f"{own}:factories.lazy"})
    assert [layer["name"] for layer in summary(run)["layers"] if layer["converted"]] == ["1"]


@pytest.mark.parametrize(
    ("target", "texts"),
    [
        ("no_such_module:Net", ("model.target: cannot import 'no_such_module:Net'", "No module named")),
        ("OWN:Nett", ("model.target: cannot import", "Nett")),
        ("OWN:constant", ("cannot be called with {}", "not callable")),
        ("OWN:fails", ("cannot be called", "RuntimeError: no licence")),
        ("OWN:number", ("must return a torch.nn.Module, found int",)),
        ("OWN:pixels", ("model: it does not take samples of shape (1, 8, 8)",)),
        ("OWN:pair", ("each of the 10 classes", "shape (10,); found tuple")),
        ("syntax:Net", ("cannot import 'syntax:Net'", "SyntaxError")),
    ],
)
def test_what_does_not_work_is_refused(target, texts, own, bench, monkeypatch):
    (bench.path / "syntax.py").write_text("def (:")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(bench.path)
    importlib.import_module(own)  # so that what it writes is there before
    refused(bench, texts=texts, model={"target": target.replace("OWN", own)})


def test_wrong_arguments_and_wrong_outputs_are_refused(own, bench):
    before = hpclr("train", bench.write(model={"target": f"{own}:Net", "args": {"size": 3}}))
    assert before.code == 2
    assert "cannot be called with {'size': 3}: TypeError" in before.err
    wrong = hpclr("train", bench.write(model={"target": f"{own}:Net", "args": {"outputs": 9}}))
    assert wrong.code == 2
    assert "each of the 10 classes" in wrong.err
    assert "found (9,)" in wrong.err
    assert not (bench.path / "runs").exists()


def test_evaluating_needs_trust_and_inspecting_imports_nothing(own, bench):
    bench.train(model={"target": f"{own}:Net"})
    del sys.modules[own]
    (bench.path / "imported").unlink()

    done = hpclr("evaluate", bench.run)
    assert done.code == 2
    assert f"names the model '{own}:Net', which would be imported and run; pass --trust" in done.err
    shown = hpclr("inspect", bench.run)
    assert shown.code == 0, shown.err
    assert hpclr("summary", bench.run).code == 0
    assert not (bench.path / "imported").exists()
    assert own not in sys.modules

    trusted = hpclr("evaluate", bench.run, "--trust")
    assert trusted.code == 0, trusted.err
    assert f"accuracy {summary(bench.run)['test']['accuracy']:.2%}" in trusted.out
    assert (bench.path / "imported").exists()


def test_code_that_changed_under_a_run_is_refused(own, bench):
    bench.train(model={"target": f"{own}:Net"}, train={"steps": 13})
    del sys.modules[own]
    (bench.path / f"{own}.py").write_text(MODULE.replace("width=16", "width=17"))
    sys.path_importer_cache.clear()
    done = hpclr("train", bench.write(model={"target": f"{own}:Net"}, train={"steps": 14}))
    assert done.code == 2, done.err
    assert "Give the run the code back that it was started with" in done.err
    done = hpclr("evaluate", bench.run, "--trust")
    assert done.code == 2, done.err
    assert "do not fit the model that it names" in done.err
