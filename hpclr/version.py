"""The version of hpclr, readable without importing anything else."""

__version__ = "0.1.0"
