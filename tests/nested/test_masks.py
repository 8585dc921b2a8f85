"""The masks, and what they mean: joint nesting is the mean over truncations."""

import pytest
import torch

from hpclr.nested import evd_loss, joint, sequential, svd_loss, unnested

L = 5
WEIGHTS = torch.tensor([0.1, 0.0, 0.4, 0.2, 0.3], dtype=torch.float64)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def test_the_masks_are_those_of_their_definitions():
    assert unnested(2).vector.tolist() == [1, 1]
    assert sequential(3).matrix.tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1]]
    assert sequential(4, step=2).matrix.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]
    vector, matrix = joint(WEIGHTS)
    assert vector.tolist() == pytest.approx([1.0, 0.9, 0.9, 0.5, 0.3])
    for i in range(L):
        for j in range(L):
            assert matrix[i, j] == vector[max(i, j)]


def test_all_weight_on_the_last_length_is_no_nesting():
    found, expected = joint(torch.tensor([0.0, 0.0, 1.0])), unnested(3)
    assert torch.equal(found.vector, expected.vector)
    assert torch.equal(found.matrix, expected.matrix)


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [-0.1, 1.0], [[1.0]], [float("nan"), 1.0]], ids=str)
def test_weights_with_which_a_pair_takes_no_part_are_refused(weights):
    with pytest.raises(ValueError, match="one number for each length"):
        joint(torch.tensor(weights))


def test_a_step_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1; found 0"):
        sequential(3, step=0)


def test_joint_masks_are_sampled_truncation():
    """Σ_k w_k ‖A − F_{1:k} G_{1:k}ᵀ‖², by automatic differentiation, has the gradient of the masks."""
    torch.manual_seed(0)
    a, f, g = torch.randn(7, 6, dtype=torch.float64), drawn(7, L), drawn(6, L)
    truncated = sum(w * (a - f[:, : k + 1] @ g[:, : k + 1].mT).square().sum() for k, w in enumerate(WEIGHTS))
    expected = torch.autograd.grad(truncated, (f, g))
    rows, columns = 7**0.5 * f, 6**0.5 * g  # functions of norm 1 have values of size 1
    loss = svd_loss(rows, columns, (7 / 6) ** 0.5 * a @ columns, joint(WEIGHTS).to(a))
    for found, wanted in zip(torch.autograd.grad(loss, (f, g)), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-6)


def test_sequential_masks_keep_a_pair_from_those_after_it():
    """Equation (2), written out; no gradient of pair l changes when later pairs do."""
    torch.manual_seed(0)
    a, f, g = torch.randn(7, 6, dtype=torch.float64), drawn(7, L), drawn(6, L)
    gradients = [_gradients(a, f, g)]
    with torch.no_grad():
        f[:, 3:] += 1
        g[:, 3:] -= 1
    gradients.append(_gradients(a, f, g))
    for before, after in zip(*gradients, strict=True):
        assert torch.allclose(before[:, :3], after[:, :3])
        assert not torch.allclose(before[:, 3:], after[:, 3:])


def _gradients(a, f, g):
    """Compared with equation (2) on the way; inner products are means, A is scaled as it is."""
    loss = svd_loss(f, g, a @ g, sequential(L).to(a))
    found = torch.autograd.grad(loss, (f, g))
    (m, n), mask = a.shape, torch.ones(L, L, dtype=torch.float64).triu()
    expected_f = 2 * (-a @ g + f @ (mask * (g.mT @ g / n))) / m
    expected_g = 2 * (-a.mT @ f / m + g @ (mask * (f.mT @ f / m)) / n)
    assert torch.allclose(found[0], expected_f)
    assert torch.allclose(found[1], expected_g)
    return found


def test_eigenfunctions_have_twice_the_gradient_and_the_halves_measure_each_other():
    """The mean over many draws is the gradient of the joint loss; within one batch nothing meets itself."""
    torch.manual_seed(0)
    root, f = torch.randn(6, 6, dtype=torch.float64), drawn(6, L)
    a, nesting = root @ root.mT, joint(WEIGHTS)
    whole = torch.cat([f, f])  # the same points in both halves: the exact mean
    [found] = torch.autograd.grad(evd_loss(whole, torch.cat([a @ f, a @ f]).detach(), nesting), f)
    truncated = sum(w * _objective(a, f[:, : k + 1]) for k, w in enumerate(WEIGHTS))
    [expected] = torch.autograd.grad(truncated, f)
    assert torch.allclose(found, expected)
    other = torch.cat([f[:1], torch.zeros(1, L, dtype=torch.float64)])  # the second half measures the first as 0
    [found] = torch.autograd.grad(evd_loss(other, torch.zeros_like(other), nesting), f)
    assert not found.any()


def _objective(a, f):
    """Equation (1) for g = f, inner products being means over the rows."""
    gram = f.mT @ f / len(f)
    return -2 * (f * (a @ f)).sum() / len(f) + gram.square().sum()


def test_a_batch_of_one_cannot_be_halved():
    with pytest.raises(ValueError, match="two points or more"):
        evd_loss(torch.ones(1, 2), torch.ones(1, 2), unnested(2))


@pytest.mark.parametrize(
    "shapes", [((4, 3), (4, 3), (4, 1)), ((4, 1), (4, 1), (4, 1)), ((4, 3), (4, 2), (4, 3)), ((3,),) * 3]
)
def test_numbers_of_functions_must_agree(shapes):
    with pytest.raises(ValueError, match=r"for 3 functions, .* \(batch, 3\); found"):
        svd_loss(*(torch.ones(shape) for shape in shapes), unnested(3))
    with pytest.raises(ValueError, match="for 4 functions"):
        evd_loss(torch.ones(4, 3), torch.ones(4, 3), unnested(4))
