import pytest

from hpclr.config import overrides, parse_run_file, yaml12
from hpclr.config.schema import Dense, EnergyRule, Mlp, Resnet, StableRankRule, Target
from hpclr.errors import UsageError

FILE = """\
name: digits
model: {name: vit, image: 8, patch: 2, dropout: 0.2}
data: {path: digits.h5, batch_size: 64}
optimizer: {name: adamw, lr: 1e-3, weight_decay: 0.05, betas: [0.9, 0.99], args: {fused: true}}
schedule: {name: cosine, warmup_steps: 50, min_lr: 1e-5}
method: {name: oialr, delay: 200, every: 100, cutoff: {rule: energy, share: 0.9}}
train: {epochs: 40}
"""


def parse(*overrides):
    return parse_run_file(FILE, "run.yaml", overrides)


def refusal(*overrides):
    with pytest.raises(UsageError) as caught:
        parse(*overrides)
    return str(caught.value)


def test_values_are_yaml_and_the_last_one_wins():
    run = parse(
        "optimizer.lr=3e-4",
        "train.seed=1",
        "method.exclude=[head, 'blocks.0']",
        "train.ema=0.9",
        "train.ema=null",
        "name=foo",
        "data.path=a=b.h5",
        "train.seed=0x10",
    )
    assert (run.optimizer.lr, run.train.seed, run.train.ema) == (3e-4, 16, None)
    assert (run.method.exclude, run.name, run.data.path) == (("head", "blocks.0"), "foo", "a=b.h5")


def test_missing_sections_are_made():
    run = parse("validation.every_steps=10", "optimizer.args.nested.key=1")
    assert run.validation.every_steps == 10
    assert run.optimizer.args == {"fused": True, "nested": {"key": 1}}


def test_another_method_drops_the_keys_of_the_first():
    assert parse("method.name=dense").method == Dense()


def test_another_model_keeps_only_the_keys_that_it_has():
    assert parse("model.name=mlp").model == Mlp(dropout=0.2)
    assert parse("model.hidden=[3]", "model.name=mlp").model == Mlp(dropout=0.2, hidden=(3,))
    assert parse("model.name=resnet20").model == Resnet(name="resnet20")
    assert parse("model.target=a.b:c").model == Target(target="a.b:c")


def test_a_named_model_takes_the_place_of_a_target():
    text = FILE.replace("{name: vit, image: 8, patch: 2, dropout: 0.2}", "{target: 'a:b', args: {x: 1}}")
    assert parse_run_file(text, "run.yaml", ["model.name=mlp"]).model == Mlp()


def test_another_schedule_keeps_what_both_have():
    schedule = parse("schedule.name=constant").schedule
    assert (schedule.name, schedule.warmup_steps) == ("constant", 50)


def test_another_rule_drops_the_parameters_of_the_first():
    assert parse("method.cutoff.rule=stable_rank").method.cutoff == StableRankRule()


def test_a_rule_takes_the_place_of_a_number():
    number = FILE.replace("{rule: energy, share: 0.9}", "0.1")
    run = parse_run_file(number, "run.yaml", ["method.cutoff.rule=energy", "method.cutoff.share=0.5"])
    assert run.method.cutoff == EnergyRule(share=0.5)


@pytest.mark.parametrize(
    ("name", "betas", "args"),
    [
        ("adamw", (0.9, 0.99), {"fused": True}),
        ("AdamW", (0.9, 0.99), {"fused": True}),
        ("adam", (0.9, 0.99), {}),
        ("sgd", None, {}),
        ("Adafactor", None, {}),
    ],
)
def test_another_optimizer_keeps_what_it_has_a_use_for(name, betas, args):
    optimizer = parse(f"optimizer.name={name}").optimizer
    assert (optimizer.name, optimizer.lr, optimizer.weight_decay) == (name, 1e-3, 0.05)
    assert (optimizer.betas, optimizer.args) == (betas, args)


def test_the_same_name_again_drops_nothing():
    assert parse("method.name=oialr", "model.name=vit") == parse()


def test_the_document_below_stays_as_it_is():
    document = yaml12.read(FILE, "run.yaml")
    overrides.apply(document, ["method.name=dense", "train.epochs=1"])
    assert document == yaml12.read(FILE, "run.yaml")


def test_keys_of_overrides_are_never_dropped():
    assert "method.delay is not a key of method with name: dense" in refusal("method.delay=3", "method.name=dense")


def test_a_name_that_is_overridden_in_turn_drops_nothing():
    assert parse("method.name=dense", "method.name=oialr") == parse()


def test_a_misspelt_name_drops_nothing_and_is_refused_alone():
    assert "\n" not in refusal("method.name=dens")


@pytest.mark.parametrize("text", ["", "train.seed", "=3", "a..b=3", ".a=3", "a.=3", ".".join("a" * 40) + "=1"])
def test_what_is_no_override_is_refused(text):
    assert refusal(text) == f"override {text!r} must have the form section.key=value, such as optimizer.lr=1e-3"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.seed=[", "override 'train.seed=[' line 1 column 2: cannot be read as YAML"),
        ("trian.epochs=3", "override 'trian.epochs=3': trian is not a key of the run file (did you mean train?)"),
        ("data.path.x=3", "override 'data.path.x=3': data.path must be the path of a file"),
        ("model.args.x=3", "override 'model.args.x=3': model.args is not a key of model with name: vit"),
        ("data=5", "override 'data=5': data must be a section with path, batch_size, found 5"),
        ("data={path: x}", "override 'data={path: x}': data.batch_size is missing"),
        (
            "method.cutoff={rule: energy, share: 9}",
            "override 'method.cutoff={rule: energy, share: 9}': method.cutoff.share must be a number > 0 and <= 1",
        ),
    ],
)
def test_faults_of_an_override_name_it(override, message):
    assert refusal(override).startswith(message)
