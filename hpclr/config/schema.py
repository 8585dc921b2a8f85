"""The run file as types: every key, its type, range, default and meaning.

Errors, overrides and the reference page (`docs/run-file.md`) are all derived from these classes.
A section that comes in kinds (`model`, `schedule`, `method`, `method.cutoff`) is a union of classes;
the first field of such a class is a `Literal` that tells the kinds apart.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0)]
NonNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(gt=0, le=1)]
BelowOne = Annotated[float, Meta(ge=0, lt=1)]
BetweenZeroAndOne = Annotated[float, Meta(gt=0, lt=1)]
Moment = Annotated[
    Annotated[int, Meta(ge=0)] | Annotated[float, Meta(ge=0, lt=1)],
    Meta(title="a whole number of steps >= 0, or a fraction of the run >= 0 and < 1"),
]
Interval = Annotated[
    Annotated[int, Meta(ge=1)] | Annotated[float, Meta(gt=0, lt=1)],
    Meta(title="a whole number of steps >= 1, or a fraction of the run > 0 and < 1"),
]
RunName = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z",
        max_length=128,
        title="a name of at most 128 letters, digits, '.', '_' and '-' that starts with a letter or digit",
    ),
]
FactoryName = Annotated[
    str,
    Meta(
        pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*\Z",
        title="text of the form package.module:factory",
    ),
]
Keep = Annotated[
    int,
    Meta(
        ge=2,
        title="a whole number >= 2 (the newest may be the one being written when the job dies)",
    ),
]
_MOST_THREADS = 1024  # OpenMP ends the process where it cannot have as many as it is told
FilePath = Annotated[str, Meta(min_length=1, title="the path of a file")]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1, title="a whole number >= 0 and < 2^63")]


def doc(text: str) -> Meta:
    """The meaning of a key, as it stands in the reference."""
    return Meta(description=text)


class Section(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A mapping of the run file whose keys are known."""


Weights = Annotated[
    FilePath | None,
    doc("File of weights to start from: safetensors, a state dict of torch.save, or HDF5 of hpclr; null: random ones."),
]
WeightsExcept = Annotated[
    tuple[str, ...], doc("Patterns of state-dict names that `weights` leaves as they are, such as another head.")
]


class Mlp(Section, kw_only=True, frozen=True):
    """A multilayer perceptron on the flattened sample."""

    name: Annotated[Literal["mlp"], doc("This kind of model.")] = "mlp"
    hidden: Annotated[tuple[Count, ...], doc("Width of each hidden layer.")] = (256, 256)
    activation: Annotated[Literal["relu", "gelu", "tanh"], doc("Between the layers.")] = "relu"
    dropout: Annotated[BelowOne, doc("Probability of dropping a hidden activation.")] = 0.0
    weights: Weights = None
    weights_except: WeightsExcept = ()


class Vit(Section, kw_only=True, frozen=True):
    """A vision transformer with pre-normalisation."""

    name: Annotated[Literal["vit"], doc("This kind of model.")] = "vit"
    image: Annotated[Count | None, doc("Side of the square image in pixels; null: as in the data.")] = None
    patch: Annotated[Count, doc("Side of a patch in pixels; divides the image's.")] = 4
    dim: Annotated[Count, doc("Width of the embedding; a multiple of `heads`.")] = 64
    depth: Annotated[Count, doc("Number of transformer blocks.")] = 4
    heads: Annotated[Count, doc("Attention heads in each block.")] = 4
    mlp_ratio: Annotated[Positive, doc("Width of a block's MLP as a multiple of `dim`.")] = 4.0
    dropout: Annotated[BelowOne, doc("Probability of dropping an activation.")] = 0.0
    qkv_bias: Annotated[bool, doc("Whether the query, key and value projection has a bias.")] = True
    pool: Annotated[Literal["mean", "cls"], doc("Mean over the patches, or a class token.")] = "mean"
    weights: Weights = None
    weights_except: WeightsExcept = ()


class Vgg(Section, kw_only=True, frozen=True):
    """VGG-16 with batch normalisation, in the form used for CIFAR."""

    name: Annotated[Literal["vgg16"], doc("This kind of model.")] = "vgg16"
    width: Annotated[Positive, doc("Factor on the number of channels of every layer.")] = 1.0
    dropout: Annotated[BelowOne, doc("Probability of dropping an activation before the head.")] = 0.0
    weights: Weights = None
    weights_except: WeightsExcept = ()


class Resnet(Section, kw_only=True, frozen=True):
    """A residual network in the form used for CIFAR, of the depth in its name."""

    name: Annotated[Literal["resnet20", "resnet32", "resnet44", "resnet56", "resnet110"], doc("This kind of model.")]
    width: Annotated[Count, doc("Channels of the first stage; the next have 2 and 4 times as many.")] = 16
    weights: Weights = None
    weights_except: WeightsExcept = ()


class Target(Section, kw_only=True, frozen=True):
    """Any model that can be imported: `target` is called with `args`."""

    target: Annotated[FactoryName, doc("What to import and call; takes the place of `name`.")]
    args: Annotated[dict[str, Any], doc("Keyword arguments of the call.")] = {}
    weights: Weights = None
    weights_except: WeightsExcept = ()


class Data(Section, kw_only=True, frozen=True):
    """The data set and the batches made of it."""

    path: Annotated[
        FilePath | Annotated[tuple[FilePath, ...], Meta(min_length=1)],
        doc("HDF5 file, as `hpclr data prepare` writes it; or a list of such files, which count as one after another."),
    ]
    batch_size: Annotated[Count, doc("Samples in an optimiser step, over all processes together.")]
    shuffle: Annotated[
        Literal["auto", "samples", "chunks"],
        doc(
            "A new order each epoch: of single samples; or of chunks of the file and of samples within `window` of "
            "them, which reads from disk almost in sequence. auto: chunks for training splits of 1 GiB and more."
        ),
    ] = "auto"
    window: Annotated[Count, doc("Chunks within which samples are mixed, with `shuffle: chunks`.")] = 64
    workers: Annotated[
        Annotated[int, Meta(ge=0, le=256)],
        doc("Processes that read and augment for each training process; 0: it does so itself."),
    ] = 0
    prefetch: Annotated[Count, doc("Batches that the workers prepare ahead.")] = 2
    stage: Annotated[
        FilePath | None,
        doc("Directory on a disk of each node to which the data is copied first; $NAME stands for that variable."),
    ] = None
    flip: Annotated[bool, doc("Mirror training images left to right, each with probability 1/2.")] = False
    crop: Annotated[
        Annotated[int, Meta(ge=0)], doc("Pixels of padding for random crops of training images; 0: none.")
    ] = 0
    mixup: Annotated[NonNegative, doc("Parameter α of mixup's Beta(α, α); 0: no mixup.")] = 0.0
    in_memory: Annotated[
        bool | Literal["auto"], doc("Hold the samples in memory; auto: where they are small enough.")
    ] = "auto"


class Optimizer(Section, kw_only=True, frozen=True):
    """A class of torch.optim and its options; an absent option takes torch's own default."""

    name: Annotated[
        Annotated[str, Meta(min_length=1, title="the name of a class of torch.optim")],
        doc("Class of torch.optim, in its own spelling or in lower case."),
    ] = "adamw"
    lr: Annotated[Positive, doc("Learning rate.")]
    weight_decay: Annotated[NonNegative | None, doc("Weight decay.")] = None
    momentum: Annotated[NonNegative | None, doc("Momentum (SGD, RMSprop).")] = None
    nesterov: Annotated[bool | None, doc("Nesterov's form of momentum (SGD).")] = None
    betas: Annotated[
        tuple[BelowOne, BelowOne] | None, doc("Decay of the two running averages (Adam and its relatives).")
    ] = None
    eps: Annotated[NonNegative | None, doc("Term added to the denominator.")] = None
    args: Annotated[dict[str, Any], doc("Any other keyword argument of the class.")] = {}


Warmup = Annotated[Annotated[int, Meta(ge=0)], doc("Steps over which the learning rate rises linearly to its value.")]


class Constant(Section, kw_only=True, frozen=True):
    """The learning rate stays as it is."""

    name: Annotated[Literal["constant"], doc("This kind of schedule.")] = "constant"
    warmup_steps: Warmup = 0


class Cosine(Section, kw_only=True, frozen=True):
    """The learning rate falls along half a cosine until the last step."""

    name: Annotated[Literal["cosine"], doc("This kind of schedule.")] = "cosine"
    warmup_steps: Warmup = 0
    min_lr: Annotated[NonNegative, doc("Learning rate at the end of the run.")] = 0.0


class Step(Section, kw_only=True, frozen=True):
    """The learning rate is multiplied by `gamma` at every milestone."""

    name: Annotated[Literal["step"], doc("This kind of schedule.")] = "step"
    milestones: Annotated[tuple[Interval, ...], doc("When; in rising order, all steps or all fractions.")]
    gamma: Annotated[Positive, doc("Factor on the learning rate.")] = 0.1
    warmup_steps: Warmup = 0

    def __post_init__(self) -> None:
        kinds = {type(moment) for moment in self.milestones}
        rising = all(a < b for a, b in zip(self.milestones, self.milestones[1:], strict=False))
        if len(kinds) > 1 or not rising:
            raise ValueError(
                "schedule.milestones must rise from one to the next and be either all whole numbers of steps "
                f"or all fractions of the run, found {list(self.milestones)}"
            )


class OneCycle(Section, kw_only=True, frozen=True):
    """The learning rate rises to its maximum and falls to almost nothing (Smith and Topin's one cycle)."""

    name: Annotated[Literal["one_cycle"], doc("This kind of schedule.")] = "one_cycle"
    max_lr: Annotated[Positive | None, doc("Highest learning rate; null: `optimizer.lr`.")] = None
    warmup_fraction: Annotated[BetweenZeroAndOne, doc("Fraction of the run spent rising.")] = 0.3
    final_div: Annotated[Annotated[float, Meta(ge=1)], doc("First learning rate divided by the last.")] = 1e4


class RelativeRule(Section, kw_only=True, frozen=True):
    """Keep the singular values from `cutoff` times the largest up (the paper's rule)."""

    rule: Annotated[Literal["relative"], doc("This rank rule.")] = "relative"
    cutoff: Annotated[BetweenZeroAndOne, doc("Cutoff β, relative to the largest singular value.")]


class EnergyRule(Section, kw_only=True, frozen=True):
    """Keep the fewest singular values whose squares make up `share` of the sum of squares."""

    rule: Annotated[Literal["energy"], doc("This rank rule.")] = "energy"
    share: Annotated[Share, doc("Share of the sum of squares to keep.")]


class SumProportionRule(Section, kw_only=True, frozen=True):
    """Keep the fewest singular values that make up `share` of their sum (SARA)."""

    rule: Annotated[Literal["sum_proportion"], doc("This rank rule.")] = "sum_proportion"
    share: Annotated[Share, doc("Share of the sum to keep.")]


class StableRankRule(Section, kw_only=True, frozen=True):
    """Keep as many as the stable rank ‖W‖²_F / ‖W‖²₂ (Cuttlefish)."""

    rule: Annotated[Literal["stable_rank"], doc("This rank rule.")] = "stable_rank"
    scale: Annotated[Positive, doc("Factor on the stable rank.")] = 1.0


class MarchenkoPasturRule(Section, kw_only=True, frozen=True):
    """Keep what stands out of the spectrum of pure noise (Marchenko and Pastur's edge)."""

    rule: Annotated[Literal["marchenko_pastur"], doc("This rank rule.")] = "marchenko_pastur"
    noise: Annotated[
        Positive | None, doc("Standard deviation of an entry's noise; null: estimated from the spectrum.")
    ] = None


class GavishDonohoRule(Section, kw_only=True, frozen=True):
    """Keep what the optimal hard threshold of Gavish and Donoho keeps."""

    rule: Annotated[Literal["gavish_donoho"], doc("This rank rule.")] = "gavish_donoho"
    noise: Annotated[
        Positive | None, doc("Standard deviation of an entry's noise; null: estimated from the spectrum.")
    ] = None


class Dense(Section, kw_only=True, frozen=True):
    """Ordinary training; every weight stays dense."""

    name: Annotated[Literal["dense"], doc("This method.")] = "dense"


MinRank = Annotated[Annotated[float, Meta(ge=0, le=1)], doc("Lowest rank, as a share of the layer's smaller side.")]
MaxAspect = Annotated[Annotated[float, Meta(gt=1)], doc("Layers at least this many times longer than wide stay dense.")]
KeepFirst = Annotated[bool, doc("Leave the first layer dense.")]
KeepLast = Annotated[bool, doc("Leave the last layer dense.")]
Include = Annotated[tuple[str, ...] | None, doc("Patterns of layer names; only these are converted. null: all.")]
Exclude = Annotated[tuple[str, ...], doc("Patterns of layer names that stay dense.")]


class Oialr(Section, kw_only=True, frozen=True):
    """Orthogonality-Informed Adaptive Low-Rank training (arXiv 2401.08505)."""

    name: Annotated[Literal["oialr"], doc("This method.")] = "oialr"
    delay: Annotated[Moment, doc("When weights become low-rank; with `freeze: stable` the latest moment.")]
    every: Annotated[Interval, doc("Between one check of the ranks and the next.")]
    cutoff: Annotated[
        BetweenZeroAndOne
        | RelativeRule
        | EnergyRule
        | SumProportionRule
        | StableRankRule
        | MarchenkoPasturRule
        | GavishDonohoRule,
        doc("Which singular values stay: those from β times the largest up, or a rank rule."),
    ] = 0.1
    layer_fraction: Annotated[Share, doc("Share of the layers that each check adds to those cut.")] = 0.1
    max_cut: Annotated[Share, doc("Largest share of a layer's rank that one check may cut.")] = 0.5
    min_rank: MinRank = 0.01
    max_aspect: MaxAspect = 10.0
    keep_first: KeepFirst = False
    keep_last: KeepLast = True
    include: Include = None
    exclude: Exclude = ()
    freeze: Annotated[
        Literal["schedule", "stable"], doc("All layers at `delay`, or each when its basis has settled.")
    ] = "schedule"
    stability_threshold: Annotated[Share, doc("Stability from which a basis counts as settled.")] = 0.99
    convert: Annotated[
        Literal["at_delay", "when_it_pays"],
        doc("At once, or each layer only when its factors are no larger and no slower than dense."),
    ] = "at_delay"
    sigma_lr: Annotated[Positive, doc("Factor on the learning rate of Σ.")] = 1.0
    svd: Annotated[
        Literal["rank0", "spread", "heat"],
        doc(
            "Who decomposes the layers at a check: the first process; all of them, each its share; or heat, all of "
            "them together on every layer (approximate, for layers too large for one process)."
        ),
    ] = "rank0"
    heat_rank: Annotated[
        Share, doc("Share of a layer's smaller side that `svd: heat` finds; what is beyond is lost at conversion.")
    ] = 0.5


class SvdTraining(Section, kw_only=True, frozen=True):
    """Every layer as trained factors U, s, V, kept orthonormal and made sparse, then pruned (arXiv 2004.09031)."""

    name: Annotated[Literal["svd_training"], doc("This method.")] = "svd_training"
    sparsity: Annotated[NonNegative, doc("Weight λ_s of the penalty R(s) that makes singular values sparse.")]
    prune_at: Annotated[Interval, doc("When the small singular values are removed; then fine-tuning begins.")]
    energy: Annotated[BelowOne, doc("Share of the sum of squares of its singular values that a layer may lose.")] = 1e-3
    decomposition: Annotated[
        Literal["channel", "spatial"],
        doc("Of convolutions: k×k with r filters and 1×1, or k×1 and 1×k (two-dimensional ones only)."),
    ] = "channel"
    orthogonality: Annotated[NonNegative, doc("Weight λ_o of the penalty that keeps U and V orthonormal.")] = 1.0
    regularizer: Annotated[
        Literal["hoyer", "hoyer_square", "l1", "none"],
        doc("R: Hoyer's ‖s‖₁/‖s‖₂ − 1, the same of squares, ‖s‖₁, or nothing."),
    ] = "hoyer"
    init: Annotated[
        Literal["svd", "random"], doc("Start from the weights' decompositions, or from random orthonormal factors.")
    ] = "svd"
    regularize_at: Annotated[Moment, doc("From when on R counts; before that the factors train without it.")] = 0
    min_rank: MinRank = 0.0
    max_aspect: MaxAspect = 10.0
    keep_first: KeepFirst = False
    keep_last: KeepLast = True
    include: Include = None
    exclude: Exclude = ()


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
        Literal["accuracy", "loss"],
        doc("What makes a model the best so far: the highest accuracy, or the lowest loss."),
    ] = "accuracy"
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


class Slurm(Section, kw_only=True, frozen=True):
    """How a run leaves a job that is about to end."""

    margin: Annotated[
        Positive | None,
        doc(
            "Seconds before the job's time limit in which the run saves and leaves; null: measured, as twice the "
            "longest save, the longest step and a minute."
        ),
    ] = None


class RunFile(Section, kw_only=True, frozen=True):
    """A run file, read and checked."""

    name: Annotated[RunName, doc("Name of the run and of its directory.")]
    model: Annotated[
        Mlp | Vit | Vgg | Resnet | Target,
        doc("What is trained. The shape of a sample and the number of classes come from the data."),
    ]
    data: Annotated[Data, doc("What it is trained on.")]
    optimizer: Annotated[Optimizer, doc("How the weights move.")]
    schedule: Annotated[Constant | Cosine | Step | OneCycle, doc("The learning rate's course.")] = Constant()
    method: Annotated[Dense | Oialr | SvdTraining, doc("Whether and how the weights become low-rank.")] = Dense()
    train: Annotated[Train, doc("How long the run is, and its arithmetic.")]
    validation: Annotated[Validation, doc("When the model is evaluated.")] = Validation()
    checkpoint: Annotated[Checkpoint, doc("When the run is saved.")] = Checkpoint()
    parallel: Annotated[Parallel, doc("How many processes work together.")] = Parallel()
    slurm: Annotated[Slurm, doc("How a run leaves a job that is about to end.")] = Slurm()

    def __post_init__(self) -> None:
        micro, batch = self.train.micro_batch, self.data.batch_size
        if micro is not None and micro > batch:
            raise ValueError(f"train.micro_batch ({micro}) must not exceed data.batch_size ({batch})")
        if self.model.weights_except and self.model.weights is None:
            raise ValueError("model.weights_except says what model.weights leaves as it is, but model.weights is null")
