"""Networks that start as the best linear map, after Bermeitinger, Hrycej and Handschuh (arXiv 1906.11755).

A linear map of rank r, B_r = D A (`hpclr.lowrank.regression.LinearFit.encoder`), goes through a hidden layer as r
values z = A (x − x̄). What carries them depends on the activation φ:

    tanh (slope 1 at 0)      A / c before it, c D after it: z/c is small, and the error is O(c⁻²) of the output; the
                             largest value that it is given has a standard deviation of 1/c
    relu, gelu               [A; −A] before it, [D, −D] after it: φ(z) − φ(−z) = z for every z, so there is no error,
                             and it takes two units for each value

The paper has the first. Further hidden layers hand z on in the same way. Units that are left over keep the weights into
them, and get weights of 0 out of them to the values carried and the outputs, so that they change nothing at first, and
do so from the first step on.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hpclr.lowrank.factors import svd
from hpclr.lowrank.regression import LinearFit

UNITS = {"tanh": 1, "relu": 2, "gelu": 2}  # hidden units for each value carried


def start_linear(
    layers: Sequence[nn.Linear],
    activation: str,
    fit: LinearFit,
    *,
    scale: float = 3.0,
    ranks: Mapping[int, int] | None = None,
) -> int:
    """Sets the weights of a stack of linear layers so that it is, or nearly is, the best linear map of its rank.

    Args:
        layers: from inputs to outputs, with the activation between them; with biases, unless the means are zero.
        activation: tanh, relu or gelu.
        fit: of the outputs that are wanted to the inputs.
        scale: c, for tanh; the others need none.
        ranks: number of a layer → the highest rank that its weight may have.

    Returns:
        The rank of the map.

    Raises:
        ValueError: for another activation, layers that do not fit, have no bias or are too narrow for a rank of 1, or a
            scale that is not above 0.
    """
    _check(layers, activation, fit, scale)
    limits = dict(ranks or {})
    r = carried_rank(layers, activation, fit, limits)
    if r < 1:
        raise ValueError(
            f"{activation} carries each value of a linear map in {UNITS[activation]} hidden units, found layers of "
            f"widths {[layer.out_features for layer in layers[:-1]]} and inputs of which {fit.rank} directions explain "
            "anything"
        )
    with torch.no_grad():
        _set(layers, activation, fit, scale, r)
        for number, rank in limits.items():
            _limit_rest(layers[number], 0 if number == len(layers) - 1 else r * UNITS[activation], rank - r)
    return r


def carried_rank(
    layers: Sequence[nn.Linear], activation: str, fit: LinearFit, ranks: Mapping[int, int] | None = None
) -> int:
    """The rank of the map for which a stack of layers has room; see `start_linear`."""
    widths = [layer.out_features // UNITS[activation] for layer in layers[:-1]]
    return min([fit.rank, *widths, *(ranks or {}).values()])


def _check(layers: Sequence[nn.Linear], activation: str, fit: LinearFit, scale: float) -> None:
    if activation not in UNITS:
        raise ValueError(f"a linear start is known for {', '.join(UNITS)}, found the activation {activation!r}")
    if not scale > 0:
        raise ValueError(f"the scale of a linear start must be above 0, found {scale!r}")
    found, wanted = (layers[0].in_features, layers[-1].out_features), (fit.weight.shape[1], fit.weight.shape[0])
    if found != wanted:
        raise ValueError(f"the fit is from {wanted[0]} inputs to {wanted[1]} outputs, the layers from {found}")
    if any(layer.bias is None for layer in layers):
        raise ValueError("a linear start needs layers with a bias, which takes care of the means")


def _set(layers: Sequence[nn.Linear], activation: str, fit: LinearFit, scale: float, r: int) -> None:
    if len(layers) == 1:
        _put(layers[0], *fit.leading(r))
        return
    encode, decode = fit.encoder(r)
    scale *= float(fit.basis.s[0].sqrt())  # the standard deviation of the first value
    one = torch.eye(r, dtype=encode.dtype, device=encode.device)
    into, out = (
        (one / scale, one * scale) if UNITS[activation] == 1 else (torch.cat([one, -one]), torch.cat([one, -one]).T)
    )
    code = into @ encode
    _put(layers[0], code, -code @ fit.x_mean)
    for layer in layers[1:-1]:
        _put(layer, into @ out, torch.zeros(len(into)))
    _put(layers[-1], decode @ out, fit.y_mean)


def _put(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    """Into the first rows and columns; what else leads into these rows is 0."""
    rows, columns = weight.shape
    layer.weight[:rows] = 0
    layer.weight[:rows, :columns] = weight.to(layer.weight)
    layer.bias[:rows] = bias.to(layer.bias)


def _limit_rest(layer: nn.Linear, first: int, rank: int) -> None:
    """Cuts the rows from `first` on to a rank, so that the whole weight has no more than its limit."""
    rest = layer.weight[first:]
    if not len(rest) or first == 0:
        return
    u, s, vh = svd(rest.double())
    rest.copy_((u[:, :rank] * s[:rank]) @ vh[:rank])
