"""The path of ranks: what methods do, and what an earlier run did."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from planning_helpers import METHODS, OIALR, PICTURES, VIT, counts_of, hpclr, run_of, sections

from hpclr.errors import UsageError
from hpclr.methods import OIALR as Method
from hpclr.planning.forms import Layer, highest_paying, is_worth_it
from hpclr.planning.like import path_like
from hpclr.planning.ranks import MOST_STAGES, Assumed, assumed_of, path_of

LAYERS = [Layer(f"layer{i}", (64, 48), 1, None) for i in range(10)]


@pytest.mark.parametrize("steps", [13, 1000])
@pytest.mark.parametrize("method", METHODS)
def test_a_path_has_every_step_once(method, steps):
    path = path_of(run_of(method=METHODS[method]).method, LAYERS, steps, Assumed())
    assert path.stages[0].first == 0
    assert path.stages[-1].last == steps
    assert all(a.last == b.first and a.ranks != b.ranks for a, b in pairwise(path.stages))
    assert len(path.stages) <= MOST_STAGES
    assert path.known == (method in ("dense", "fixed_rank", "truncate", "nested"))


@pytest.mark.parametrize(("delay", "every"), [(6, 3), (7, 3), (0, 5), (2, 5), (12, 1)])
def test_checks_are_where_oialr_has_them(delay, every):
    path = path_of(run_of(method=OIALR | {"delay": delay, "every": every}).method, LAYERS, 13, Assumed())
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = Method(model, optimizer, delay=delay, every=every)
    found = [0] * method.checks
    for step in range(1, 14):
        model(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        before = method.checks
        method.step()
        found += [step] * (method.checks - before)
    assert list(path.checks) == found


def test_oialr_cuts_the_last_layers_first_and_ends_where_it_is_told():
    path = path_of(run_of(method=OIALR).method, LAYERS, 24, Assumed(cut=0.5, final=0.25))
    assert path.at(5) == {}
    assert path.at(6) == {layer.name: 48 for layer in LAYERS}
    assert [path.at(9)[layer.name] for layer in LAYERS] == [48] * 5 + [24] * 5
    assert set(path.at(23).values()) == {12}
    gentle = path_of(run_of(method=OIALR | {"max_cut": 0.1}).method, LAYERS, 24, Assumed(cut=0.5, final=0.25))
    assert gentle.at(9)["layer9"] == 44  # no check may take more than max_cut


def test_layers_wait_until_they_pay():
    path = path_of(run_of(method=METHODS["oialr when it pays"]).method, LAYERS, 60, Assumed(cut=0.2, final=0.25))
    highest = highest_paying(run_of().method, LAYERS[0])
    assert is_worth_it(run_of().method, LAYERS[0], highest)
    assert not is_worth_it(run_of().method, LAYERS[0], highest + 1)
    assert path.at(7) == {}
    assert all(rank <= highest for stage in path.stages for rank in stage.ranks.values())
    assert len(path.stages[-1].ranks) == len(LAYERS)


@pytest.mark.parametrize("text", ["cut=2", "final=0", "end=0.5", "cut", "", "cut=nan"])
def test_what_is_no_path_is_refused(text):
    with pytest.raises(UsageError, match="cut=SHARE,final=SHARE"):
        assumed_of(text)


def test_parts_of_a_path_may_be_left_out():
    assert assumed_of("final=0.5") == Assumed(final=0.5)


@pytest.fixture(scope="session")
def trained(few_digits, tmp_path_factory):
    """The directory of a run that has trained with OIALR."""
    folder = tmp_path_factory.mktemp("trained")
    file = folder / "run.yaml"
    data = {"path": str(few_digits), "batch_size": 64}
    file.write_text(json.dumps(sections(data=data, checkpoint={"every": 13})))
    done = hpclr("train", file, "--runs-dir", folder / "runs")
    assert done.code == 0, done.err
    return folder / "runs" / "run"


def test_the_path_of_a_run_is_taken_from_its_records(trained):
    run = run_of()
    _, layers = counts_of(run)
    path = path_like(trained, run, layers, 13)
    checks = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    checks = [record for record in checks if record["kind"] == "check"]
    assert list(path.checks) == [min(12, record["step"]) for record in checks]
    for record in checks[:-1]:
        assert path.at(record["step"]) == {k: v for k, v in record["ranks"].items() if record["frozen"][k]}
    assert path.at(5) == {}
    longer = path_like(trained, run, layers, 130)
    assert longer.at(60) == path.at(6)
    other = run_of(model=VIT)
    _, of_other = counts_of(other, PICTURES)
    shares = [
        rank / layer.full
        for layer in of_other
        for name, rank in path_like(trained, other, of_other, 13).at(12).items()
        if name == layer.name
    ]
    assert shares == pytest.approx([checks[-1]["rank_share"]] * len(of_other), abs=0.02)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "has no check"),
        (['{"kind":"train","step":1}'], "has no check"),
        (["not json", '{"kind":"train"}'], "line 1 of"),
        (['{"kind":"check","step":"x","ranks":{}}', "{}"], "line 1 of"),
        (["[1, 2]", "{}"], "line 1 of"),
    ],
)
def test_records_that_tell_nothing_are_refused(lines, said, tmp_path, trained):
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "run.yaml").write_bytes((trained / "run.yaml").read_bytes())
    with pytest.raises(UsageError, match=said):
        path_like(tmp_path, run_of(), LAYERS, 13)


def test_a_torn_last_line_and_absurd_ranks_do_no_harm(tmp_path, trained):
    _, layers = counts_of(run_of())
    absurd = {layer.name: -5 for layer in layers} | {layers[0].name: 10**12, "<script>": 3}
    record = {"kind": "check", "step": 10, "ranks": absurd, "frozen": dict.fromkeys(absurd, True)}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + '\n{"kind":"tra')
    (tmp_path / "run.yaml").write_bytes((trained / "run.yaml").read_bytes())
    path = path_like(tmp_path, run_of(), layers, 13)
    assert all(1 <= rank <= 32 for stage in path.stages for rank in stage.ranks.values())


def test_no_run_no_path():
    with pytest.raises(UsageError, match=r"cannot read .*absent/metrics.jsonl"):
        path_like(Path("absent"), run_of(), LAYERS, 13)
