"""Laws that methods obey whatever their formula: identity, limits, permutation, scale, chunks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_merge.maths.methods import METHODS
from tests.maths.methods.driver import merge
from tests.strategies import tensors

few = settings(max_examples=5)
GIVEN = {"t": 0.3, "density": 0.4}  # for variants without a default
EVERY = [(name, variant) for name in METHODS for variant in METHODS[name].variants]
WITH_BASE = [pair for pair in EVERY if METHODS[pair[0]].base == "required"]
MANY = [pair for pair in EVERY if METHODS[pair[0]].reasoners[1] is None]
RANDOM = ("dare-linear", "dare-ties", "della", "della-linear")
every = pytest.mark.parametrize(("name", "variant"), EVERY)
with_base = pytest.mark.parametrize(("name", "variant"), WITH_BASE)


def options_for(name, variant, **extra):
    method = METHODS[name]
    known = {*method.defaults[variant], *method.required.get(variant, ())}
    chosen = {k: v for k, v in (GIVEN | extra).items() if k in known}
    if "weight" in method.required.get(variant, ()):
        chosen |= {"weights": extra.get("weights", [0.5] * extra.get("reasoners", 1))}
    return chosen | {"variant": variant}


def same_bits(one, other):
    return one.contiguous().view(torch.int32).tolist() == other.view(torch.int32).tolist()


def draws(seed, shape, count, spread=0.3):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return [base, *(base + spread * torch.randn(shape, generator=generator) for _ in range(count))]


shapes = st.sampled_from([(1,), (6,), (3, 4), (2, 3, 2)])


@every
@given(data=st.data(), count=st.integers(1, 3))
@few
def test_identical_inputs_give_exactly_that_input(name, variant, data, count):
    shape = data.draw(shapes)
    one = data.draw(tensors(shape, torch.float32)).clamp(-1e9, 1e9)
    method = METHODS[name]
    count = count if method.reasoners[1] is None else 1
    options = options_for(name, variant, reasoners=count)
    copies = [one.clone() for _ in range(count)]
    for base in {"none": [None], "optional": [None, one], "required": [one]}[method.base]:
        assert same_bits(merge(name, one, copies, base, **options), one)


@pytest.mark.parametrize("name", ["linear", "task-arithmetic", "chat-vector", "inject"])
@given(data=st.data())
@few
def test_weight_zero_gives_the_mllm_bit_for_bit(name, data):
    shape = data.draw(shapes)
    base, mllm, *reasoners = (data.draw(tensors(shape, torch.float32)) for _ in range(4))
    assert same_bits(merge(name, mllm, reasoners, base, weights=[0.0, 0.0]), mllm)


@pytest.mark.parametrize("name", ["linear", "inject"])
@given(data=st.data())
@few
def test_weight_one_gives_the_reasoner_bit_for_bit(name, data):
    shape = data.draw(shapes)
    mllm, reasoner = (data.draw(tensors(shape, torch.float32)) for _ in range(2))
    scale = {"scale": 1.0} if name == "inject" else {}
    assert same_bits(merge(name, mllm, [reasoner], weights=[1.0], **scale), reasoner)


@given(data=st.data())
@few
def test_task_arithmetic_of_one_model_alone_is_that_model_bit_for_bit(data):
    shape = data.draw(shapes)
    base, mllm, reasoner = (data.draw(tensors(shape, torch.float32)) for _ in range(3))
    alone = merge("task-arithmetic", mllm, [reasoner], base, weights=[1.0], mllm_weight=0.0)
    assert same_bits(alone, reasoner)


@given(st.integers(0, 2**31), shapes)
@few
def test_the_ends_of_two_model_methods_are_the_models_bit_for_bit(seed, shape):
    _, mllm, reasoner = draws(seed, shape, 2)
    for variant in ("paper", "mergekit"):
        assert same_bits(merge("slerp", mllm, [reasoner], variant=variant, t=0.0), mllm)
        assert same_bits(merge("slerp", mllm, [reasoner], variant=variant, t=1.0), reasoner)
        ends = {"variant": variant, "mllm_weight": 0.0, "weights": [1.0]}
        assert same_bits(merge("nuslerp", mllm, [reasoner], **ends), reasoner)
        ends |= {"mllm_weight": 1.0, "weights": [0.0]}
        assert same_bits(merge("nuslerp", mllm, [reasoner], **ends), mllm)
    assert same_bits(merge("nearswap", mllm, [reasoner], t=0.0), mllm)
    assert same_bits(merge("inject", mllm, [reasoner], scale=0.0), mllm)


@pytest.mark.parametrize(("name", "variant"), [p for p in MANY if p[0] not in RANDOM])
@given(seed=st.integers(0, 2**31))
@few
def test_permuting_reasoners_with_their_weights_changes_only_rounding(name, variant, seed):
    base, mllm, *reasoners = draws(seed, (4, 6), 3)
    base = base if METHODS[name].base != "none" else None
    options = options_for(name, variant)
    weights = [0.25, 0.5]
    one = merge(name, mllm, reasoners, base, **(options | {"weights": weights}))
    other = merge(name, mllm, reasoners[::-1], base, **(options | {"weights": weights[::-1]}))
    torch.testing.assert_close(one, other, rtol=0.0, atol=1e-5)


@with_base
@given(seed=st.integers(0, 2**31), power=st.integers(-4, 4))
@few
def test_scaling_all_task_vectors_scales_the_result(name, variant, seed, power):
    # By a power of two and from a base of 0, so that nothing rounds.
    taus = draws(seed, (4, 6), 3)[1:]
    factor = 2.0**power
    # SCE and Model Stock of mergekit have thresholds that do not scale.
    options = options_for(name, variant, reasoners=2)
    zero = torch.zeros(4, 6)
    one = merge(name, taus[0], taus[1:], zero, **options)
    other = merge(name, taus[0] * factor, [t * factor for t in taus[1:]], zero, **options)
    torch.testing.assert_close(other, one * factor, rtol=1e-6, atol=0.0)


@with_base
@given(seed=st.integers(0, 2**31))
@few
def test_scale_zero_gives_the_base_and_scale_is_linear(name, variant, seed):
    if "scale" not in METHODS[name].defaults[variant] or name == "chat-vector":
        return
    base, mllm, *reasoners = draws(seed, (4, 6), 3)
    options = options_for(name, variant, reasoners=2)
    assert torch.equal(merge(name, mllm, reasoners, base, scale=0.0, **options), base)
    one = merge(name, mllm, reasoners, base, scale=1.0, **options)
    half = merge(name, mllm, reasoners, base, scale=0.5, **options)
    torch.testing.assert_close(half, (base + one) / 2, rtol=0.0, atol=2e-6)


@pytest.mark.parametrize("name", ["dare-linear", "della-linear", "breadcrumbs"])
@pytest.mark.parametrize("variant", ["paper", "mergekit"])
@given(seed=st.integers(0, 2**31))
@few
def test_density_one_is_task_arithmetic(name, variant, seed):
    base, mllm, *reasoners = draws(seed, (4, 6), 3)
    options = {"variant": variant, "weights": [0.25, 0.5], "density": 1.0}
    if name == "breadcrumbs":
        options["gamma"] = 0.0
    found = merge(name, mllm, reasoners, base, **options)
    plain = merge("task-arithmetic", mllm, reasoners, base, weights=[0.25, 0.5])
    torch.testing.assert_close(found, plain, rtol=0.0, atol=2e-6)


@pytest.mark.parametrize("name", ["dare-ties", "della"])
@given(seed=st.integers(0, 2**31))
@few
def test_density_one_is_ties_without_trimming(name, seed):
    base, mllm, *reasoners = draws(seed, (4, 6), 3)
    found = merge(name, mllm, reasoners, base, density=1.0)
    assert torch.equal(found, merge("ties", mllm, reasoners, base, density=1.0))


@every
@given(data=st.data())
@few
def test_finite_inputs_give_finite_outputs(name, variant, data):
    shape = data.draw(shapes)
    values = tensors(shape, torch.float32)
    base, mllm, *reasoners = (data.draw(values).clamp(-1e9, 1e9) for _ in range(4))
    count = 2 if METHODS[name].reasoners[1] is None else 1
    base = base if METHODS[name].base == "required" else None
    options = options_for(name, variant, reasoners=count)
    found = merge(name, mllm, reasoners[:count], base, **options)
    assert found.isfinite().all()


@every
@pytest.mark.parametrize("kind", ["normal", "tied"])
def test_the_result_is_the_same_bit_for_bit_for_every_size_of_chunks(name, variant, kind):
    method = METHODS[name]
    if kind == "tied" and method.measure is None:
        return
    rows, width = 270, 500  # more than one block, so that sums are folded
    base, mllm, *reasoners = draws(7, (rows, width), 3)
    if kind == "tied":  # few values, many equal; the first rows differ from the last
        growth = torch.arange(rows).div(100).ceil()[:, None]
        mllm, *reasoners = (
            base + ((t - base) * 6).round() * 0.1 * growth for t in (mllm, *reasoners)
        )
        base = base.bfloat16().float()
    count = 2 if method.reasoners[1] is None else 1
    base = base if method.base == "required" else None
    options = options_for(name, variant, reasoners=count)
    whole = merge(name, mllm, reasoners[:count], base, **options)
    for size in (150 * width, 40 * width if method.row_wise else 29_989):
        found = merge(name, mllm, reasoners[:count], base, chunk_elements=size, **options)
        assert same_bits(found, whole), size


@pytest.mark.parametrize("options", [{"flatten": False}, {"flatten": False, "column_wise": True}])
def test_nuslerp_of_rows_and_columns_does_not_depend_on_chunks(options):
    _, mllm, reasoner = draws(7, (300, 500), 2)
    whole = merge("nuslerp", mllm, [reasoner], **options)
    for rows in (1, 7, 150):
        found = merge("nuslerp", mllm, [reasoner], chunk_elements=rows * 500, **options)
        assert same_bits(found, whole)


def test_an_empty_tensor_stays_empty_with_every_method():
    for name, variant in EVERY:
        empty = torch.empty(0, 5)
        base = empty if METHODS[name].base == "required" else None
        options = options_for(name, variant)
        assert merge(name, empty, [empty], base, **options).shape == (0, 5)


def test_a_scalar_is_merged_by_every_method():
    for name, variant in EVERY:
        base, mllm, reasoner = draws(3, (), 2)
        base = base if METHODS[name].base == "required" else None
        found = merge(name, mllm, [reasoner], base, **options_for(name, variant))
        assert found.shape == ()
        assert found.isfinite()
