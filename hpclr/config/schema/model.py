"""`model`: what is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from hpclr.config.schema.types import BelowOne, Count, FactoryName, FilePath, NonNegative, Positive, Section, doc

Weights = Annotated[
    FilePath | None,
    doc("File of weights to start from: safetensors, a state dict of torch.save, or HDF5 of hpclr; null: random ones."),
]
WeightsExcept = Annotated[
    tuple[str, ...], doc("Patterns of state-dict names that `weights` leaves as they are, such as another head.")
]


Samples = Annotated[Count, doc("How many samples to look at, in the order of the first epoch; at most all.")]


class SvdInit(Section, kw_only=True, frozen=True):
    """Start as the best linear map of a sample of the training data, or from the best factors for it."""

    name: Annotated[Literal["svd"], doc("This kind of start.")] = "svd"
    samples: Samples = 10000
    ridge: Annotated[NonNegative, doc("Ridge of the regression, as a share of the mean variance of the inputs.")] = 1e-3
    scale: Annotated[
        Positive, doc("c, for tanh: the values it is given have a standard deviation of at most 1/c at the start.")
    ] = 3.0


class FactorsInit(Section, kw_only=True, frozen=True):
    """Start from the best factors for a sample of the training data."""

    name: Annotated[Literal["svd"], doc("This kind of start.")] = "svd"
    samples: Samples = 10000


Init = Annotated[
    Literal["svd"] | FactorsInit | None,
    doc("`svd`: factors of a fixed rank start as the best for a sample of the data; null: as the method says."),
]


class Mlp(Section, kw_only=True, frozen=True):
    """A multilayer perceptron on the flattened sample."""

    name: Annotated[Literal["mlp"], doc("This kind of model.")] = "mlp"
    hidden: Annotated[tuple[Count, ...], doc("Width of each hidden layer.")] = (256, 256)
    activation: Annotated[Literal["relu", "gelu", "tanh"], doc("Between the layers.")] = "relu"
    dropout: Annotated[BelowOne, doc("Probability of dropping a hidden activation.")] = 0.0
    init: Annotated[
        Literal["svd"] | SvdInit | None,
        doc("`svd`: start from a sample of the data (docs/informed-starts.md); null: as torch and the seed say."),
    ] = None
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
    init: Init = None
    weights: Weights = None
    weights_except: WeightsExcept = ()


class Vgg(Section, kw_only=True, frozen=True):
    """VGG-16 with batch normalisation, in the form used for CIFAR."""

    name: Annotated[Literal["vgg16"], doc("This kind of model.")] = "vgg16"
    width: Annotated[Positive, doc("Factor on the number of channels of every layer.")] = 1.0
    dropout: Annotated[BelowOne, doc("Probability of dropping an activation before the head.")] = 0.0
    init: Init = None
    weights: Weights = None
    weights_except: WeightsExcept = ()


class Resnet(Section, kw_only=True, frozen=True):
    """A residual network in the form used for CIFAR, of the depth in its name."""

    name: Annotated[Literal["resnet20", "resnet32", "resnet44", "resnet56", "resnet110"], doc("This kind of model.")]
    width: Annotated[Count, doc("Channels of the first stage; the next have 2 and 4 times as many.")] = 16
    init: Init = None
    weights: Weights = None
    weights_except: WeightsExcept = ()


class Patchtst(Section, kw_only=True, frozen=True):
    """PatchTST, a transformer that forecasts each column of a time series by itself; needs the extra `zoo`."""

    name: Annotated[Literal["patchtst"], doc("This kind of model.")] = "patchtst"
    patch: Annotated[Count, doc("Rows in a patch; fewer than `data.context`.")] = 16
    patch_stride: Annotated[Count, doc("Rows from the beginning of a patch to that of the next; at most `patch`.")] = 8
    dim: Annotated[Count, doc("Width of the embedding; a multiple of `heads`.")] = 64
    depth: Annotated[Count, doc("Number of transformer blocks.")] = 3
    heads: Annotated[Count, doc("Attention heads in each block.")] = 4
    ffn: Annotated[Count, doc("Hidden width of a block's MLP.")] = 128
    norm: Annotated[
        Literal["batch", "layer"], doc("Normalisation: over all patches of a batch, or of each by itself.")
    ] = "batch"
    dropout: Annotated[BelowOne, doc("Probability of dropping an activation.")] = 0.1
    init: Init = None
    weights: Weights = None
    weights_except: WeightsExcept = ()


class Gpt2(Section, kw_only=True, frozen=True):
    """GPT-2, which predicts the next token of a text; needs the extra `zoo`."""

    name: Annotated[Literal["gpt2"], doc("This kind of model.")] = "gpt2"
    dim: Annotated[Count, doc("Width of the embedding; a multiple of `heads`.")] = 128
    depth: Annotated[Count, doc("Number of transformer blocks.")] = 4
    heads: Annotated[Count, doc("Attention heads in each block.")] = 4
    dropout: Annotated[BelowOne, doc("Probability of dropping an activation.")] = 0.0
    init: Init = None
    weights: Weights = None
    weights_except: WeightsExcept = ()


class Target(Section, kw_only=True, frozen=True):
    """Any model that can be imported: `target` is called with `args`."""

    target: Annotated[FactoryName, doc("What to import and call; takes the place of `name`.")]
    args: Annotated[dict[str, Any], doc("Keyword arguments of the call.")] = {}  # noqa: RUF012 - msgspec copies it
    init: Init = None
    weights: Weights = None
    weights_except: WeightsExcept = ()
