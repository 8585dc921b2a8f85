"""OIALR under transformers' Trainer: real models, real trainings, real checkpoints."""

import copy
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hpclr import SARA, EDoRA, MoSARA, densify
from hpclr.errors import UsageError
from hpclr.integrations.hugging_face import HuggingFaceCallback
from hpclr.lowrank import load_state_dict

SETTINGS = {"delay": 3, "every": 3, "cutoff": 0.4, "layer_fraction": 0.5}
STEPS = 12


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        draw = torch.Generator().manual_seed(index)
        return {"input_ids": torch.randint(50, (10,), generator=draw), "labels": index % 2}


def make_model():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=10, num_labels=2,
    )  # fmt: skip
    return BertForSequenceClassification(config)  # has dropout: random states count too


def make_trainer(out, *callbacks, model=None, eval_dataset=None, **arguments):
    defaults = {
        "output_dir": str(out / "checkpoints"), "max_steps": STEPS, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "learning_rate": 5e-3, "max_grad_norm": 0.5, "lr_scheduler_type": "cosine",
        "save_steps": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    args = TrainingArguments(**(defaults | arguments))
    data = {"train_dataset": Sentences(), "eval_dataset": eval_dataset}
    return Trainer(model or make_model(), args, callbacks=list(callbacks), **data)


@pytest.fixture(scope="module")
def trained(one_thread, tmp_path_factory):
    """A training to its end, and its checkpoints, one every two steps."""
    callback = HuggingFaceCallback(**SETTINGS)
    trainer = make_trainer(tmp_path_factory.mktemp("trained"), callback)
    trainer.train()
    return trainer, callback


def checkpoint_of(trainer, step):
    return f"{trainer.args.output_dir}/checkpoint-{step}"


def test_steps_are_those_of_the_optimiser_and_ranks_shrink(trained):
    _, callback = trained
    assert callback.method.steps == STEPS
    assert callback.method.checks == 4
    assert all(callback.method.frozen.values())
    assert any(rank < 32 for rank in callback.method.ranks.values())


@pytest.mark.parametrize("step", [2, 8], ids=["before the conversion", "between cuts"])
def test_a_resumed_training_equals_an_uninterrupted_one_to_the_bit(trained, out, step):
    trainer, callback = trained
    resumed = HuggingFaceCallback(**SETTINGS)
    other = make_trainer(out, resumed, save_strategy="no")
    other.train(resume_from_checkpoint=checkpoint_of(trainer, step))
    assert resumed.method.ranks == callback.method.ranks
    assert resumed.method.stability == callback.method.stability
    assert_same(trainer.model.state_dict(), other.model.state_dict())
    assert_same(moments_of(trainer), moments_of(other))
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (trainer, other)]
    assert losses[0] == losses[1]


def moments_of(trainer):
    state = trainer.optimizer.state_dict()["state"]
    return {f"{place}.{name}": value for place, values in state.items() for name, value in values.items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.mark.parametrize(
    "adapt",
    [lambda m: SARA(m, proportion=0.1), lambda m: MoSARA(m, proportion=0.3), lambda m: EDoRA(m, rank=4)],
    ids=["sara", "mo_sara", "edora"],
)
def test_adapters_need_no_callback_to_be_resumed_to_the_bit(out, adapt):
    trainers = []
    for resume in (None, 4):
        model = make_model()
        adapt(model)
        trainer = make_trainer(out, model=model, save_steps=4, max_steps=6)
        trainer.train(resume_from_checkpoint=resume and checkpoint_of(trainers[0], resume))
        trainers.append(trainer)
    first, second = trainers
    assert_same(first.model.state_dict(), second.model.state_dict())
    assert_same(moments_of(first), moments_of(second))
    query, plain = "bert.encoder.layer.0.attention.self.query.weight", make_model().state_dict()
    state = second.model.state_dict()
    assert torch.equal(state[query], plain[query])
    assert not torch.equal(state["classifier.weight"], plain["classifier.weight"])


def test_settings_that_oialr_has_not():
    with pytest.raises(UsageError, match="takes no tied=True: the Trainer's checkpoints cannot hold factors"):
        HuggingFaceCallback(delay=1, every=1, tied=True)
    with pytest.raises(UsageError, match=r"found method, proportion\. Adapters need no callback"):
        HuggingFaceCallback(method=SARA, proportion=0.1)


def test_sizes_and_ranks_are_logged_and_reach_callbacks_that_come_after(out):
    heard = []

    class Logger(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **about):
            heard.append(dict(logs))

    callback = HuggingFaceCallback(**SETTINGS)
    trainer = make_trainer(out, callback, Logger(), save_strategy="no")
    trainer.train()
    assert heard[0]["lowrank/rank_share"] == 1.0
    assert heard[-1]["lowrank/rank_share"] < 1.0
    assert heard[-1]["lowrank/stored_parameters"] == sum(p.numel() for p in trainer.model.parameters())
    with_ranks = [entry for entry in trainer.state.log_history if any("lowrank/rank/" in key for key in entry)]
    assert [entry["step"] for entry in with_ranks] == [1, 3, 6, 9, 12]
    last = {name: with_ranks[-1][f"lowrank/rank/{name}"] for name in callback.method.ranks}
    assert last == callback.method.ranks


def test_what_is_saved_at_the_end_can_be_dense(out):
    callback = HuggingFaceCallback(dense_at_end=True, delay=0.5, every=0.25, cutoff=0.4)
    trainer = make_trainer(out, callback, save_strategy="no")
    trainer.train()
    assert callback.method.delay == STEPS // 2
    trainer.save_model(str(out / "final"))
    loaded, report = BertForSequenceClassification.from_pretrained(out / "final", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_same(trainer.model.state_dict(), loaded.state_dict())


def test_a_checkpoint_holds_factors_which_hpclr_loads(trained, out):
    from safetensors.torch import load_file

    trainer, _ = trained
    state = load_file(f"{checkpoint_of(trainer, STEPS)}/model.safetensors")
    assert "bert.encoder.layer.0.attention.self.query.sigma" in state
    fresh = make_trainer(out, HuggingFaceCallback(**SETTINGS)).model  # which waits for weights of Trainer's
    load_state_dict(fresh, state)
    assert_same(trainer.model.state_dict(), fresh.state_dict())
    dense = densify(copy.deepcopy(trainer.model))
    dense.save_pretrained(out / "dense")
    again = BertForSequenceClassification.from_pretrained(out / "dense")
    assert_same(dense.state_dict(), again.state_dict())


def test_factors_can_be_loaded_and_evaluated_without_training(trained, out):
    from safetensors.torch import load_file

    trainer, _ = trained
    state = load_file(f"{checkpoint_of(trainer, STEPS)}/model.safetensors")
    wanted = trainer.predict(Sentences())
    fresh = make_trainer(out, HuggingFaceCallback(**SETTINGS))
    fresh.model.load_state_dict(state)
    assert fresh.evaluate(Sentences())["eval_loss"] == wanted.metrics["test_loss"]
    other = make_trainer(out, HuggingFaceCallback(**SETTINGS))
    other.model.load_state_dict(state)
    assert (other.predict(Sentences()).predictions == wanted.predictions).all()
    assert_same(other.model.state_dict(), trainer.model.state_dict())
    with pytest.raises(UsageError, match="has been evaluated"):
        other.train(resume_from_checkpoint=checkpoint_of(trainer, 8))


def test_factors_that_no_training_would_take_are_not_passed_over(trained, out):
    from safetensors.torch import load_file

    fresh = make_trainer(out, HuggingFaceCallback(**SETTINGS))
    fresh.model.load_state_dict(load_file(f"{checkpoint_of(trained[0], STEPS)}/model.safetensors"))
    with pytest.raises(UsageError, match="factored weights wait"):
        fresh.train()


def test_the_newest_checkpoint_is_resumed_from(out):
    arguments = {"save_steps": 8, "save_total_limit": 1}
    whole = make_trainer(out, HuggingFaceCallback(**SETTINGS), **arguments)
    whole.train()
    (out / "checkpoints" / "checkpoint-12").rename(out / "last")
    first = make_trainer(out, HuggingFaceCallback(**SETTINGS), **arguments, output_dir=str(out / "again"))
    first.add_callback(StopAt(8))
    first.train()
    resumed = make_trainer(out, HuggingFaceCallback(**SETTINGS), **arguments, output_dir=str(out / "again"))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS
    assert_same(whole.model.state_dict(), resumed.model.state_dict())


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **about):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize(
    "arguments", [{"bf16": True}, {"gradient_checkpointing": True}], ids=lambda found: next(iter(found))
)
def test_options_of_the_trainer_go_with_it(out, arguments):
    callback = HuggingFaceCallback(**SETTINGS)
    trainer = make_trainer(out, callback, save_steps=8, **arguments)
    trainer.train()
    resumed = make_trainer(out / "other", HuggingFaceCallback(**SETTINGS), **arguments)
    resumed.train(resume_from_checkpoint=checkpoint_of(trainer, 8))
    assert any(rank < 32 for rank in callback.method.ranks.values())
    assert_same(trainer.model.state_dict(), resumed.model.state_dict())


def test_ranks_reach_tensorboard_that_comes_after(out):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers.integrations import TensorBoardCallback

    board = TensorBoardCallback()
    make_trainer(out, HuggingFaceCallback(**SETTINGS), board, save_strategy="no").train()
    found = EventAccumulator(board.logging_dir)
    found.Reload()
    assert any("lowrank/rank/" in tag for tag in found.Tags()["scalars"])


@pytest.mark.parametrize("best", [2, 6])
def test_the_best_model_comes_back_with_its_own_ranks(out, best):
    trainer = make_trainer(
        out, HuggingFaceCallback(**SETTINGS), load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
        metric_for_best_model="closeness", greater_is_better=True, eval_dataset=Sentences(),
    )  # fmt: skip
    trainer.compute_metrics = lambda prediction: {"closeness": -abs(trainer.state.global_step - best)}
    trainer.train()
    assert trainer.state.best_global_step == best
    from safetensors.torch import load_file

    saved, dense = load_file(out / "checkpoints" / f"checkpoint-{best}" / "model.safetensors"), make_model()
    load_state_dict(dense, saved)
    tokens = torch.arange(10)[None]
    assert torch.allclose(dense.eval()(tokens).logits, trainer.model.eval()(tokens).logits, atol=1e-6)
    if best > SETTINGS["delay"]:
        assert_same(saved, trainer.model.state_dict())
    trainer.save_model(str(out / "best"))
    again = make_model()
    load_state_dict(again, load_file(out / "best" / "model.safetensors"))
    assert_same(again.state_dict(), trainer.model.state_dict())


def test_what_cannot_be_resumed_is_refused(trained, out):
    last = checkpoint_of(trained[0], 8)
    again = make_trainer(out, HuggingFaceCallback(**SETTINGS), save_strategy="no", max_steps=2)
    again.train()
    with pytest.raises(UsageError, match="has trained already"):
        again.train(resume_from_checkpoint=last)
    late = make_trainer(out, TrainerCallback())
    late.add_callback(HuggingFaceCallback(**SETTINGS))
    with pytest.raises(UsageError, match="nor be added to a Trainer"):
        late.train(resume_from_checkpoint=last)
    plain = make_trainer(out, TrainerCallback(), output_dir=str(out / "plain"), max_steps=1, save_steps=1)
    plain.train()
    with pytest.raises(UsageError, match="without the state of OIALR"):
        make_trainer(out, HuggingFaceCallback(**SETTINGS)).train(str(out / "plain" / "checkpoint-1"))


@pytest.mark.slow
def test_several_processes_are_refused_before_anything_is_trained(out):
    program = """
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from hpclr.integrations.hugging_face import HuggingFaceCallback
config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
callback = HuggingFaceCallback(delay=1, every=1)
Trainer(BertForSequenceClassification(config), TrainingArguments("x", use_cpu=True), callbacks=[callback])
"""
    (out / "program.py").write_text(program)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "program.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=150, check=False, env=environment)
    assert done.returncode != 0
    assert "trains on one device in one process, found 2 processes" in done.stderr


def test_several_devices_are_refused_when_the_trainer_is_made(out):
    args = TrainingArguments(str(out), report_to="none", use_cpu=True)
    args._n_gpu = 2
    with pytest.raises(UsageError, match="trains on one device in one process, found 1 processes with 2 GPUs"):
        Trainer(make_model(), args, callbacks=[HuggingFaceCallback(**SETTINGS)])
