"""Clusters as their owners describe them. The model of a step on one of them is `hpclr.planning.steps`."""

from hpclr.planning.steps import Cluster

CLUSTERS = {
    "juwels-booster": Cluster(
        "JUWELS Booster: 4 A100 40 GB a node, NVLink 3, 4 x HDR200 InfiniBand "
        "(apps.fz-juelich.de/jsc/hps/juwels; NVIDIA's A100 data sheet: 312 TFLOP/s bf16, 1555 GB/s, NVLink 600 GB/s)",
        gpus=4, flops=312e12, memory=1555e9, inside=300e9, between=25e9,
    ),
    "jupiter": Cluster(
        "JUPITER: 4 GH200 96 GB a node, NVLink 4, 4 x NDR200 InfiniBand (apps.fz-juelich.de/jsc/hps/jupiter: 4 TB/s, "
        "150 GB/s each way to each of 3 others; NVIDIA's H100 data sheet: 989 TFLOP/s bf16)",
        gpus=4, flops=989e12, memory=4000e9, inside=450e9, between=25e9,
    ),
    "alex-a40": Cluster(
        "Alex: 8 A40 48 GB a node, PCIe 4, one 25 GbE (hpc.fau.de: 25 GbE, 696 GB/s; "
        "NVIDIA's A40 data sheet: 149.7 TFLOP/s bf16, PCIe 64 GB/s)",
        gpus=8, flops=149.7e12, memory=696e9, inside=32e9, between=3.125e9 / 8, hop_between=25e-6,
    ),
}  # fmt: skip
