"""Leading singular functions of linear operators in their order, by nested low-rank approximation.

This room knows torch and nothing else of hpclr.
"""

from hpclr.nested.masks import Nesting, joint, sequential, unnested
from hpclr.nested.operators import (
    Eigenfunctions,
    Matrix,
    SingularFunctions,
    eigenfunctions,
    evd_loss,
    operator_svd,
    svd_loss,
)

__all__ = [
    "Eigenfunctions",
    "Matrix",
    "Nesting",
    "SingularFunctions",
    "eigenfunctions",
    "evd_loss",
    "joint",
    "operator_svd",
    "sequential",
    "svd_loss",
    "unnested",
]
