"""`hpclr verify`: runs as they are written are good, and whatever does not make sense in one is named."""

import json
import os
import re
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from training_helpers import OIALR, VIT, hpclr

from hpclr.checkpoint import CheckpointStore, Json, load_file
from hpclr.training.verification import verify_file


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"method": {"name": "dense"}},
        {"train": {"ema": 0.8, "precision": "bf16"}, "model": VIT},
        {"model": {"name": "resnet20", "width": 2}, "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9}},
        {"optimizer": {"name": "adafactor", "lr": 0.01}},
        {"optimizer": {"name": "asgd", "lr": 0.01}, "method": OIALR | {"convert": "when_it_pays"}},
    ],
    ids=str,
)
def test_what_training_writes_is_good(bench, sections):
    run = bench.train(**sections)
    before = bench.listing()
    done = hpclr("verify", run)
    assert (done.code, done.err) == (0, ""), done
    checkpoints = re.findall(r"step-0*(\d+)\.h5: good, [\d,]+ tensors, [\d.]+ MB, sha256 [0-9a-f]{12}…\n", done.out)
    assert checkpoints == sorted(checkpoints, key=int)
    assert checkpoints[-1] == "13"
    assert "best.json: the best checkpoint is step-" in done.out
    assert bench.listing() == before


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits):
    """A tree as training writes it, with factored layers and averages."""
    from training_helpers import Bench

    path = tmp_path_factory.mktemp("verify")
    before = os.getcwd()
    os.chdir(path)
    try:
        run = Bench(path, digits).train(model=VIT, train={"ema": 0.9})
    finally:
        os.chdir(before)
    return load_file(run / "checkpoints" / "step-00000013.h5").tree


@pytest.fixture
def tree(trained):
    """A copy to spoil."""
    return {key: dict(value) if isinstance(value, dict) else value for key, value in trained.items()}


def verdict_on(tmp_path, tree, step=13):
    store = CheckpointStore(tmp_path / "c")
    return verify_file(store.save(step, tree))


def sigma_of(tree):
    return next(name for name in tree["model"] if re.fullmatch(r"blocks.*\.sigma", name))


def changed(part, **values):
    return Json(part.value | values)


def smaller_sigma(tree):
    name = sigma_of(tree)
    tree["model"][name] = tree["model"][name][:-1, :-1].clone()


def smaller_u(tree):
    name = sigma_of(tree).removesuffix("sigma") + "u"
    tree["model"][name] = tree["model"][name][:, :-1].clone()


def no_vh(tree):
    del tree["model"][sigma_of(tree).removesuffix("sigma") + "vh"]


def dense_weight_as_well(tree):
    name = sigma_of(tree).removesuffix("sigma")
    tree["model"][name + "weight"] = tree["model"][name + "u"] @ tree["model"][name + "vh"]


def another_rank(tree):
    ranks = tree["method"]["state"]["ranks"].value
    tree["method"] = {"name": Json("oialr"), "state": {**tree["method"]["state"], "ranks": Json({**ranks, "head": 3})}}


def rank_forgotten(tree):
    ranks = dict(tree["method"]["state"]["ranks"].value)
    del ranks[sigma_of(tree).removesuffix(".sigma")]
    tree["method"] = {"name": Json("oialr"), "state": {**tree["method"]["state"], "ranks": Json(ranks)}}


def smaller_moment(tree):
    name = sigma_of(tree)
    state = dict(tree["optimizer"]["state"])
    state[name] = {**state[name], "exp_avg": state[name]["exp_avg"][:1, :1].clone()}
    tree["optimizer"]["state"] = state


def moment_of_nothing(tree):
    tree["optimizer"]["state"] = {**tree["optimizer"]["state"], "gone": {"exp_avg": torch.ones(3)}}


def smaller_average(tree):
    averages = dict(tree["ema"]["averages"])
    averages[sigma_of(tree)] = torch.ones(1, 1)
    tree["ema"] = {**tree["ema"], "averages": averages}


def nan_in_sigma(tree):
    tree["model"][sigma_of(tree)] = tree["model"][sigma_of(tree)] * float("nan")


def nan_in_frozen_u(tree):
    name = sigma_of(tree).removesuffix("sigma") + "u"
    tree["model"][name] = tree["model"][name] * float("inf")


def nan_in_average(tree):
    averages = dict(tree["ema"]["averages"])
    averages["head.bias"] = averages["head.bias"] * float("nan")
    tree["ema"] = {**tree["ema"], "averages": averages}


def position_of_another_step(tree):
    tree["position"] = changed(tree["position"], step=12)


def sampler_of_another_step(tree):
    tree["sampler"] = changed(tree["sampler"], step=12)


def position_without_step(tree):
    tree["position"] = Json({"seconds": 1.0})


def no_sampler(tree):
    del tree["sampler"]


def broken_run_file(tree):
    tree["run"] = Json({"yaml": "name: x\nmodell: {}\n"})


def layers_of_another_kind(tree):
    tree["layers"] = Json([1, 2])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            smaller_sigma,
            r"layer 'blocks.*': expected factors .*found \(\d+, (\d+)\), \(\d+, \d+\), \(\1, ",
        ),
        (smaller_u, "layer 'blocks.*': expected factors m×k"),
        (no_vh, "layer 'blocks.*': expected factors m×k.*None"),
        (dense_weight_as_well, "expected factors in place of blocks.*weight, found both"),
        (another_rank, "layer 'head': expected rank 3, as the method says, found no factors"),
        (rank_forgotten, r"layer 'blocks.*': expected no rank, as the method says, found \d+"),
        (smaller_moment, r"optimizer, exp_avg of 'blocks.*sigma': expected the parameter's shape .*, found \(1, 1\)"),
        (moment_of_nothing, "optimizer, exp_avg of 'gone': expected the parameter's shape nothing, found"),
        (smaller_average, r"average of 'blocks.*sigma': expected the parameter's shape .*, found \(1, 1\)"),
        (nan_in_sigma, "expected finite numbers, found NaN or infinity in model/blocks.*sigma"),
        (nan_in_frozen_u, r"expected finite numbers, found NaN or infinity in model/blocks.*\.u"),
        (nan_in_average, "expected finite numbers, found NaN or infinity in ema/averages/head.bias"),
        (position_of_another_step, "expected step 13 everywhere.*, found 12 in position"),
        (sampler_of_another_step, "expected step 13 everywhere.*, found 12 in sampler"),
        (position_without_step, "position is not what `hpclr train` writes: .*missing required field `step`"),
        (no_sampler, "expected the state of a run, found no sampler"),
        (broken_run_file, "its run file line 2.*modell"),
        (layers_of_another_kind, "layers is not what `hpclr train` writes"),
    ],
)
def test_what_does_not_make_sense_is_named(tmp_path, tree, spoil, reason):
    spoil(tree)
    verdict = verdict_on(tmp_path, tree)
    assert verdict.survey is not None
    assert any(re.search(reason, fault) for fault in verdict.faults), verdict.faults
    assert f"{verdict.path}: not good: {verdict.faults[0]}" in str(verdict)


def test_without_a_list_of_layers_their_names_tell(tmp_path, tree):
    del tree["layers"]
    assert verdict_on(tmp_path, tree).faults == []
    smaller_u(tree)
    assert re.search("expected factors m×k", verdict_on(tmp_path, tree).faults[0])


def test_a_file_under_the_name_of_another_step(tmp_path, tree):
    verdict = verdict_on(tmp_path, tree, step=14)
    assert [fault.split("found ")[1] for fault in verdict.faults] == ["13 in position", "13 in sampler"]
    os.rename(verdict.path, verdict.path.with_name("step-00000013.h5"))
    (fault, *_) = verify_file(verdict.path.with_name("step-00000013.h5"), without_digest=True).faults
    assert fault == "expected step 14 everywhere, as the file's attribute says, found 13 in its name"


def test_a_mask_of_minus_infinity_is_noted(tmp_path, tree):
    tree["model"]["mask"] = torch.full((3, 3), float("-inf")).triu(1)
    verdict = verdict_on(tmp_path, tree)
    assert verdict.faults == []
    assert verdict.notes == ["NaN or infinity in model/mask, which no optimiser trains"]


def test_files_that_are_no_runs(tmp_path):
    assert "no model: judged by its structure alone" in str(verdict_on(tmp_path, {"w": torch.ones(3), "run": Json(1)}))
    assert "weights alone" in str(verdict_on(tmp_path, {"model": {"w": torch.ones(3)}}))


# The command


def test_bad_ones_are_told_and_the_others_looked_at(bench):
    run = bench.train(checkpoint={"every": 3, "keep": 3, "keep_best": False})
    first, second, last = sorted((run / "checkpoints").glob("step-*.h5"))
    second.write_bytes(second.read_bytes()[:-1] + b"x")
    (run / "checkpoints" / "best.json").write_text(json.dumps({"step": int(second.stem[5:]), "metric": 1.0}))
    (run / "checkpoints" / "step-00000001.h5.bad.reason").write_text("it was never committed\n")
    done = hpclr("verify", run, first)
    assert (done.code, done.err) == (1, "")
    lines = done.out.splitlines()
    assert lines[0].startswith(f"{first}: good, ")
    assert lines[1].startswith(f"{second}: not good: the content has changed since it was saved: expected sha256")
    assert lines[2].startswith(f"{last}: good, ")
    assert lines[3] == f"{run}/checkpoints/step-00000001.h5.bad: set aside: it was never committed"
    assert lines[4] == f"{run}/checkpoints/best.json: the best checkpoint is {second.name}, which is not good"
    assert lines[5] == lines[0]
    assert len(lines) == 6


def test_a_file_without_its_digest(bench, tmp_path):
    run = bench.train()
    other = tmp_path / "stranger.h5"
    other.write_bytes((run / "checkpoints" / "step-00000013.h5").read_bytes())
    done = hpclr("verify", other)
    assert done.code == 1
    assert "there is no stranger.h5.sha256 beside it" in done.out
    assert hpclr("verify", other, "--without-digest").code == 0


def test_data_without_a_digest_and_a_digest_without_data(bench):
    checkpoints = bench.train(checkpoint={"every": 3, "keep": 5, "keep_best": False}) / "checkpoints"
    a, b, c, d, newest = sorted(checkpoints.glob("step-*.h5"))
    (checkpoints / f"{a.name}.sha256").unlink()
    b.unlink()
    (checkpoints / f"{newest.name}.sha256").unlink()
    done = hpclr("verify", bench.run)
    assert done.code == 1
    lines = done.out.splitlines()
    assert lines[0].startswith(f"{a}: not good: there is no {a.name}.sha256 beside it, so the checkpoint was never")
    assert lines[1].startswith(f"{b}: not good: its data is missing, only {b.name}.sha256 is there")
    assert [line.startswith(f"{path}: good") for line, path in zip(lines[2:], (c, d), strict=False)] == [True, True]
    assert lines[4] == f"{newest}: not committed (yet): it has no {newest.name}.sha256; the next start sets it aside"
    assert len(lines) == 5
    a.unlink()
    (checkpoints / f"{b.name}.sha256").unlink()
    done = hpclr("verify", bench.run)
    assert done.code == 0  # the newest alone: training may be going on
    assert f"{newest}: not committed (yet)" in done.out


def test_one_that_training_deletes_meanwhile(bench):
    """First its data goes, then its digest."""
    path = max((bench.train() / "checkpoints").glob("step-*.h5"))
    path.unlink()
    later = threading.Timer(0.3, path.with_name(path.name + ".sha256").unlink)
    later.start()
    assert str(verify_file(path)) == f"{path}: was deleted meanwhile"
    later.join()


@pytest.mark.parametrize("command", ["verify", "inspect", "evaluate"])
def test_a_name_that_is_too_long(command, bench):
    for name in ("x" * 300 + ".h5", "x" * 300):
        done = hpclr(command, name)
        assert done.code == 2
        assert f"{name}: it cannot be read: File name too long" in done.err


@pytest.mark.parametrize("command", ["verify", "inspect", "evaluate", "export"])
def test_what_may_not_be_read(command, digits):
    """Permissions do not apply to root, who is another user meanwhile."""
    with tempfile.TemporaryDirectory() as public:
        os.chmod(public, 0o755)
        store = CheckpointStore(Path(public, "locked", "checkpoints"))
        store.directory.parent.mkdir()
        file = store.save(3, {"model": {"w": torch.ones(2)}})
        store.directory.chmod(0)
        was = os.geteuid()
        os.seteuid(65534 if was == 0 else was)
        try:
            more = [Path(public, "a.pt")] if command == "export" else []
            found = [hpclr(command, path, *more) for path in (store.directory.parent, store.directory, file)]
        finally:
            os.seteuid(was)
            store.directory.chmod(0o755)
    for done in found:
        assert done.code == 2, done
        assert "Permission denied" in done.err
        assert "unexpected" not in done.err


def test_what_is_no_checkpoint(bench):
    bench.write()
    (bench.path / "empty").mkdir()
    for name, code, text in (
        ("nowhere", 2, "nowhere: no such checkpoint file or run directory"),
        ("empty", 2, "empty holds no checkpoint"),
        ("run.yaml", 1, "run.yaml: not good: "),
    ):
        done = hpclr("verify", name)
        assert (done.code, text in done.out + done.err) == (code, True), done
    assert hpclr("verify").code == 2


def test_control_characters_do_not_reach_the_terminal(bench):
    path = CheckpointStore(bench.path / "c").save(1, {"model": {"\x1b[2J": torch.ones(1)}, "optimizer": Json([])})
    done = hpclr("verify", path)
    assert done.code == 1
    assert "\x1b" not in done.out


def test_a_checkpoint_deleted_meanwhile_is_no_fault(tmp_path):
    verdict = verify_file(tmp_path / "step-00000001.h5")
    assert str(verdict) == f"{tmp_path}/step-00000001.h5: was deleted meanwhile"
    assert verdict.faults == []
