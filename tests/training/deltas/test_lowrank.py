"""Training takes a low-rank prior by its factors: as with the dense product, to float32."""

import pytest
import torch

import drift_merge
from drift_merge.engine.job import RunOptions
from drift_merge.maths.lowrank import LowRank, inner, product, squared, subtract_
from drift_merge.maths.spectra.matrices import Matrix
from drift_merge.priors.combine import combine_priors, plan_combination
from drift_merge.priors.deltas import open_deltas
from drift_merge.training.deltas.files import FileDeltas
from drift_merge.training.deltas.opened import OpenPrior, open_for_training
from drift_merge.training.lora.projection import FactorBlock, project
from drift_merge.training.units import Block, Origin, Unit
from tests.runs import run_prior
from tests.training.toys import loss_of, make_toy, selected

UP = "layers.0.mlp.up_proj.weight"
RULES = ("absolute", "absolute_param_norm", "gradnorm", "adaptive_cosine")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("low"))


@pytest.fixture(scope="module")
def low(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("low") / "r2"
    options = {"modules": "attn,mlp,norm", "dtype": "float32"}
    return run_prior(*toy.pair, out, rank=2, **options).prior


class Dense(FileDeltas):
    """The same deltas, read as if they had no factors."""

    def is_factored(self, unit):
        return False

    def factors(self, unit, block, like):
        return None


def gradients(toy, prior, rule, monkeypatch, source=FileDeltas):
    from drift_merge.training import attach

    monkeypatch.setattr(attach, "FileDeltas", source)
    model = toy.model()
    handle = drift_merge.attach(model, prior, rule=rule, alpha=0.7)
    for step in range(2):
        model.zero_grad()
        loss_of(model, step).backward()
        handle.apply()
    report = handle.report()
    return torch.cat([p.grad.flatten() for p in selected(model).values()]), report


@pytest.mark.parametrize("rule", RULES)
def test_gradients_are_those_of_the_dense_product(toy, low, monkeypatch, rule):
    found, _ = gradients(toy, low, rule, monkeypatch)
    wanted, _ = gradients(toy, low, rule, monkeypatch, Dense)
    plain, _ = gradients(toy, toy.prior, rule, monkeypatch)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    assert not torch.allclose(found, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))


@pytest.mark.parametrize("rank", [0, 2])
def test_a_combination_is_trained_with_as_the_sum_of_its_parts(toy, low, tmp_path, rank):
    parts = [toy.prior, low]
    plan = plan_combination(parts, (0.7, -0.4), dtype="float32", rank=rank)
    both = combine_priors(
        parts, plan, "drift-prior combine", tmp_path / "both", RunOptions(threads=1)
    )
    model, plain = toy.model(), toy.model()
    loss_of(plain, 0).backward()
    handle = drift_merge.attach(model, both.prior, rule="absolute", alpha=0.5)
    loss_of(model, 0).backward()
    handle.apply()
    with open_deltas(toy.prior) as one, open_deltas(low) as two, open_deltas(both.prior) as sums:
        for name, parameter in selected(model).items():
            added = (selected(plain)[name].grad - parameter.grad) / 0.5
            stored = sums.read(name).view(parameter.shape)
            assert torch.allclose(added, stored, atol=1e-5), name
            expected = (0.7 * one.read(name) - 0.4 * two.read(name)).view(parameter.shape)
            if not (rank and sums.is_factored(name)):
                assert torch.allclose(stored, expected, atol=1e-5), name
    handle.remove()


def test_what_has_no_directions_is_stored_as_it_is(toy, low):
    with open_deltas(toy.prior) as dense, open_deltas(low) as deltas:
        plain = [name for name in low.tensors if not deltas.is_factored(name)]
        assert len(plain) == 11  # biases and norms of two layers, and the last norm
        for name in plain:
            assert torch.equal(deltas.read(name), dense.read(name)), name
            assert deltas.read(name).any(), name


def test_what_is_read_is_the_product_of_what_is_stored(low):
    with open_deltas(low) as deltas:
        factored = [name for name in low.tensors if deltas.is_factored(name)]
        assert len(factored) == 14
        for name in factored:
            found = deltas.factors(name)
            assert torch.allclose(deltas.read(name), found.u @ found.v.T, atol=1e-6)
            assert low.norm(name) == pytest.approx(float(deltas.read(name).norm()), rel=1e-5)
            # --norm frobenius, the default: the norm of all of delta
            assert low.norm(name) == pytest.approx(low.tensors[name]["norm_delta"], rel=1e-5)


@pytest.mark.parametrize(
    "origin", [Origin(3, 2, False), Origin(3, 2, True), Origin(1, 0, False, 3)]
)
def test_a_block_of_a_unit_stored_any_way(low, origin):
    opened = open_for_training(low)
    source = FileDeltas([opened, opened], [0.5, -2.0])
    unit = Unit(UP, "p", None, "mlp", 0, (5, 7), 0, origin)
    block = Block(1, 2, 3, 4)
    found = product(source.factors(unit, block, torch.empty(0)), torch.empty(2, 4))
    wanted = torch.empty(8)
    Dense([opened, opened], [0.5, -2.0]).chunk(unit, 0, block, wanted)
    assert torch.allclose(found, wanted.view(2, 4), atol=1e-6)


MATRICES = {
    "whole": (Matrix(((0, 12),), (0, 10, 1)),),
    "stacked": (Matrix(((0, 8),), (0, 10, 1)), Matrix(((8, 12),), (0, 10, 1))),
    "interleaved rows": (
        Matrix(((0, 4), (6, 10)), (0, 10, 1)),
        Matrix(((4, 6), (10, 12)), (0, 10, 1)),
    ),
    "alternating columns": (Matrix(((0, 12),), (0, 10, 2)), Matrix(((0, 12),), (1, 10, 2))),
    "experts": tuple(
        Matrix(((6 * e, 6 * e + 6),), cols) for e in (0, 1) for cols in ((0, 5, 1), (5, 10, 1))
    ),
}


@pytest.mark.parametrize("kind", MATRICES)
def test_blocks_of_fused_tensors_and_their_sums(kind):
    torch.manual_seed(0)
    matrices = MATRICES[kind]
    heights = [sum(b - a for a, b in m.rows) for m in matrices]
    widths = [len(range(*m.cols)) for m in matrices]
    u, v = torch.randn(sum(heights), 3), torch.randn(sum(widths), 3)
    whole, row, col = torch.zeros(12, 10), 0, 0
    for matrix, height, width in zip(matrices, heights, widths, strict=True):
        made, at = u[row : row + height] @ v[col : col + width].T, 0
        for a, b in matrix.rows:
            whole[a:b, slice(*matrix.cols)] = made[at : at + b - a]
            at += b - a
        row, col = row + height, col + width
    low = LowRank(matrices, u, v)
    for rows in ((0, 12), (3, 9), (5, 6), (11, 12)):
        for cols in ((0, 10), (3, 8), (4, 5)):
            wanted = whole[slice(*rows), slice(*cols)]
            assert torch.allclose(low.dense(rows, cols), wanted, atol=1e-6)
            parts = list(low.rectangles(rows, cols))
            block = torch.randn(wanted.shape)
            assert float(inner(block, parts)) == pytest.approx(
                float((block * wanted).sum()), abs=1e-4
            )
            assert float(squared(parts)) == pytest.approx(float(wanted.square().sum()), rel=1e-5)
            after = subtract_(block.clone(), parts, torch.tensor(0.5))
            assert torch.allclose(after, block - 0.5 * wanted, atol=1e-5)


def test_a_low_rank_prior_is_not_refreshed(toy, low):
    model = toy.model()
    handle = drift_merge.attach(model, low)
    loss_of(model, 0).backward()
    handle.apply()
    with pytest.raises(drift_merge.RecipeError, match="refresh"):
        handle.refresh()


def test_open_prior_knows_the_shapes(low, toy):
    opened = open_for_training(low)
    assert isinstance(opened, OpenPrior)
    assert opened.shapes == open_for_training(toy.prior).shapes


def test_lora_directions_by_factors_are_those_of_dense_rows():
    torch.manual_seed(1)
    low = LowRank(MATRICES["stacked"], torch.randn(12, 2), torch.randn(20, 2))
    dense = low.dense((0, 12), (0, 10))
    a, b = torch.randn(4, 10), torch.randn(9, 4)  # of rows 5 to 14 of a weight; delta has 3 to 15

    def factors(first, end, like):
        return list(low.rectangles((first, end), (0, 10)))

    found = []
    for read in (None, factors):
        into = torch.zeros_like(a), torch.zeros_like(b)
        block = FactorBlock(5, a, b, *into)
        rows = lambda first, end: dense[first:end]  # noqa: E731
        project(rows, range(3, 15), [block], 1.5, read_factors=read)
        found.append(into)
    for one, other in zip(*found, strict=True):
        assert float(one.norm()) > 0
        assert torch.allclose(one, other, atol=1e-5)
