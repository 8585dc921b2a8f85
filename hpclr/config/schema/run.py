"""The run file as a whole, and its sections on the run itself: length, validation, checkpoints, processes, job."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from hpclr.config.schema.adapters import Edora, Lora, MoSara, Sara
from hpclr.config.schema.data import Data
from hpclr.config.schema.method import Cuttlefish, Dense, FixedRank, Nested, Oialr, SvdTraining, Truncate
from hpclr.config.schema.model import Gpt2, Mlp, Patchtst, Resnet, Target, Vgg, Vit
from hpclr.config.schema.optimization import Constant, Cosine, OneCycle, Optimizer, Step
from hpclr.config.schema.types import (
    BelowOne,
    BetweenZeroAndOne,
    Count,
    Keep,
    Positive,
    RunName,
    Section,
    Seed,
    doc,
)

_MOST_THREADS = 1024  # OpenMP ends the process where it cannot have as many as it is told


class Train(Section, kw_only=True, frozen=True):
    """How long, and in which arithmetic."""

    epochs: Annotated[Count | None, doc("Passes over the training split; or give `steps`.")] = None
    steps: Annotated[Count | None, doc("Optimiser steps; or give `epochs`.")] = None
    seed: Annotated[Seed, doc("Of the initial weights, the order of samples and the augmentation.")] = 0
    precision: Annotated[
        Literal["float32", "float64", "bf16", "fp16"], doc("bf16 and fp16 are autocast over float32 weights.")
    ] = "float32"
    device: Annotated[Literal["auto", "cpu", "cuda"], doc("auto: CUDA where there is one.")] = "auto"
    threads: Annotated[
        Literal["auto"] | Count, doc("CPU threads of a process, at most 1024; auto: the cores it may use.")
    ] = "auto"
    micro_batch: Annotated[
        Count | None, doc("Samples in a forward; gradients accumulate over a batch. null: all at once.")
    ] = None
    clip_norm: Annotated[Positive | None, doc("Largest norm of the whole gradient; null: any.")] = None
    label_smoothing: Annotated[BelowOne, doc("Share of the label spread over all classes.")] = 0.0
    ema: Annotated[BetweenZeroAndOne | None, doc("Decay of the moving average of the weights; null: none is kept.")] = (
        None
    )

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            found = "neither" if self.epochs is None else f"epochs: {self.epochs} and steps: {self.steps}"
            raise ValueError(f"train must have exactly one of epochs and steps, found {found}")
        if isinstance(self.threads, int) and self.threads > _MOST_THREADS:
            raise ValueError(
                f"train.threads must be auto or a whole number from 1 to {_MOST_THREADS}, found {self.threads}"
            )


class Validation(Section, kw_only=True, frozen=True):
    """How often the validation split is evaluated; once an epoch where nothing is said."""

    every_epochs: Annotated[Positive | None, doc("Epochs or parts of one; or give `every_steps`.")] = None
    every_steps: Annotated[Count | None, doc("Optimiser steps; or give `every_epochs`.")] = None
    metric: Annotated[
        Literal["auto", "accuracy", "loss", "mse", "mae", "perplexity"],
        doc(
            "What makes a model the best so far: the highest accuracy, or the lowest of another metric of the task; "
            "auto: accuracy of classes, else the loss."
        ),
    ] = "auto"
    patience: Annotated[Count | None, doc("Stop after this many validations without improvement; null: never.")] = None

    def __post_init__(self) -> None:
        if self.every_epochs is not None and self.every_steps is not None:
            raise ValueError(
                "validation must have at most one of every_epochs and every_steps, "
                f"found every_epochs: {self.every_epochs} and every_steps: {self.every_steps}"
            )


class Checkpoint(Section, kw_only=True, frozen=True):
    """How often the run is saved and how much of that is kept."""

    every: Annotated[Count | None, doc("Optimiser steps from one checkpoint to the next; null: by the clock only.")] = (
        200
    )
    minutes: Annotated[Positive | None, doc("Minutes from one checkpoint to the next; null: by steps only.")] = None
    keep: Annotated[Keep, doc("Newest checkpoints that are kept.")] = 3
    keep_best: Annotated[bool, doc("Keep the checkpoint with the best `validation.metric` as well.")] = True
    background: Annotated[
        bool, doc("Write checkpoints while training goes on, from a copy in memory; false: training waits.")
    ] = True

    def __post_init__(self) -> None:
        if self.every is None and self.minutes is None:
            raise ValueError(
                "checkpoint must have at least one of every and minutes, found both null: "
                "without checkpoints a run that ends early is lost"
            )


class Parallel(Section, kw_only=True, frozen=True):
    """How the processes of a job find one another and look after one another."""

    timeout: Annotated[Positive, doc("Seconds after which a process that does not answer ends the job.")] = 600.0
    launcher: Annotated[
        Literal["auto", "torchrun", "mpi", "slurm", "single"],
        doc("Whose word counts for the number of processes; auto: whoever started them, if all agree."),
    ] = "auto"
    backend: Annotated[Literal["auto", "gloo", "nccl"], doc("auto: NCCL on CUDA devices, else gloo.")] = "auto"
    interface: Annotated[
        Annotated[str, Meta(pattern=r"^[\w.:-]+\Z", title="the name of a network interface")] | None,
        doc("Network interface of the processes, such as ib0; null: the one that reaches the first process."),
    ] = None
    host_suffix: Annotated[
        Annotated[str, Meta(pattern=r"^[\w.-]*\Z", title="what is added to a host name")],
        doc("What turns a node's name into that of its fast network, such as i or -ib."),
    ] = ""
    verify_every: Annotated[
        Count | None, doc("Steps between comparisons of all parameters over all processes; null: never.")
    ] = 1000
    sync_batchnorm: Annotated[bool, doc("Batch statistics over all processes; on CUDA devices only.")] = False
    unused_parameters: Annotated[bool, doc("Look in every step for parameters that the loss does not need.")] = False
    shard: Annotated[
        bool,
        doc(
            "Each process holds its share of the weights and of the optimiser's state, for models that do not fit one "
            "device; with the methods dense and oialr."
        ),
    ] = False


class Slurm(Section, kw_only=True, frozen=True):
    """How a run leaves a job that is about to end."""

    margin: Annotated[
        Positive | None,
        doc(
            "Seconds before the job's time limit in which the run saves and leaves; null: measured, as twice the "
            "longest save, the longest step and a minute."
        ),
    ] = None


class Mlflow(Section, kw_only=True, frozen=True):
    """Where an MLflow server is told of the run."""

    uri: Annotated[
        Annotated[str, Meta(min_length=1, title="an MLflow tracking URI")] | None,
        doc("Of the server, such as https://mlflow.example.org; null: what MLFLOW_TRACKING_URI says."),
    ] = None
    experiment: Annotated[
        Annotated[str, Meta(min_length=1, title="the name of an experiment")],
        doc("In which the run appears; it is made if it is not there."),
    ] = "hpclr"


class Track(Section, kw_only=True, frozen=True):
    """Which programs show the run while it trains."""

    tensorboard: Annotated[
        bool, doc("Write TensorBoard event files into the run directory, with `hpclr[track]` installed.")
    ] = False
    mlflow: Annotated[Mlflow | None, doc("Tell MLflow, with `hpclr[mlflow]` installed; null: no.")] = None


class RunFile(Section, kw_only=True, frozen=True):
    """A run file, read and checked."""

    name: Annotated[RunName, doc("Name of the run and of its directory.")]
    model: Annotated[
        Mlp | Vit | Vgg | Resnet | Patchtst | Gpt2 | Target,
        doc("What is trained. The shapes of what it takes and gives come from the data."),
    ]
    data: Annotated[Data, doc("What it is trained on.")]
    optimizer: Annotated[Optimizer, doc("How the weights move.")]
    schedule: Annotated[Constant | Cosine | Step | OneCycle, doc("The learning rate's course.")] = Constant()
    method: Annotated[
        Dense | Oialr | SvdTraining | Truncate | FixedRank | Cuttlefish | Nested | Sara | MoSara | Edora | Lora,
        doc("Whether and how the weights become low-rank."),
    ] = Dense()
    train: Annotated[Train, doc("How long the run is, and its arithmetic.")]
    validation: Annotated[Validation, doc("When the model is evaluated.")] = Validation()
    checkpoint: Annotated[Checkpoint, doc("When the run is saved.")] = Checkpoint()
    parallel: Annotated[Parallel, doc("How many processes work together.")] = Parallel()
    slurm: Annotated[Slurm, doc("How a run leaves a job that is about to end.")] = Slurm()
    track: Annotated[Track | None, doc("Which programs show the run while it trains; null: none.")] = Track()

    def __post_init__(self) -> None:
        micro, batch = self.train.micro_batch, self.data.batch_size
        if micro is not None and micro > batch:
            raise ValueError(f"train.micro_batch ({micro}) must not exceed data.batch_size ({batch})")
        if self.model.weights_except and self.model.weights is None:
            raise ValueError("model.weights_except says what model.weights leaves as it is, but model.weights is null")
        if self.parallel.shard:
            self._check_sharding()

    def _check_sharding(self) -> None:
        """What does not work where each process holds but a share of the weights."""
        oialr = self.method if isinstance(self.method, Oialr) else None
        for unfit, found, instead in (
            (not isinstance(self.method, Dense | Oialr), f"method.name: {self.method.name}", "oialr or dense"),
            (oialr and oialr.svd == "heat", "method.svd: heat", "spread or rank0"),
            (oialr and oialr.auto, "method.auto: true, which judges by outputs", "false, with a cutoff"),
            (oialr and oialr.order == "output", "method.order: output", "size"),
            (oialr and oialr.tied, "method.tied: true", "false"),
            (self.train.ema is not None, f"train.ema: {self.train.ema}", "null"),
            (self.train.precision == "fp16", "train.precision: fp16", "bf16 or float32"),
            (self.optimizer.name.lower().startswith("galore"), f"optimizer.name: {self.optimizer.name}", "adamw"),
            (self.optimizer.name.lower() == "adafactor", f"optimizer.name: {self.optimizer.name}", "adamw"),
            (self.parallel.unused_parameters, "parallel.unused_parameters: true", "false"),
            (self.parallel.sync_batchnorm, "parallel.sync_batchnorm: true", "false"),
        ):
            if unfit:
                raise ValueError(
                    f"parallel.shard has each process hold a share of the weights, which does not go with {found}; use "
                    f"{instead}, or set parallel.shard to false"
                )
