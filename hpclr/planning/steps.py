"""What a step of data-parallel training takes on a cluster: a model with few parameters, each of them stated.

time    = operations / rate + activations moved / memory bandwidth + optimiser + what of the all-reduce is not hidden
bytes   = those of the gradients of all that is trained
memory  = weights + gradients + AdamW's two moments + what the forward pass keeps for the backward pass
"""

from dataclasses import dataclass
from math import ceil, log2

BUCKET = 25 << 20  # bytes of a message of DistributedDataParallel
ADAMW_PASSES = 7  # it reads weight, gradient and two moments, and writes the weight and the moments
MOMENTS = 2


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs, as their makers and owners describe them.

    Attributes:
        what: a line for the heading, with the sources.
        gpus: of a node.
        flops: operations a second of a GPU.
        memory: bytes a second of its memory.
        inside: bytes a second that a GPU sends to others of its node, one way.
        between: bytes a second that a GPU sends to other nodes, one way.
        hop_inside, hop_between: seconds until a message arrives.
        queues: whether the host only puts operations into a queue, and goes on while the device works.
    """

    what: str
    gpus: int
    flops: float
    memory: float
    inside: float
    between: float
    hop_inside: float = 3e-6
    hop_between: float = 5e-6
    queues: bool = True


@dataclass(frozen=True)
class Reached:
    """What share of a cluster's figures programs get.

    Attributes:
        flops: of the operations a second, in products of large matrices.
        bandwidth: of the bandwidths.
        overlap: of the backward pass, that communication hides behind.
        passes: how often activations go through memory: written and read in the forward pass, read in the backward
            pass, and their gradients, of which half are summed up where they come into being.
        call: seconds that the host takes to call an operation of torch's.
    """

    flops: float = 0.6
    bandwidth: float = 0.8
    overlap: float = 0.8
    passes: float = 4.0
    call: float = 0.0


@dataclass(frozen=True)
class Work:
    """What a process has to do in a step.

    Attributes:
        flops: operations of forward and backward pass.
        forward: those of the forward pass.
        trained: numbers that are trained.
        stored: numbers that are held, frozen factors included.
        gradient_bytes: what is reduced.
        saved_bytes: what the forward pass keeps.
        moved_bytes: what it would keep if all weights were dense: layers with factors write and read it all the same.
        calls: how many operations of torch's are called in a step.
    """

    flops: float
    forward: float
    trained: float
    stored: float
    gradient_bytes: float
    saved_bytes: float
    moved_bytes: float
    calls: float = 0.0


def all_reduce_seconds(size: float, gpus: int, cluster: Cluster, bandwidth: float = 1.0) -> float:
    """A sum over all GPUs of so many bytes, first within nodes, then of a part each between them, and back.

    Each level takes 2(n − 1)/n of its bytes, as a ring does, and 2⌈log₂ n⌉ hops a message (Thakur, Rabenseifner and
    Gropp, "Optimization of Collective Communication Operations in MPICH", 2005; NCCL's trees need no more).
    """
    local = min(gpus, cluster.gpus)
    nodes = ceil(gpus / local)
    messages = max(1, ceil(size / BUCKET))
    inside = _level(size, local, cluster.inside * bandwidth, messages * cluster.hop_inside)
    return inside + _level(size / local, nodes, cluster.between * bandwidth, messages * cluster.hop_between)


def _level(size: float, members: int, bytes_per_second: float, hop: float) -> float:
    if members == 1:
        return 0.0
    return 2 * (members - 1) / members * size / bytes_per_second + 2 * ceil(log2(members)) * hop


def exposed_seconds(size: float, gpus: int, cluster: Cluster, reached: Reached, backward: float) -> float:
    """What of the all-reduce of so many bytes a step waits for.

    Args:
        size: bytes of gradients.
        gpus: how many take part.
        cluster: where.
        reached: which share of its bandwidths, and of the backward pass, serves it.
        backward: seconds of the backward pass.
    """
    if gpus == 1:
        return 0.0
    everything = all_reduce_seconds(size, gpus, cluster, reached.bandwidth)
    last = all_reduce_seconds(min(size, BUCKET), gpus, cluster, reached.bandwidth)  # its gradients come last
    return max(everything - reached.overlap * backward, min(last, everything) if reached.overlap else everything)


@dataclass(frozen=True)
class Step:
    """What a step takes: seconds of each part; bytes that a GPU holds.

    `calling` is what the device waits for the host.
    """

    products: float
    elementwise: float
    optimizer: float
    exposed: float
    memory: float
    calling: float = 0.0

    @property
    def seconds(self) -> float:
        """From one step to the next."""
        return self.products + self.elementwise + self.optimizer + self.exposed + self.calling


def step(work: Work, gpus: int, cluster: Cluster, reached: Reached) -> Step:
    """A step of one of so many GPUs."""
    rate, memory = cluster.flops * reached.flops, cluster.memory * reached.bandwidth
    products, elementwise = work.flops / rate, reached.passes * work.moved_bytes / memory
    backward = (work.flops - work.forward) / rate + elementwise / 2
    calling = work.calls * reached.call
    return Step(
        products=products,
        elementwise=elementwise,
        optimizer=ADAMW_PASSES * 4 * work.trained / memory,
        exposed=exposed_seconds(work.gradient_bytes, gpus, cluster, reached, backward),
        memory=4 * (work.stored + MOMENTS * work.trained) + work.gradient_bytes + work.saved_bytes,
        calling=max(0.0, calling - products - elementwise) if cluster.queues else calling,
    )
