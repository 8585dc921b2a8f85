"""The run files of jobs/paper: readable, of the right size, and with room for OIALR in their steps."""

import math
from pathlib import Path

import msgspec
import pytest
import torch

from hpclr import models
from hpclr.config import RunFile, dump, load_run_file, parse_run_file
from hpclr.config.schema import Target

DIRECTORY = Path(__file__).parents[2] / "jobs" / "paper"
SAMPLES = {"cifar10": 50_000, "imagenet": 1_281_167}  # of the training splits
EPOCHS_OF_WARMUP = {"minivit-cifar10": 10, "vgg16-cifar10": 17, "vit-b16-imagenet": 17, "resnetrs101-imagenet": 5}
FILES = sorted(DIRECTORY.glob("*.yaml"))


def steps_of_epoch(run: RunFile) -> int:
    return math.ceil(SAMPLES[run.name.rpartition("-")[2]] / run.data.batch_size)


def parameters(file: str, channels: int, pixels: int, classes: int) -> int:
    """The size of a run file's model, built without memory."""
    options = msgspec.structs.asdict(load_run_file(DIRECTORY / file).model)
    for key in ("init", "weights", "weights_except"):
        del options[key]
    with torch.device("meta"):
        samples = models.Samples("classification", (channels, pixels, pixels), (classes,))
        model = models.build(options.pop("name"), samples, **options)
    return sum(parameter.numel() for parameter in model.parameters())


def test_there_is_one_for_each_experiment():
    assert {path.stem for path in FILES} == EPOCHS_OF_WARMUP.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_run_files_can_be_read_as_they_are_and_dense(path):
    run = load_run_file(path)
    assert run.name == path.stem
    assert parse_run_file(dump(run), "dump") == run
    assert load_run_file(path, [f"name={run.name}-dense", "method.name=dense"]).method.name == "dense"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_epochs_in_steps_are_right_and_leave_room_for_checks(path):
    run = load_run_file(path)
    steps = steps_of_epoch(run)
    assert run.schedule.warmup_steps == EPOCHS_OF_WARMUP[run.name] * steps
    assert run.method.delay + 3 * run.method.every < run.train.epochs * steps


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("processes", [1, 2, 4, 8, 16, 32])
def test_usual_numbers_of_processes_share_a_batch(path, processes):
    assert load_run_file(path).data.batch_size % processes == 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_sources_of_the_values_are_named(path):
    text = path.read_text()
    assert "arXiv 2401.08505" in text
    assert "No result of this file is claimed here." in text


def test_the_models_have_their_known_sizes():
    assert parameters("vit-b16-imagenet.yaml", 3, 224, 1000) == 86_567_656
    # 13 convolutions 3×3 with batch normalisation, and a layer 512 → 10
    assert parameters("vgg16-cifar10.yaml", 3, 32, 10) == 14_710_464 + 2 * 4224 + 5130
    # patches 192 → 768, 16 positions, 6 blocks without bias of q, k, v
    block = 4 * 768 * 768 + 768 + 8 * 768 * 768 + 5 * 768 + 4 * 768
    assert parameters("minivit-cifar10.yaml", 3, 32, 10) == 193 * 768 + 16 * 768 + 6 * block + 2 * 768 + 7690


def test_models_that_hpclr_lacks_are_imported():
    model = load_run_file(DIRECTORY / "resnetrs101-imagenet.yaml").model
    assert isinstance(model, Target)
    assert (model.target, model.args["num_classes"]) == ("timm:create_model", 1000)
