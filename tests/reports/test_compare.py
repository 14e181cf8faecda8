"""Two checkpoints of any kind against the definitions, in float64."""

import numpy as np
import pytest

from drift_merge.errors import AlignmentError
from drift_merge.reports.compare import plan_comparison
from drift_merge.reports.figures import Group, modules
from drift_merge.reports.places import LANGUAGE
from tests import checkpoints as c
from tests.reports.suite import compare, make, naive


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("compare") / "made")


def stored(directory, name):
    """A tensor by canonical or stored name, in float64."""
    tensors = c.read_tensors(directory)
    for key in (name, f"model.{name}", f"language_model.{name}", f"model.language_model.{name}"):
        if key in tensors:
            return tensors[key].values.astype(np.float64)
    raise KeyError(name)


def check(found, a, b, base=None):
    for tensor in found.tensors:
        own = stored(base, tensor.name) if base and tensor.part == LANGUAGE else None
        expected = naive(stored(a, tensor.name), stored(b, tensor.name), own)
        for key, value in expected.items():
            # Float32 sums of at most 2**18 entries: see `maths.differences.PairSums`.
            close = value if value is None else pytest.approx(value, rel=2e-5, abs=1e-12)
            assert getattr(tensor, key) == close, (tensor, key)


@pytest.mark.parametrize("swapped", [False, True])
def test_every_figure_is_that_of_the_definition_whichever_is_the_mllm(made, swapped):
    pair = (made.mllm, made.reasoner) if swapped else (made.reasoner, made.mllm)
    found = compare(*pair, made.base)
    check(found, *pair, made.base)
    assert {t.part for t in found.tensors} == {LANGUAGE}
    only = "only_a" if swapped else "only_b"
    assert len(found.plan.coverage()[only]) == len(c.vision_shapes())


def test_of_two_mllms_the_vision_tower_and_the_connector_are_compared_too(made):
    found = compare(made.merged, made.mllm)
    check(found, made.merged, made.mllm)
    names = set(c.mllm_tensors())
    assert len(found.tensors) == len(names)
    assert all(not names for key, names in found.plan.coverage().items() if key != "compared")
    rows = modules(found.tensors)
    assert rows["all of the tower"].norm_delta > 0
    for part in ("vision tower", "connector"):
        assert rows[part].norm_delta == 0
        assert rows[part].equal == 1


def test_a_changed_vision_tower_is_seen_under_either_way_of_writing_names(made, tmp_path):
    tensors = c.read_tensors(made.mllm)
    name = "visual.blocks.0.attn.qkv.weight"
    values = tensors[name].values.copy()
    values[0] += 1.0
    tensors[name] = c.store(values)
    renamed = {(f"model.{n}" if n.startswith("visual") else n): t for n, t in tensors.items()}
    other = c.write_checkpoint(tmp_path / "other", renamed, c.mllm_config())
    found = compare(other, made.mllm)
    changed = [t for t in found.tensors if t.norm_delta]
    assert [t.name for t in changed] == [name]
    assert changed[0].norm_delta == pytest.approx(np.sqrt(c.VISION), rel=1e-2)
    assert changed[0].equal == pytest.approx(1 - 1 / (3 * c.VISION))


def test_two_text_models_can_be_compared(made):
    found = compare(made.reasoner, made.base)
    check(found, made.reasoner, made.base)
    assert len(found.tensors) == len(c.text_shapes())


def test_without_tokenizers_the_tables_are_left_out_and_that_is_said(tmp_path):
    pair = c.make_pair(tmp_path)
    found = compare(*pair)
    assert not {"embed_tokens.weight", "lm_head.weight"} & {t.name for t in found.tensors}
    assert [f.code for f in found.plan.findings if f.severity == "warning"] == ["no_rows"]
    assert found.plan.coverage()["not_selected"] == ["embed_tokens.weight", "lm_head.weight"]


def test_what_has_another_shape_or_no_partner_is_counted(made, tmp_path):
    tensors = c.read_tensors(made.mllm)
    tensors["visual.merger.mlp.2.weight"] = c.store(np.ones((c.HIDDEN, 3)))
    tensors["visual.extra.weight"] = c.store(np.ones(3))
    tensors["visual.index"] = c.store(np.arange(3), "I64")
    other = c.write_checkpoint(tmp_path / "other", tensors, c.mllm_config())
    coverage = compare(other, made.mllm).plan.coverage()
    assert coverage["shape_mismatch"] == ["visual.merger.mlp.2.weight"]
    assert sorted(coverage["only_a"]) == ["visual.extra.weight", "visual.index"]
    twice = compare(other, other).plan.coverage()
    assert twice["no_numbers"] == ["visual.index"]


def test_nothing_alike_is_refused(made, tmp_path):
    shapes = {name: tuple(n + 1 for n in shape) for name, shape in c.text_shapes().items()}
    tensors = c.random_tensors(shapes, 1)
    other = c.write_checkpoint(tmp_path / "other", tensors, c.text_config())
    with pytest.raises(AlignmentError):
        plan_comparison(str(other), str(made.mllm))


def test_nan_is_known_of_its_tensor_alone(made, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = c.read_tensors(made.reasoner)
    values = tensors[name].values.copy()
    values[0, 0] = np.nan
    tensors[name] = c.store(values)
    broken = c.write_checkpoint(tmp_path / "broken", tensors, c.text_config())
    found = compare(broken, made.mllm, modules="attn,mlp")
    unknown = [t.name for t in found.tensors if t.norm_delta is None]
    assert unknown == ["layers.0.mlp.up_proj.weight"]
    group = Group(found.tower)
    assert group.num_unknown == 1
    assert 0.5 < group.cosine < 1
    assert found.histograms["mlp"].plain()["nonfinite"] == 1


def test_a_zero_tensor_has_no_cosine(made, tmp_path):
    name = "model.layers.0.self_attn.q_proj.bias"
    tensors = c.read_tensors(made.reasoner)
    tensors[name] = c.store(np.zeros(tensors[name].shape))
    other = c.write_checkpoint(tmp_path / "other", tensors, c.text_config())
    found = {t.name: t for t in compare(other, made.mllm, modules="attn").tensors}
    zero = found["layers.0.self_attn.q_proj.bias"]
    assert (zero.cosine, zero.relative_norm) == (None, pytest.approx(1.0))


def test_the_stable_rank_is_that_of_the_singular_values(tmp_path):
    rng = np.random.default_rng(3)
    name = "model.layers.0.mlp.up_proj.weight"
    steep = np.outer(rng.normal(size=c.INTERMEDIATE), rng.normal(size=c.HIDDEN))
    mllm = c.mllm_tensors(dtype="F32")
    ours = c.reasoner_tensors(dtype="F32")
    ours[name] = c.store(mllm[name].values + steep, "F32")
    pair = c.make_pair(tmp_path, dtype="F32", reasoner=ours)
    found = compare(*pair, modules="attn,mlp", with_stable_rank=True).tensors
    for tensor in found:
        if len(tensor.shape) != 2:
            assert tensor.stable_rank is None
            continue
        delta = stored(pair.reasoner, tensor.name) - stored(pair.mllm, tensor.name)
        values = np.linalg.svd(delta, compute_uv=False)
        expected = float((values**2).sum() / values[0] ** 2)
        # Lanczos sees the largest value from below, so that the rank comes out a little high.
        assert expected * (1 - 1e-5) <= tensor.stable_rank <= 1.05 * expected, tensor.name
    low = next(t for t in found if t.name == "layers.0.mlp.up_proj.weight")
    assert low.stable_rank == pytest.approx(1.0, rel=1e-4)


def test_threads_change_no_figure(made):
    one = compare(made.reasoner, made.mllm)
    options = {"threads": 2}
    from drift_merge.reports.compare import run_comparison
    from drift_merge.reports.measure import MeasureOptions

    two = run_comparison(one.plan, MeasureOptions(cache_limit=10**9, **options))
    assert one.tensors == two.tensors
