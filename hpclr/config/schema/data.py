"""`data`: the data set and the batches made of it."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from hpclr.config.schema.types import Count, FilePath, NonNegative, Section, doc


class Data(Section, kw_only=True, frozen=True):
    """The data set and the batches made of it."""

    path: Annotated[
        FilePath | Annotated[tuple[FilePath, ...], Meta(min_length=1)],
        doc("HDF5 file, as `hpclr data prepare` writes it; or a list of such files, which count as one after another."),
    ]
    batch_size: Annotated[Count, doc("Samples in an optimiser step, over all processes together.")]
    context: Annotated[
        Count | None, doc("Time series and text: rows or tokens that the model sees of a sample; needed there.")
    ] = None
    horizon: Annotated[Count | None, doc("Time series: rows after these that it predicts; needed there.")] = None
    stride: Annotated[
        Count | None,
        doc(
            "Time series and text: rows or tokens from the beginning of one training sample to that of the next; null: "
            "1 of series, `context` of text."
        ),
    ] = None
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
    prefetch: Annotated[Count, doc("Batches that are prepared ahead of training.")] = 2
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
