import os
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpclr.config import RunFile, describe, dump, load_run_file, parse_run_file
from hpclr.config.schema import EnergyRule, Oialr, Target
from hpclr.errors import UsageError

DIGITS = """\
name: digits-vit
model: {name: vit, image: 8, patch: 2}
data:
  path: digits.h5
  batch_size: 64
optimizer: {name: adamw, lr: 1e-3, weight_decay: 0.05}
schedule: {name: cosine, warmup_steps: 50}
method: {name: oialr, delay: 200, every: 100, cutoff: 0.1}
train: {epochs: 40}
checkpoint: {every: 200, keep: 3}
"""


def parse(*overrides: str) -> RunFile:
    return parse_run_file(DIGITS, "run.yaml", overrides)


def refusal(text: str = DIGITS, *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse_run_file(text, "run.yaml", overrides)
    return str(caught.value)


def test_reads_every_section_and_fills_in_defaults():
    run = parse()
    assert (run.name, run.model.name, run.model.patch, run.model.depth) == ("digits-vit", "vit", 2, 4)
    assert run.optimizer.lr == 0.001
    assert (run.data.batch_size, run.data.in_memory) == (64, "auto")
    assert (run.method.delay, run.method.max_cut) == (200, 0.5)
    assert (run.train.epochs, run.train.steps, run.train.threads) == (40, None, "auto")


def test_dense_and_constant_are_the_defaults():
    run = parse_run_file(
        "{name: a, model: {name: mlp}, data: {path: x, batch_size: 1}, optimizer: {lr: 1}, train: {steps: 1}}",
        "run.yaml",
    )
    assert (run.method.name, run.schedule.name, run.optimizer.name) == ("dense", "constant", "adamw")
    assert isinstance(run.optimizer.lr, float)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batch_size=sixty", "data.batch_size must be a whole number >= 1, found 'sixty'"),
        ("data.batch_size=0", "data.batch_size must be a whole number >= 1, found 0"),
        ("data.batch_size=true", "data.batch_size must be a whole number >= 1, found true"),
        ("data.flip=yes", "data.flip must be true or false, found 'yes'"),
        (
            "data.path=",
            "data.path must be the path of a file or a list (each item the path of a file), found nothing (null)",
        ),
        ("optimizer.lr=0", "optimizer.lr must be a number > 0, found 0"),
        ("optimizer.lr=.inf", "optimizer.lr must be a number > 0, found inf"),
        ("optimizer.weight_decay=.nan", "optimizer.weight_decay must be a number >= 0 or null, found nan"),
        ("optimizer.betas=[.9]", "betas must be a list of 2 items (each a number >= 0 and < 1) or null, found [0.9]"),
        ("method.cutoff=1", "method.cutoff must be a number > 0 and < 1, or a section with rule: one of relative"),
        ("method.cutoff.rule=energi", "method.cutoff.rule cannot be 'energi' (did you mean energy?)"),
        ("method.cutoff={rule: energy}", "method.cutoff.share is missing; it must be a number > 0 and <= 1"),
        ("method.delay=200.5", "a whole number of steps >= 0, or a fraction of the run >= 0 and < 1, found 200.5"),
        ("method.delay=-1", "method.delay must be a whole number of steps >= 0"),
        ("method.every=0", "a whole number of steps >= 1, or a fraction of the run > 0 and < 1, found 0"),
        ("method.layer_fraction=0", "method.layer_fraction must be a number > 0 and <= 1, found 0"),
        ("method.max_aspect=1", "method.max_aspect must be a number > 1, found 1"),
        ("method.freeze=never", "method.freeze must be one of schedule, stable, found 'never'"),
        ("method.exclude=head", "method.exclude must be a list (each item text), found 'head'"),
        ("model.hidden=[1]", "model.hidden is not a key of model with name: vit"),
        ("model.name=vitt", "model.name cannot be 'vitt' (did you mean vit?); give name: one of mlp, vit"),
        ("model={name: [1]}", "model.name cannot be [1]; give name: one of mlp, vit"),
        ("model={target: factory}", "model.target must be text of the form package.module:factory, found"),
        ("model=vit", "found 'vit'; write its keys below it, indented"),
        ("train.seed=9223372036854775808", "train.seed must be a whole number >= 0 and < 2^63"),
        ("train.seed=-1", "train.seed must be a whole number >= 0 and < 2^63, found -1"),
        ("train.label_smoothing=1", "train.label_smoothing must be a number >= 0 and < 1, found 1"),
        ("train.ema=1.0", "train.ema must be a number > 0 and < 1 or null, found 1.0"),
        ("train.threads=0", "train.threads must be auto or a whole number >= 1, found 0"),
        ("train.steps=10", "train must have exactly one of epochs and steps, found epochs: 40 and steps: 10"),
        ("train.epochs=null", "train must have exactly one of epochs and steps, found neither"),
        ("train.micro_batch=65", "train.micro_batch (65) must not exceed data.batch_size (64)"),
        ("validation={every_epochs: 1, every_steps: 5}", "at most one of every_epochs and every_steps"),
        ("checkpoint.keep=1", "must be a whole number >= 2 (the newest may be the one being written"),
        ("schedule={name: step, milestones: [5, 3]}", "must rise from one to the next"),
        ("schedule={name: step, milestones: [0.5, 3]}", "all whole numbers of steps or all fractions"),
        ("schedule={warmup_steps: 3}", "schedule.name is missing; give name: one of constant, cosine, step"),
        ("name=1e3", "found 1000.0; put it in quotes to make it text"),
        ("name=.hidden", "name must be a name of at most 128 letters"),
        ("name='a/../b'", "name must be a name of at most 128 letters"),
    ],
)
def test_wrong_values_are_refused_with_expectation_and_finding(override, message):
    refused = refusal(DIGITS, override)
    assert refused.startswith((f"override {override!r}: ", "run.yaml"))
    assert message in refused
    assert "\n" not in refused


@pytest.mark.parametrize(
    "override",
    [
        "method.delay=0",
        "method.delay=0.5",
        "method.cutoff=0.999",
        "method.cutoff={rule: marchenko_pastur, noise: null}",
        "method.layer_fraction=1",
        "method.min_rank=0",
        "data.in_memory=false",
        "data.in_memory=auto",
        "train.threads=2",
        "train.micro_batch=64",
        "schedule={name: step, milestones: [0.3, 0.6]}",
        "schedule={name: one_cycle}",
        "model={target: 'torchvision.models:resnet18', args: {weights: null}}",
        "model={name: resnet56, width: 32}",
        "name=A.b_c-9",
        "checkpoint.keep=2",
        "optimizer.args={fused: true}",
    ],
)
def test_values_at_the_edge_are_accepted(override):
    assert isinstance(parse(override), RunFile)


def test_a_wrong_value_names_file_and_line():
    expected = "run.yaml line 5: data.batch_size must be a whole number >= 1, found 'sixty'"
    assert refusal(DIGITS.replace("64", "sixty")) == expected


@pytest.mark.parametrize(
    ("old", "new", "place", "nearest"),
    [
        ("patch: 2", "pach: 2", "line 2: model.pach", "patch"),
        ("epochs: 40", "epochs: 40, lr: 1", "line 9: train.lr", "optimizer.lr"),
        ("checkpoint:", "chekpoint:", "line 10: chekpoint", "checkpoint"),
        ("cutoff: 0.1", "cutoff: {rule: energy, share: .9, shar: 1}", "line 8: method.cutoff.shar", "share"),
        ("weight_decay", "weigth_decay", "line 6: optimizer.weigth_decay", "weight_decay"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_right_one(old, new, place, nearest):
    refused = refusal(DIGITS.replace(old, new))
    assert refused.startswith(f"run.yaml {place} is not a key of ")
    assert f"(did you mean {nearest}?)" in refused
    assert "; its keys are " in refused


@pytest.mark.parametrize("key", ["a\nb", "x" * 1000, "a.b"])
def test_odd_keys_are_shown_in_one_short_line(key):
    refused = refusal(dump(parse()) + f"{key!r}: 1\n".replace("'", '"'))
    assert "is not a key of the run file" in refused
    assert len(refused) < 300
    assert "\n" not in refused


def test_a_key_of_a_sibling_is_not_said_to_belong_where_it_stands():
    assert "did you mean" not in refusal(DIGITS, "model.hidden=[1]")


def test_a_key_of_another_method_is_refused_by_the_name_of_this_one():
    refused = refusal(DIGITS.replace("name: oialr", "name: dense").replace(", every: 100, cutoff: 0.1", ""))
    assert "method.delay is not a key of method with name: dense" in refused


def test_all_faults_are_told_at_once():
    refused = refusal(DIGITS.replace("64", "0").replace("1e-3", "fast").replace("  path: digits.h5\n", ""))
    lines = refused.splitlines()
    assert lines[0] == "3 faults in run.yaml:"
    assert [line.split(": ")[1].split()[0] for line in lines[1:]] == [
        "data.batch_size",
        "data.path",
        "optimizer.lr",
    ]


def test_many_faults_are_cut_short():
    text = "\n".join(f"key{number}: 1" for number in range(100))
    lines = refusal(text).splitlines()
    assert lines[0] == "105 faults in run.yaml:"
    assert lines[-1] == "and 85 more"


@pytest.mark.parametrize("text", ["", "# nothing", "null", "---\n"])
def test_an_empty_file_is_refused(text):
    assert "run.yaml is empty" in refusal(text)


@pytest.mark.parametrize("text", ["[1, 2]", "hello", "3"])
def test_a_file_without_sections_is_refused(text):
    assert "run.yaml must hold sections" in refusal(text)


def test_files_are_read_with_or_without_a_byte_order_mark(tmp_path):
    path = tmp_path / "run.yaml"
    for start in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(start + DIGITS.encode())
        assert load_run_file(path, ["train.seed=3"]) == parse("train.seed=3")


def test_unreadable_files_are_refused(tmp_path):
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("name: a\n# é".encode() + b"\nmodel: caf\xe9\n")
    huge = tmp_path / "huge.yaml"
    huge.write_bytes(b"# " + b"x" * 2_000_000)
    cases = {
        tmp_path: "Is a directory",
        tmp_path / "absent.yaml": "No such file or directory",
        latin: "line 3 column 11: the byte 0xe9 is not UTF-8",
        huge: "too long for a run file",
    }
    for path, message in cases.items():
        with pytest.raises(UsageError, match=message) as caught:
            load_run_file(path)
        assert str(path) in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.touch(mode=0)
    with pytest.raises(UsageError, match="Permission denied"):
        load_run_file(path)


def test_reading_a_run_file_does_not_import_torch():
    code = "import sys, hpclr.config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_dump_spells_out_every_key():
    run = parse("method.cutoff={rule: energy, share: 0.9}", "model={target: 'a.b:c', args: {x: '1e-3', y: on}}")
    assert run.method == Oialr(delay=200, every=100, cutoff=EnergyRule(share=0.9))
    assert run.model == Target(target="a.b:c", args={"x": "1e-3", "y": "on"})
    text = dump(run)
    assert "stability_threshold: 0.99" in text
    assert parse_run_file(text, "dump") == run


def test_every_key_has_a_meaning_and_says_what_it_expects():
    def walk(kind):
        for field in describe.fields(kind).values():
            assert describe.meaning(field.type)
            assert describe.expected(field.type)
            for inner in describe.kinds(field.type):
                walk(inner)

    walk(RunFile)


def test_every_default_is_a_value_that_the_schema_accepts():
    for model in ("{name: mlp}", "{name: vit}", "{name: vgg16}", "{name: resnet20}", "{target: 'a:b'}"):
        run = parse(f"model={model}")
        assert repr(parse_run_file(dump(run), "dump")) == repr(run)


words = st.text(max_size=6).map(lambda text: text.replace("\0", ""))
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
in_peace = settings(deadline=None, max_examples=60)  # the machine may be busy


@in_peace
@given(args=st.dictionaries(words, anything, max_size=4))
def test_whatever_a_run_file_holds_survives_being_written_and_read(args):
    run = msgspec.structs.replace(parse(), model=Target(target="a:b", args=args))
    again = parse_run_file(dump(run), "dump")
    assert repr(again) == repr(run)


plain = st.sampled_from(
    ["x", "''", "0", "-1", "1e-3", "1e400", ".nan", "null", "true", "2020-01-01", "0x" + "f" * 5000]
)
broken = st.sampled_from(["[", "{", "*a", "&a [*a]", "!!int x", "\t", "\x00", '"\\ud800"', "9" * 5000])
values = plain | broken | st.sampled_from(["[1, 2]", "{a: 1}", "{rule: energy}"])
keys = [f"{section}.{key}" for section in RunFile.__struct_fields__ for key in ("name", "x", "cutoff", "args")]
pieces = st.sampled_from([*DIGITS.split(), *":-,[]{}&*!|>'\"%@`#?~", "\n", "\n  ", "\t", " ", "1e3", "<<", "\\x"])


def accepted_or_refused(text, overrides):
    try:
        run = parse_run_file(text, "run.yaml", overrides)
    except UsageError:
        return
    assert repr(parse_run_file(dump(run), "dump")) == repr(run)


@in_peace
@given(text=st.text() | st.lists(pieces, max_size=30).map(" ".join))
def test_no_text_gives_anything_but_a_run_file_or_a_refusal(text):
    accepted_or_refused(text, [])


@in_peace
@given(overrides=st.lists(st.builds("{}={}".format, st.sampled_from(keys), values) | st.text(), max_size=4))
def test_no_override_gives_anything_but_a_run_file_or_a_refusal(overrides):
    accepted_or_refused(DIGITS, overrides)


@given(start=st.integers(0, len(DIGITS)), length=st.integers(0, 12), new=st.text(max_size=6) | values | pieces)
def test_no_damage_to_a_good_file_gives_anything_but_a_run_file_or_a_refusal(start, length, new):
    accepted_or_refused(DIGITS[:start] + new + DIGITS[start + length :], [])
