"""Leading singular triples against float64 decompositions, where spectra make it hard and easy."""

import pytest
import torch
from torch import Tensor

from drift_merge.maths.spectra.leading import Factors, full, leading
from tests.maths.spectra.matrices import with_values

KEY = 0x1234_5678_9ABC_DEF0
EPS = torch.finfo(torch.float32).eps


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank, by LAPACK in float64."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def assert_triples(matrix: Tensor, found: Factors, tolerance: float) -> None:
    """Both products of the definition, in units of the first value; orthonormal columns."""
    a, u, s, v = (t.double() for t in (matrix, found.u, found.values, found.v))
    assert (a @ v - u * s).norm(dim=0).max() <= tolerance * s[0]
    assert (a.T @ u - v * s).norm(dim=0).max() <= tolerance * s[0]
    assert (s[:-1] >= s[1:]).all()
    assert (s >= 0).all()
    eye = torch.eye(len(s), dtype=torch.float64)
    assert (v.T @ v - eye).abs().max() <= 32 * EPS


@pytest.mark.parametrize("shape", [(400, 300), (300, 400)])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_leading_directions_are_those_of_a_float64_decomposition(shape, rank):
    matrix = with_values(shape, [2.0**-i for i in range(40)], seed=1)
    found = leading(matrix, rank, KEY)
    assert found.error <= 1e-5
    assert_triples(matrix, found, 1e-5)
    off = (found.product().double() - truncated(matrix, rank)).norm()
    assert off <= 1e-5 * 2 * rank  # the residual over the gap, which is half of each value


def test_a_ratio_of_0_999_between_the_first_two_values_is_resolved():
    matrix = with_values((500, 400), [1.0, 0.999, 0.5, 0.25], seed=2)
    found = leading(matrix, 1, KEY)
    assert found.error <= 1e-5
    # Residual over gap: 1e-5 / 1e-3.
    assert (found.product().double() - truncated(matrix, 1)).norm() <= 1e-2
    exact = leading(matrix.double(), 1, KEY)
    assert exact.error <= 1e-11
    assert (exact.product() - truncated(matrix, 1)).norm() <= 1e-8


def test_repeated_values_give_the_projection_on_their_whole_space():
    matrix = with_values((400, 300), [3.0] * 4 + [0.1] * 20, seed=3)
    found = leading(matrix, 4, KEY)
    assert_triples(matrix, found, 1e-5)
    assert (found.product().double() - truncated(matrix, 4)).norm() <= 4e-5 * 3


def test_inside_noise_the_directions_hold_nearly_the_most_energy_there_is():
    noise = torch.randn(600, 400, generator=torch.Generator().manual_seed(4))
    values = torch.linalg.svdvals(noise.double())
    for rank in (1, 8):
        found = leading(noise, rank, KEY)
        energy = found.values.double().square().sum()
        assert 0.98 <= energy / values[:rank].square().sum() <= 1.0 + EPS * 8
        left = noise.double() - found.product().double()  # P_k is a projection of the matrix
        assert left.square().sum() == pytest.approx(float(noise.double().square().sum() - energy))


def test_a_rank_above_the_matrix_own_gives_the_matrix():
    matrix = with_values((400, 300), [5.0, 1.0, 0.2], seed=5)
    for rank in (3, 8, 200):
        found = leading(matrix, rank, KEY)
        assert (found.product() - matrix).norm() <= 32 * EPS * 5.0
        assert (found.values[3:] <= 8 * EPS * 5.0).all()


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (3, 500), (500, 1)])
def test_thin_matrices_have_as_many_triples_as_their_short_side(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    found = leading(matrix, 9, KEY)
    assert found.values.shape == (min(shape),)
    assert (found.product() - matrix).abs().max() <= 16 * EPS * matrix.norm()


def test_zeros_give_zeros_and_orthonormal_columns():
    found = leading(torch.zeros(400, 300), 2, KEY)
    assert found.values.tolist() == [0.0, 0.0]
    assert not found.product().any()
    assert (found.v.T @ found.v).equal(torch.eye(2))


def test_a_matrix_of_few_filled_rows_is_found_too():
    """Blocks that lose their rank leave arbitrary columns, which must be orthonormal still."""
    matrix = torch.zeros(400, 300)
    matrix[7, 11], matrix[250, 3] = 2.0, -1.0
    found = leading(matrix, 4, KEY)
    assert_triples(matrix, found, 1e-5)
    assert (found.product() - matrix).abs().max() <= 16 * EPS


@pytest.mark.parametrize("power", [-100, -60, 40])
def test_scaling_by_a_power_of_two_scales_the_values_alone(power):
    """Bit for bit: neither squares that underflow nor tolerances of a fixed size."""
    matrix = with_values((400, 300), [1.0, 0.5, 0.1], seed=7)
    plain, scaled = leading(matrix, 2, KEY), leading(matrix * 2.0**power, 2, KEY)
    assert scaled.u.equal(plain.u)
    assert scaled.v.equal(plain.v)
    assert scaled.values.equal(plain.values * 2.0**power)


def test_the_same_key_gives_the_same_bytes_for_any_number_of_torch_threads():
    matrix = torch.randn(900, 700, generator=torch.Generator().manual_seed(8))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((leading(matrix, 3, KEY), full(matrix[:200])))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for iterated, whole in found[1:]:
        assert all(getattr(iterated, n).equal(getattr(found[0][0], n)) for n in ("u", "v"))
        assert whole.u.equal(found[0][1].u)
        assert whole.values.equal(found[0][1].values)


def test_another_key_gives_the_same_directions_within_the_tolerance():
    matrix = with_values((400, 300), [1.0, 0.5, 0.1], seed=9)
    one, other = leading(matrix, 1, KEY), leading(matrix, 1, KEY + 1)
    assert (one.product() - other.product()).norm() <= 4e-5


def test_full_gives_every_triple():
    matrix = torch.randn(60, 40, generator=torch.Generator().manual_seed(10))
    found = full(matrix)
    assert_triples(matrix, found, 64 * EPS)
    assert (found.product() - matrix).norm() <= 64 * EPS * found.values[0]
    assert found.first(3).values.equal(found.values[:3])
    assert found.product(torch.zeros(40)).abs().max() == 0.0
