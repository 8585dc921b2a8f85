"""Devices as their makers describe them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from hpclr.errors import UsageError
from hpclr.planning.steps import Cluster


@dataclass(frozen=True)
class Hardware:
    """A node of equal devices, with a process for each.

    Attributes:
        what: the device in words.
        per_node: devices of a node.
        float64, float32, half: operations a second in products of matrices; `half` of bf16 and fp16.
        memory: bytes of a device.
        bandwidth: bytes a second of that memory.
        inside: bytes a second that a device sends to others of its node, one way.
        between: bytes a second that it sends to other nodes, one way.
        watts: the most that a device is made to draw.
        queues: whether operations are queued, as on GPUs.
    """

    what: str
    per_node: int
    float64: float
    float32: float
    half: float
    memory: float
    bandwidth: float
    inside: float
    between: float
    watts: float
    queues: bool = True

    def cluster(self, precision: str) -> Cluster:
        """Such nodes, for the arithmetic of a run file's `train.precision`."""
        flops = {"float64": self.float64, "float32": self.float32}.get(precision, self.half)
        hop = {} if self.queues else {"hop_inside": 2e-5, "hop_between": 3e-5}  # gloo's, over sockets
        return Cluster(
            self.what,
            self.per_node,
            flops,
            self.bandwidth,
            self.inside,
            self.between,
            queues=self.queues,
            **hop,
        )


# Operations are dense ones, at half of what the sheets of NVIDIA print for sparse matrices; `float32` is without TF32,
# as torch multiplies matrices unless told otherwise; of the bandwidths of links, which are given for both directions
# together, it is half.
TABLE = {
    # NVIDIA H200 Tensor Core GPU, data sheet: the H100's cores with 141 GB of HBM3e, 4.8 TB/s; and of the DGX H200
    "h200": Hardware(
        "NVIDIA H200 SXM 141 GB, 8 a node (DGX H200)", per_node=8, float64=67e12, float32=67e12, half=989e12,
        memory=141e9, bandwidth=4.8e12, inside=450e9, between=50e9, watts=700,
    ),
    # NVIDIA H100 Tensor Core GPU, data sheet, column SXM: FP64 Tensor Core 67, FP32 67, BF16 1979 (sparse), 3.35 TB/s,
    # NVLink 900 GB/s, up to 700 W; and of the DGX H100: eight ports of 400 Gb/s
    "h100": Hardware(
        "NVIDIA H100 SXM 80 GB, 8 a node (DGX H100)", per_node=8, float64=67e12, float32=67e12, half=989e12,
        memory=80e9, bandwidth=3.35e12, inside=450e9, between=50e9, watts=700,
    ),
    # NVIDIA A100 Tensor Core GPU, data sheet, column 80GB SXM: FP64 Tensor Core 19.5, FP32 19.5, BF16 312 (dense),
    # 2039 GB/s, NVLink 600 GB/s, 400 W; the 40 GB one differs in memory alone: 1555 GB/s. DGX A100: ports of 200 Gb/s
    "a100": Hardware(
        "NVIDIA A100 SXM 80 GB, 8 a node (DGX A100)", per_node=8, float64=19.5e12, float32=19.5e12, half=312e12,
        memory=80e9, bandwidth=2.039e12, inside=300e9, between=25e9, watts=400,
    ),
    # AMD Instinct MI250, data sheet, halved: FP64 and FP32 Matrix 90.5, bfloat16 362.1, 128 GB, 3.2 TB/s, 500 W (560 W
    # at its peak), Infinity Fabric 100 GB/s a link. The MI250X has 95.7, 383.0 and 560 W. The ports are assumed
    "mi250": Hardware(
        "half an AMD Instinct MI250 (one of its two dies), 8 a node", per_node=8, float64=45.25e12,
        float32=45.25e12, half=181e12, memory=64e9, bandwidth=1.6e12, inside=50e9, between=12.5e9, watts=250,
    ),
    # AMD EPYC 7763, data sheet: 64 cores of 2.45 GHz, 204.8 GB/s, 280 W; 32 operations in float32 a core and clock (two
    # fused multiply-adds of 256 bits). Memory and port are assumed
    "cpu": Hardware(
        "AMD EPYC 7763, a process a socket, 2 a node", per_node=2, float64=2.5e12, float32=5.0e12, half=5.0e12,
        memory=256e9, bandwidth=204.8e9, inside=12.5e9, between=6.25e9, watts=280, queues=False,
    ),
}  # fmt: skip
_MOST = 1e24  # that a device can do or hold
_NUMBERS = tuple(field.name for field in fields(Hardware) if field.name not in ("what", "queues", "per_node"))


def hardware_of(name: str, per_node: int | None = None, settings: Sequence[str] = ()) -> Hardware:
    """An entry of the table, with what the user knows better.

    Args:
        name: of the table.
        per_node: devices of a node, else those of the entry.
        settings: KEY=NUMBER, for any number of the entry.

    Raises:
        UsageError: for a setting that is none.
    """
    changes = dict(map(_setting, settings))
    entry = TABLE[name]
    what = f"{entry.what}; set by hand: {', '.join(settings)}" if settings else entry.what
    return replace(entry, what=what, per_node=per_node or entry.per_node, **changes)  # type: ignore[arg-type]


def _setting(text: str) -> tuple[str, float]:
    key, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if key not in _NUMBERS or not 1 <= number <= _MOST:
        raise UsageError(
            f"--hardware {text!r}: expected KEY=NUMBER with a number from 1 to {_MOST:g} and one of the keys "
            f"{', '.join(_NUMBERS)} (operations a second, bytes, bytes a second, watts), such as memory=40e9"
        )
    return key, number
