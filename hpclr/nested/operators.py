"""The leading singular functions of a linear operator, or eigenfunctions, learnt as networks: NestedLoRA.

After Ryu et al., "Operator SVD with neural networks via nested low-rank approximation" (ICML 2024, arXiv 2402.03655).
T takes functions g(y) to functions (Tg)(x). Of L pairs (f_l, g_l) the low-rank approximation objective is

    loss(f, g) = ‖T − Σ_l f_l ⊗ g_l‖² − ‖T‖² = −2 Σ_l ⟨f_l, T g_l⟩ + Σ_{l,i} ⟨f_l, f_i⟩⟨g_l, g_i⟩         (1)

with no constraint, no inverse and no root, so that minibatches give its gradient without bias. At the minimum
Σ f_l ⊗ g_l is the truncated SVD, and ‖f_l‖ ‖g_l‖ the l-th singular value once masks v and M (`masks.py`) have put them
into order:

    ∂f_l = 2 (−v_l T g_l + Σ_i M_il ⟨g_i, g_l⟩ f_i)        ∂g_l = 2 (−v_l T* f_l + Σ_i M_il ⟨f_i, f_l⟩ g_i)     (2)

For a self-adjoint T, g = f, both parts of (2) fall upon the same function, 4 (−v_l T f_l + Σ_i M_il ⟨f_i, f_l⟩ f_i),
and the eigenvalues above 0 are found; a function for which there is none goes to 0.

Inner products are means over the samples: those of the distribution that the samples are drawn from.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hpclr.nested.masks import Nesting

Functions = Callable[[Tensor], Tensor]
"""x (batch, …) to the values of L functions (batch, L)."""

Operator = Callable[[Functions, Tensor], Tensor]
"""(g, x) to (T g)(x) (batch, L)."""


class SingularFunctions(NamedTuple):
    """What has been learnt; all numbers (L) in the order of the functions."""

    values: Tensor  # Rayleigh quotients ⟨f_l, T g_l⟩ / (‖f_l‖ ‖g_l‖)
    norms: Tensor  # ‖f_l‖ ‖g_l‖, which is the singular value at the minimum
    left_norms: Tensor  # ‖f_l‖
    right_norms: Tensor  # ‖g_l‖
    f: Functions
    g: Functions

    @torch.no_grad()
    def left(self, x: Tensor) -> Tensor:
        """Left singular functions of norm 1 at x, (batch, L)."""
        return self.f(x) / self.left_norms

    @torch.no_grad()
    def right(self, y: Tensor) -> Tensor:
        """Right singular functions of norm 1 at y, (batch, L)."""
        return self.g(y) / self.right_norms


class Eigenfunctions(NamedTuple):
    """What has been learnt; all numbers (L) in the order of the functions."""

    values: Tensor  # Rayleigh quotients ⟨f_l, T f_l⟩ / ‖f_l‖²
    norms: Tensor  # ‖f_l‖², which is the eigenvalue at the minimum
    f: Functions

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Eigenfunctions of norm 1 at x, (batch, L)."""
        return self.f(x) / self.norms.sqrt()


class Matrix:
    """A matrix A (m×n) as an operator from functions of a column's number to functions of a row's.

    Scaled so that its singular values are those of A, and √m u, √n v the functions, when rows and columns are drawn
    evenly.
    """

    def __init__(self, matrix: Tensor) -> None:
        (m, n), self._matrix = matrix.shape, matrix * (matrix.shape[0] / matrix.shape[1]) ** 0.5
        self.rows = torch.arange(m, device=matrix.device)
        self.columns = torch.arange(n, device=matrix.device)

    def __call__(self, g: Functions, rows: Tensor) -> Tensor:
        """A g at these rows."""
        product: Tensor = self._matrix[rows] @ g(self.columns)
        return product


def operator_svd(
    operator: Operator,
    f: nn.Module,
    g: nn.Module,
    sample: Callable[[], tuple[Tensor, Tensor]],
    nesting: Nesting,
    optimizer: Optimizer,
    steps: int,
    scheduler: LRScheduler | None = None,
    evaluations: int = 1,
) -> SingularFunctions:
    """Trains f and g, in place, to be the leading singular functions of an operator.

    Args:
        operator: T, linear: (g, x) to (T g)(x), differentiable with regard to the parameters of g. An integral may be a
            mean over samples that it draws itself.
        f: x to (batch, L); plain parameters are an `nn.Embedding` of L columns.
        g: y to (batch, L).
        sample: draws x and y for a step, each of them a batch of its own; the two must be independent.
        nesting: how they are put into order, `hpclr.nested.sequential(L)` or `joint`.
        optimizer: of the parameters of f and g.
        steps: how many.
        scheduler: stepped after each step. Towards the end the rate should fall: what noise is left in the functions
            goes with it.
        evaluations: from how many more samples the values are estimated.

    Returns:
        The pairs with their singular values; on the device of the parameters.
    """
    nesting = nesting.to(next(f.parameters()))
    for _ in range(steps):
        x, y = sample()
        _descend(svd_loss(f(x), g(y), operator(g, x), nesting), optimizer, scheduler)
    with torch.no_grad():
        moments = [_moments(f(x), g(y), operator(g, x)) for x, y in (sample() for _ in range(evaluations))]
    left, right, cross = _means(moments)
    norms = left.sqrt() * right.sqrt()
    return SingularFunctions(cross / norms, norms, left.sqrt(), right.sqrt(), f, g)


def eigenfunctions(
    operator: Operator,
    f: nn.Module,
    sample: Callable[[], Tensor],
    nesting: Nesting,
    optimizer: Optimizer,
    steps: int,
    scheduler: LRScheduler | None = None,
    evaluations: int = 1,
) -> Eigenfunctions:
    """Trains f, in place, to be the eigenfunctions of the largest eigenvalues, above 0, of a self-adjoint operator.

    For the lowest levels of a Hamiltonian H give c − H, with c above the highest level that is wanted.

    Args:
        operator: T, linear and self-adjoint: (f, x) to (T f)(x); no gradient is taken through it.
        f: x to (batch, L).
        sample: draws x for a step, a batch of independent points; each half of it measures the functions for the other.
        nesting: as in `operator_svd`.
        optimizer: of the parameters of f.
        steps: how many.
        scheduler: as in `operator_svd`.
        evaluations: from how many more samples the values are estimated.
    """
    nesting = nesting.to(next(f.parameters()))
    for _ in range(steps):
        x = sample()
        _descend(evd_loss(f(x), _applied(operator, f, x), nesting), optimizer, scheduler)
    moments = []
    for _ in range(evaluations):
        x = sample()
        fx = f(x).detach()
        moments.append(_moments(fx, fx, _applied(operator, f, x)))
    square, _, cross = _means(moments)
    return Eigenfunctions(cross / square, square, f)


def svd_loss(f: Tensor, g: Tensor, tg: Tensor, nesting: Nesting) -> Tensor:
    """A number whose gradient is (2); its value means nothing, since the masks may belong to no loss.

    ∂g comes about by differentiating ⟨f, T g⟩ through T. The inner products ⟨g_i, g_l⟩ are of other samples than the
    f_i that they multiply, so that the product of the means is the mean of the product.

    Args:
        f: values at x (batch, L).
        g: values at y (batch, L).
        tg: (T g)(x) (batch, L).
        nesting: in their type and on their device.

    Raises:
        ValueError: if the numbers of functions differ.
    """
    _check_counts(nesting, f, g, tg)
    operators_part = 2 * (nesting.vector * f * tg).sum(1).mean()
    return _towards(f, 2 * _repulsion(f, g, nesting)) + _towards(g, 2 * _repulsion(g, f, nesting)) - operators_part


def evd_loss(f: Tensor, tf: Tensor, nesting: Nesting) -> Tensor:
    """The same of (2) for g = f, ∂f_l = 4 (…), with inner products of one half of the batch for the other.

    Args:
        f: values at x (batch, L).
        tf: (T f)(x) (batch, L), a constant to the gradient.
        nesting: in their type and on their device.

    Raises:
        ValueError: for a batch of one, or if the numbers of functions differ.
    """
    _check_counts(nesting, f, tf)
    half = f.shape[0] // 2
    if half == 0:
        raise ValueError(f"eigenfunctions need a batch of two points or more for each step; found {f.shape[0]}")
    first, second = f[:half], f[half : 2 * half]
    repulsion = torch.cat([_repulsion(first, second, nesting), _repulsion(second, first, nesting)])
    return _towards(f[: 2 * half], 4 * (repulsion - nesting.vector * tf[: 2 * half]))


def _check_counts(nesting: Nesting, *values: Tensor) -> None:
    """Refuses what torch would stretch to fit."""
    wanted, shapes = len(nesting.vector), [tuple(value.shape) for value in values]
    if any(len(shape) != 2 or shape[1] != wanted for shape in shapes):
        raise ValueError(
            f"the masks are for {wanted} functions, of which f, g and the operator must give values of shape "
            f"(batch, {wanted}); found {', '.join(map(str, shapes))}"
        )


def _repulsion(f: Tensor, g: Tensor, nesting: Nesting) -> Tensor:
    """Σ_i M_il ⟨g_i, g_l⟩ f_i at the samples of f, (batch, L); a constant."""
    g = g.detach()
    return f.detach() @ (nesting.matrix * (g.mT @ g / g.shape[0]))


def _towards(f: Tensor, gradient: Tensor) -> Tensor:
    """A number whose gradient is the mean over the samples of `gradient` times that of f."""
    return (f * gradient.detach()).sum(1).mean()


@torch.no_grad()
def _applied(operator: Operator, f: Functions, x: Tensor) -> Tensor:
    return operator(f, x).detach()


def _descend(loss: Tensor, optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if scheduler is not None:
        scheduler.step()


def _moments(f: Tensor, g: Tensor, tg: Tensor) -> Tensor:
    """‖f_l‖², ‖g_l‖² and ⟨f_l, T g_l⟩, (3, L)."""
    return torch.stack([f.square().mean(0), g.square().mean(0), (f * tg).mean(0)])


def _means(moments: Sequence[Tensor]) -> Tensor:
    mean: Tensor = torch.stack(list(moments)).mean(0)
    return mean
